"""Mamba-2's Triton kernels against a naive loop written from the formula, and stock transformers; see `test_triton`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.scan import SsdInputs, ssd_scan
from tests.families.test_mamba2 import in_pieces, naive, random_ids, random_inputs, random_state
from tests.support.families import FAMILIES
from tests.support.models import LAYERS, random_mamba2

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
gpu = pytest.importorskip("ssmc.runtime.scan.gpu")
ssd = pytest.importorskip("ssmc.runtime.scan.gpu.ssd")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = 1e-6 if DEVICE.type == "cpu" else 2e-5  # a GPU's exponentials, and products in three TF32 parts
SHORT = ssd.Plan(block=16, tokens=16, warps=4, stages=1, stretch=32, widest=32)
FEW_HEADS = {"num_heads": 4, "head_dim": 12}  # the interpreter runs one after the other
HYBRIDS = ("bamba", "granitemoehybrid", "nemotron_h", "zamba2", "falcon_h1")


def difference(got: torch.Tensor, wanted) -> float:
    """||difference|| relative to ||wanted||."""
    wanted = torch.as_tensor(wanted).double()
    assert got.shape == wanted.shape
    return float((got.cpu().double() - wanted).norm() / wanted.norm())


def moved(inputs: SsdInputs) -> SsdInputs:
    """The inputs on the device of the kernels, with the strides they have."""
    return replace(inputs, **{k: t.to(DEVICE) for k, t in vars(inputs).items() if isinstance(t, torch.Tensor)})


def scanned(inputs: SsdInputs, state: torch.Tensor | None = None, plan: ssd.Plan | None = SHORT):
    """Output and final state, as the kernels compute them."""
    return ssd.ssd_scan(moved(inputs), None if state is None else state.to(DEVICE), plan=plan)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "heads": 2, "d_state": 12},
        {"length": 35, "d_state": 16, "head_dim": 20, "heads": 1, "groups": 1},
        {"batch": 1, "length": 17, "d_state": 96, "head_dim": 16, "heads": 1, "groups": 1},
        {"length": 33, "d_state": 24, "heads": 2, "head_dim": 2},
        {"batch": 1, "length": 97, "d_state": 1, "heads": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("plan", [SHORT, None], ids=["stretches", "default"])
def test_equals_the_recurrence(sizes, plan):
    inputs = random_inputs(**sizes)
    for state in (None, random_state(inputs)):
        y, end = naive(inputs, state)
        got, final = scanned(inputs, state, plan)
        assert difference(got, y) < EXACT
        assert difference(final, end) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_is_read_and_written_and_nothing_between(dtype):
    inputs = random_inputs(batch=1, length=50, heads=2, head_dim=16, d_state=16)
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "dt", "B", "C", "D")})
    y, end = naive(inputs)
    got, final = scanned(inputs)
    assert got.dtype == dtype
    assert final.dtype == torch.float32
    bound = 3 * torch.finfo(dtype).eps if DEVICE.type == "cuda" else torch.finfo(dtype).eps
    assert difference(got, y) < bound
    assert difference(final, end) < (bound if DEVICE.type == "cuda" else EXACT)


@pytest.mark.parametrize("d_state", [96, 128, 256])
def test_sizes_of_real_heads(d_state):
    """Tiles as large as they get: heads of 64 channels, several chunks and stretches; in bfloat16."""
    inputs = random_inputs(batch=1, length=200, heads=2, groups=1, d_state=d_state, head_dim=64)
    inputs = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in ("u", "dt", "B", "C", "D")})
    y, end = naive(inputs)
    for stretch in (128, 256):
        plan = replace(ssd.plan_for(inputs, ssd.gpu_of(torch.empty(0, device=DEVICE))), stretch=stretch)
        got, final = scanned(inputs, plan=plan)
        assert difference(got, y) < 1e-2
        assert difference(final, end) < 1e-2


def test_large_numbers_of_float16_do_not_overflow_between():
    inputs = random_inputs(batch=1, length=20, heads=2, head_dim=16, d_state=16)
    big = {"B": inputs.B * 300, "C": inputs.C * 300, "u": inputs.u / 1e4}
    inputs = replace(inputs, **{name: tensor.half() for name, tensor in big.items()})
    y, _ = naive(inputs)
    assert difference(scanned(inputs)[0], y) < 3e-3


@pytest.mark.parametrize("A", [-1.0, -3e38])
def test_strong_decay_and_long_steps_stay_exact(A):
    inputs = random_inputs(batch=1, length=50, heads=2)
    dt = inputs.dt.clone()
    dt[:, ::7] = 300.0
    inputs = replace(inputs, dt=dt, A=torch.tensor([A, -0.5]))
    y, end = naive(inputs)
    got, final = scanned(inputs)
    assert difference(got, y) < EXACT
    assert difference(final, end) < EXACT


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.1, 0.7)])
@pytest.mark.parametrize("length", [1, 19])
def test_bias_softplus_and_limits_in_the_kernel_equal_those_outside(limit, length):
    inputs = random_inputs(length=length)
    raw = 4 * torch.randn(inputs.dt.shape, generator=torch.Generator().manual_seed(2)) - 2
    bias = torch.linspace(-3, 3, inputs.heads)
    steps = torch.log1p(torch.exp((raw + bias).double())).clamp(*limit)
    state = random_state(inputs)
    y, end = naive(replace(inputs, dt=steps), state)
    got, final = ssd.ssd_scan(moved(replace(inputs, dt=raw, dt_bias=bias, dt_limit=limit)), state.to(DEVICE))
    assert difference(got, y) < EXACT
    assert difference(final, end) < EXACT


@pytest.mark.parametrize("d_state", [1, 12, 16, 96, 128])
def test_a_single_token(d_state):
    inputs = random_inputs(length=1, d_state=d_state, head_dim=5)
    state = random_state(inputs)
    y, end = naive(inputs, state)
    given = state.to(DEVICE)
    got, after = ssd.ssd_scan(moved(inputs), given)
    assert torch.equal(given.cpu(), state), "the state given must stay as it is"
    assert difference(got, y) < EXACT
    assert difference(after, end) < EXACT
    got, after = ssd.ssd_scan(moved(inputs), given, in_place=True)
    assert after.data_ptr() == given.data_ptr()
    assert difference(given, end) < EXACT


def test_pieces_equal_the_whole_and_leave_the_state_given_alone():
    inputs = random_inputs(length=45, heads=2)
    y, end = naive(inputs)
    cut = {name: getattr(inputs, name) for name in ("u", "dt", "B", "C")}
    first, middle = scanned(replace(inputs, **{name: t[:, :13] for name, t in cut.items()}))
    kept = middle.clone()
    second, last = ssd.ssd_scan(moved(replace(inputs, **{name: t[:, 13:] for name, t in cut.items()})), middle)
    assert torch.equal(middle, kept)
    assert difference(torch.cat([first, second], dim=1), y) < EXACT
    assert difference(last, end) < EXACT


@pytest.mark.parametrize("states", [*range(1, 40), 64, 96, 100, 128, 144, 256])
@pytest.mark.parametrize("widest", [32, 64, 128])
def test_tiles_hold_all_states_and_waste_few(states, widest):
    parts = ssd.parts_of(states, widest)
    assert all(part in (16, 32, 64, 128) and part <= widest for part in parts)
    assert sum(parts) >= states
    assert sum(parts) - states < max(16, states / 3)
    assert sum(parts[:-1]) < states


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gated_norm_is_that_of_transformers(groups, dtype):
    g = torch.Generator().manual_seed(0)
    y, z = torch.randn(2, 5, 48, generator=g).to(dtype), torch.randn(2, 7, 60, generator=g).to(dtype)[:, 1:6, 7:55]
    for gate_first in (True, False):
        norm = (
            Zamba2RMSNormGated(48, 48 // groups, 1e-3)
            if gate_first
            else FalconH1RMSNormGated(48, 1e-3, groups, norm_before_gate=True)
        )
        with torch.no_grad():
            norm.weight.copy_(torch.randn(48, generator=g))
            wanted = norm.to(dtype)(y, z)
        got = gpu.gated_norm(*(t.to(DEVICE) for t in (y, z, norm.weight.detach())), groups, 1e-3, gate_first)
        assert got.dtype == wanted.dtype
        assert difference(got, wanted) < (EXACT if dtype == torch.float32 else 1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_groups": 4, "state_size": 12, "time_step_limit": (0.05, 0.4), "use_conv_bias": False, "use_bias": True}],
    ids=["two groups", "four groups, limited dt"],
)
def test_a_model_computes_what_stock_transformers_does(changes):
    stock = random_mamba2(**FEW_HEADS, **changes)
    ids = random_ids(1, 8)
    wanted, whole = in_pieces(stock, ids, [8])
    got, cache = in_pieces(use_fast_scan(copy.deepcopy(stock).to(DEVICE), "triton"), ids.to(DEVICE), [4, 1, 3])
    assert difference(got, wanted) < 10 * EXACT
    for layer in range(LAYERS):
        for kind in ("conv_states", "recurrent_states"):
            ours, theirs = (getattr(c.layers[layer], kind)[0] for c in (cache, whole))
            assert difference(ours, theirs) < 10 * EXACT


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model = use_fast_scan(random_mamba2(**FEW_HEADS).to(DEVICE), "triton")
    ids = random_ids(1, 7).to(DEVICE)
    mask = F.pad(torch.ones_like(ids), (4, 0))
    got = model(F.pad(ids, (4, 0), value=3), attention_mask=mask).logits
    assert difference(got[:, 4:], model(ids).logits.cpu()) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_compute_what_stock_transformers_does(name):
    changes = {"mamba_rms_norm": True} if name == "falcon_h1" else {}
    stock = FAMILIES[name](**changes)
    ids = random_ids(1, 11)
    fast = use_fast_scan(copy.deepcopy(stock).to(DEVICE), "triton")
    assert difference(fast(ids.to(DEVICE)).logits, stock(ids).logits) < 10 * EXACT


def test_a_scan_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="no mamba-ssm scan of a Mamba-2"):
        ssd_scan(random_inputs(length=2), backend="mamba-ssm")
