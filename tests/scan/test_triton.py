"""The Triton kernels against a naive loop written from the formula: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.mamba import modeling_mamba

from ssmc.compressor.methods.states import collect as collecting
from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.statistics import NormalMatrix, SquaredReadout, SquaredStates
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.scan import ScanInputs, mamba_ssm_scan, scan_moments, scan_states, selective_scan
from tests.scan.test_scan import difference, naive, random_inputs, random_state, tokens
from tests.support.gpu import HAS_CUDA
from tests.support.models import random_model, random_tokens
from tests.support.pruning import job_of

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
gpu = pytest.importorskip("ssmc.runtime.scan.gpu")

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
EXACT = 1e-6 if DEVICE.type == "cpu" else 1e-5  # a GPU's exponential is off by two units in the last place
ROUNDED = torch.bfloat16 if HAS_CUDA else torch.float16  # the interpreter cuts numbers off to bfloat16
SHORT_CHUNKS = gpu.Chunks(block=64, warps=1, tokens=2, chunk=4)
LANES = gpu.Lanes(channels=4, warps=2, tokens=8)


def moved(inputs: ScanInputs, **changes: torch.Tensor | None) -> ScanInputs:
    """The inputs on the device of the kernels, some replaced."""
    tensors = {name: t if t is None else t.to(DEVICE) for name, t in (vars(inputs) | changes).items()}
    return ScanInputs(**tensors)


def scanned(inputs: ScanInputs, state: torch.Tensor | None = None, plan: gpu.Plan | None = SHORT_CHUNKS):
    """Output and final state on the CPU, as the kernels compute them."""
    state = None if state is None else state.to(DEVICE)
    return [t.cpu() for t in gpu.selective_scan(moved(inputs), state, plan=plan)]


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("d_state", "dtype"),
    [(n, torch.float32) for n in (1, 4, 5, 12, 16, 34)] + [(n, d) for n in (2, 12) for d in HALVES],
)
def test_equals_the_formula(d_state, dtype):
    inputs = random_inputs(2, 7, 37, d_state)
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "B", "C", "D", "z")})
    state = random_state(inputs)
    y, states = naive(inputs, state)
    got, final = scanned(inputs, state)
    assert got.dtype == dtype
    assert final.dtype == torch.float32
    assert difference(final.transpose(1, 2), states[:, -1]) < EXACT
    # the only rounding to half precision is that of the result
    bound = EXACT if dtype == torch.float32 else torch.finfo(dtype).eps
    assert difference(got.float(), torch.from_numpy(y).to(dtype).float()) < bound


@pytest.mark.parametrize("length", [1, 3, 8, 17, 65])
@pytest.mark.parametrize("plan", [gpu.Chunks(32, 1, 2, 4), gpu.Chunks(32, 1, 4, 24)], ids=["short", "long"])
def test_any_length_and_several_blocks_of_channels(length, plan):
    inputs = random_inputs(1, length, 70 if length < 8 else 33, 5, gated=False)
    y, states = naive(inputs)
    got, final = scanned(inputs, plan=plan)
    assert difference(got, y) < EXACT
    assert difference(final.transpose(1, 2), states[:, -1]) < EXACT


# runs of 4 tokens in float32, of 8 in float16, pairs of runs of 4 in bfloat16; tiles full, partial and several
@pytest.mark.parametrize(
    ("dtype", "plan", "batch", "length", "d_inner", "d_state"),
    [
        (torch.float32, gpu.Lanes(4, 4, 4), 2, 5, 5, 1),
        (torch.float32, gpu.Lanes(2, 2, 4), 1, 257, 2, 2),
        (torch.float32, gpu.Lanes(4, 2, 8), 1, 300, 3, 3),
        (torch.float16, gpu.Lanes(2, 1, 8, ahead=True), 1, 300, 2, 2),
        (torch.bfloat16, gpu.Lanes(1, 1, 16, registers=168), 1, 513, 1, 3),
        (torch.bfloat16, gpu.Lanes(2, 2, 8), 1, 300, 2, 2),
        (torch.bfloat16, gpu.Lanes(4, 4, 16, wide=True), 1, 520, 3, 2),
    ],
)
def test_time_along_the_lanes_equals_the_formula(dtype, plan, batch, length, d_inner, d_state):
    inputs = random_inputs(batch, length, d_inner, d_state, gated=d_state != 3)
    names = ("u", "B", "C", "D", *(() if inputs.z is None else ("z",)))
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in names})
    state = random_state(inputs) if d_state != 1 else None
    y, states = naive(inputs, state)
    got, final = scanned(inputs, state, plan)
    assert got.dtype == dtype
    assert difference(final.transpose(1, 2), states[:, -1]) < EXACT
    bound = EXACT if dtype == torch.float32 else torch.finfo(dtype).eps
    assert difference(got.float(), torch.from_numpy(y).to(dtype).float()) < bound


@pytest.mark.skipif(
    not HAS_CUDA or torch.cuda.get_device_capability() < (9, 0), reason="kernels overlap on GPUs from Hopper on"
)
@pytest.mark.parametrize("chunk", [16, 64])
def test_kernels_that_overlap_give_the_same_bytes(chunk):
    plan = gpu.Chunks(64, 1, 4, chunk)
    for seed in range(20):
        inputs = moved(random_inputs(2, 2048, 256, 4, seed=seed))
        apart, together = (gpu.selective_scan(inputs, plan=replace(plan, overlap=o)) for o in (False, True))
        assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


@pytest.mark.parametrize(("plan", "d_inner"), [(SHORT_CHUNKS, 64), (SHORT_CHUNKS, 70), (LANES, 4)])
def test_softplus_and_bias_in_the_kernel_equal_those_outside(plan, d_inner):
    inputs = random_inputs(1, 9, d_inner, 4)
    raw = 6 * torch.randn(inputs.dt.shape, generator=torch.Generator().manual_seed(2)) - 4  # small and large steps
    bias = torch.linspace(-3, 3, d_inner)
    fused = replace(inputs, dt=raw, dt_bias=bias)
    y, states = naive(replace(inputs, dt=torch.log1p(torch.exp((raw + bias).double()))))
    got, final = scanned(fused, plan=plan)
    assert difference(got, y) < EXACT
    assert difference(final.transpose(1, 2), states[:, -1]) < EXACT
    small = replace(fused, u=torch.ones_like(inputs.u), B=torch.ones_like(inputs.B), dt=raw.fill_(-12))
    steps = naive(replace(small, dt=torch.log1p(torch.exp((raw + bias).double()))))[1][:, 1]
    first = scanned(tokens(small, slice(0, 1)), plan=plan)[1].transpose(1, 2)
    assert (first.double() / torch.from_numpy(steps) - 1).abs().max() < EXACT, "small steps are not accurate"


def test_pieces_equal_the_whole_and_leave_the_state_given_alone():
    inputs = random_inputs(3, 13, 20, 4)
    whole, end = scanned(inputs)
    first, middle = scanned(tokens(inputs, slice(0, 5)))
    state = middle.to(DEVICE)
    second, last = gpu.selective_scan(moved(tokens(inputs, slice(5, None))), state, plan=SHORT_CHUNKS)
    assert torch.equal(state.cpu(), middle)
    assert difference(torch.cat([first, second.cpu()], dim=1), whole) < EXACT
    assert difference(last.cpu(), end) < EXACT


@pytest.mark.parametrize(("plan", "d_inner", "d_state"), [(SHORT_CHUNKS, 40, 8), (LANES, 4, 2)])
def test_any_strides_will_do(plan, d_inner, d_state):
    inputs = random_inputs(2, 5, d_inner, d_state)
    y, states = naive(inputs)
    names = ("u", "dt", "B", "C", "z")
    channels_first = {n: getattr(inputs, n).transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    odd = replace(inputs, A=inputs.A.t().contiguous().t(), D=inputs.D.repeat_interleave(2)[::2], **channels_first)
    got, end = scanned(odd, torch.zeros(2, d_state, d_inner).transpose(1, 2), plan)
    assert difference(got, y) < EXACT
    assert difference(end.transpose(1, 2), states[:, -1]) < EXACT
    shared = replace(inputs, B=inputs.B[:1].expand(2, -1, -1))
    assert difference(scanned(shared, plan=plan)[0], naive(shared)[0]) < EXACT


@pytest.mark.parametrize("plan", [gpu.Chunks(64, 1, 2, 8), gpu.Chunks(64, 1, 2, 64)])
def test_all_states(plan):
    inputs = random_inputs(2, 11, 37, 5)
    state = random_state(inputs)
    got = gpu.scan_states(moved(inputs), state.to(DEVICE), plan).cpu()
    assert difference(got, naive(inputs, state)[1]) < EXACT


@pytest.mark.parametrize("states", [*range(1, 20), 64, 100, 256])
def test_states_are_cut_into_powers_of_two_without_padding(states):
    parts = gpu.parts_of(states)
    assert sum(parts) == states
    assert all(part & (part - 1) == 0 for part in parts)
    assert sorted(set(parts), reverse=True) == list(parts)


@pytest.mark.parametrize("d_state", [1, 4, 5, 8, 12, 16, 64])
def test_a_single_token(d_state):
    inputs = random_inputs(3, 1, 70, d_state, gated=d_state != 5)
    state = random_state(inputs)
    y, states = naive(inputs, state)
    given = state.to(DEVICE)
    got, after = gpu.selective_scan(moved(inputs), given)
    assert torch.equal(given.cpu(), state), "the state given was modified"
    assert difference(got.cpu(), y) < EXACT
    assert difference(after.cpu().transpose(1, 2), states[:, -1]) < EXACT
    again, same = gpu.selective_scan(moved(inputs), given, in_place=True)
    assert same is given
    assert torch.equal(again, got)
    assert torch.equal(given, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_single_half_token_with_bias_and_softplus(dtype):
    inputs = random_inputs(2, 1, 64, 16)
    half = {name: getattr(inputs, name).to(dtype) for name in ("u", "dt", "B", "C", "D", "z")}
    raw = replace(inputs, **half, dt_bias=torch.linspace(-8, 1, 64))
    state = random_state(inputs)
    steps = torch.log1p(torch.exp(raw.dt.double() + raw.dt_bias.double()))
    y, states = naive(replace(raw, dt=steps, dt_bias=None), state)
    got, after = gpu.selective_scan(moved(raw), state.to(DEVICE))
    assert difference(got.cpu().float(), torch.from_numpy(y).to(dtype).float()) < torch.finfo(dtype).eps
    assert difference(after.cpu().transpose(1, 2), states[:, -1]) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, ROUNDED])
def test_a_stock_model_computes_the_same_with_it(dtype, monkeypatch):
    model = random_model().to(dtype).to(DEVICE)
    ids = random_tokens((2, 9)).to(DEVICE)
    wanted = model(ids).logits.float().cpu()
    truth = copy.deepcopy(model).float()(ids).logits.cpu()
    ran = []
    real = gpu.selective_scan
    monkeypatch.setattr(gpu, "selective_scan", lambda i, *args, **options: ran.append(i) or real(i, *args, **options))
    use_fast_scan(model, "triton")
    cache = DynamicCache(config=model.config)
    pieces = [model(part, cache_params=cache, use_cache=True).logits for part in ids.split([4, 1, 3, 1], dim=1)]
    assert len(ran) == 4 * 3  # pieces times layers
    assert all(inputs.dt_bias is not None for inputs in ran)  # softplus is left to the kernel
    got = torch.cat(pieces, dim=1).float().cpu()
    if dtype == torch.float32:
        assert difference(got, wanted) < 1e-5
    assert (got - truth).norm() < 1.2 * (wanted - truth).norm() + 1e-5 * truth.norm()


def test_the_public_call_takes_dt_before_softplus_whatever_runs_it():
    inputs = random_inputs(1, 5, 20, 4)
    raw = replace(inputs, dt=inputs.dt - 3, dt_bias=torch.linspace(-1, 1, 20))
    y = naive(replace(raw, dt=torch.log1p(torch.exp(raw.dt + raw.dt_bias)), dt_bias=None))[0]
    for backend in ("cpu", "reference", "auto"):
        assert difference(selective_scan(raw, backend=backend)[0], y) < EXACT
        assert scan_states(raw, backend=backend).shape == (1, 6, 4, 20)
    assert difference(selective_scan(moved(raw), backend="triton")[0].cpu(), y) < EXACT


def test_refusals_say_why_and_what_to_do():
    inputs = random_inputs(1, 2, 4, 2)
    with pytest.raises(UsageError, match=r"mamba-ssm scan cannot run here: .*Use backend 'auto' or 'reference'"):
        selective_scan(inputs, backend="mamba-ssm")  # not there, or the tensors are on the CPU
    with pytest.raises(UsageError, match="triton scan cannot run here: a tensor is not in a GPU's memory"):
        selective_scan(replace(inputs, u=inputs.u.to("meta")), backend="triton")
    with pytest.raises(ValueError, match="dt_bias must be"):
        selective_scan(moved(inputs, dt_bias=torch.ones(3)), backend="triton")


@pytest.fixture
def mamba_ssm_functions(monkeypatch):
    """transformers' torch versions of mamba_ssm's functions, which it calls in their place and with their arguments."""
    scan, update = modeling_mamba.mamba_selective_scan, modeling_mamba.mamba_selective_state_update

    def wanting_a_bias(*args, dt_bias, **options):
        assert dt_bias.stride() == (1,)  # the real one asks, also where there is none
        return update.__wrapped__(*args, dt_bias=dt_bias, **options)

    monkeypatch.setattr(mamba_ssm_scan, "kernels", lambda: (scan.__wrapped__, wanting_a_bias))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("length", [1, 6])
def test_mamba_ssm_functions_are_called_with_what_they_want(mamba_ssm_functions, length, fused):
    inputs = random_inputs(2, length, 20, 5)
    given = inputs
    if fused:
        given = replace(inputs, dt_bias=torch.linspace(-1, 1, 20))
        inputs = given.with_time_steps()
    for state in (None, random_state(inputs)):
        y, states = naive(inputs, state)
        kept = None if state is None else state.clone()
        got, final = mamba_ssm_scan.selective_scan(moved(given), None if state is None else state.to(DEVICE))
        assert state is None or torch.equal(state, kept)
        assert difference(got.cpu(), y) < EXACT
        assert difference(final.cpu().transpose(1, 2), states[:, -1]) < EXACT


@pytest.mark.skipif(DEVICE.type != "cuda", reason="mamba_ssm's kernels need a GPU")
def test_mamba_ssm_agrees_where_it_is_installed():
    pytest.importorskip("mamba_ssm", reason="mamba_ssm is not installed; its build needs CUDA")
    inputs = random_inputs(2, 65, 64, 16)
    y = naive(inputs)[0]
    assert difference(selective_scan(moved(inputs), backend="mamba-ssm")[0].cpu(), y) < 1e-5


def sums_of(inputs: ScanInputs, states: np.ndarray) -> dict[str, np.ndarray]:
    """The sums over all states, from the states of the naive loop (B, L + 1, N, D)."""
    C, gate = inputs.C.double().numpy(), 1.0
    if inputs.z is not None:
        z = inputs.z.double().numpy()
        gate = (z / (1 + np.exp(-z)))[:, :, None, :]
    before, after = states[:, :-1], states[:, 1:]
    gated = (gate * after).reshape(-1, *after.shape[2:])
    grams, readers = gated @ gated.transpose(0, 2, 1), C.reshape(-1, C.shape[2])
    pairs = readers[:, :, None] * readers[:, None, :]
    return {
        "before": (before**2).sum((0, 1)),
        "after": (after**2).sum((0, 1)),
        "readouts": ((C[..., None] * after) ** 2).sum((0, 1)),
        "readers": (C**2).sum((0, 1)),
        "quartic": grams.reshape(len(grams), -1).T @ pairs.reshape(len(pairs), -1),
    }


@pytest.mark.parametrize("d_state", [1, 4, 5, 16, 34])
def test_sums_over_the_states_equal_those_of_the_formula(d_state):
    inputs = random_inputs(2, 5, 37, d_state, gated=d_state != 5)
    state = random_state(inputs)
    states = naive(inputs, state)[1]
    got = gpu.moments.scan_moments(moved(inputs), state.to(DEVICE), chunk=2)
    assert difference(got.state.cpu().transpose(1, 2), states[:, -1]) < EXACT
    for name, wanted in sums_of(inputs, states).items():
        assert difference(getattr(got, name).cpu(), wanted) < 3 * EXACT, name


@pytest.mark.parametrize(("dtype", "batch", "length"), [(torch.float16, 1, 3), (torch.bfloat16, 3, 7)])
def test_sums_of_half_inputs_in_stretches_with_bias_and_softplus(dtype, batch, length):
    inputs = random_inputs(batch, length, 70, 4)
    half = {name: getattr(inputs, name).to(dtype) for name in ("u", "dt", "B", "C", "z")}
    raw = replace(inputs, **half, dt_bias=torch.linspace(-3, 1, 70))
    steps = torch.log1p(torch.exp(raw.dt.double() + raw.dt_bias.double()))
    states = naive(replace(raw, dt=steps, dt_bias=None))[1]
    two_tokens = 2 * 4 * batch * 2 * 4**2  # two blocks of channels
    got = gpu.moments.scan_moments(moved(raw), gram_bytes=two_tokens)
    for name, wanted in sums_of(raw, states).items():
        assert difference(getattr(got, name).cpu(), wanted) < 3 * EXACT, name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sums_from_states_equal_those_of_the_formula(backend):
    inputs = random_inputs(2, 70, 9, 3)  # longer than the stretch whose states exist at once
    state = random_state(inputs)
    states = naive(inputs, state)[1]
    got = scan_moments(inputs, state, backend)
    assert difference(got.state.transpose(1, 2), states[:, -1]) < 1e-6
    for name, wanted in sums_of(inputs, states).items():
        assert difference(getattr(got, name), wanted) < 1e-5, name


@torch.no_grad()
def test_statistics_of_a_layer_are_the_same_from_sums_as_from_states(monkeypatch):
    model = random_model()
    block, architecture = model.backbone.layers[1], architecture_for("mamba")
    hidden = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))

    def collected(backend: str, place: torch.device) -> list[torch.Tensor]:
        statistics = [SquaredStates(), SquaredReadout(), NormalMatrix()]
        job = job_of(architecture, block.to(place), hidden.to(place))
        collect(job, statistics, backend=backend, weights=torch.linspace(1, 4, 15).view(3, 5))
        squares, readout, normal = statistics
        values = (squares.value, readout.states, readout.readers, readout.products, normal.value)
        return [value.cpu() for value in values]

    wanted = collected("reference", torch.device("cpu"))
    monkeypatch.setattr(collecting, "SUMMED", 10)  # two samples at a time
    monkeypatch.setattr(collecting, "scan_states", None)  # nobody asks for states
    for got, value in zip(collected("triton", DEVICE), wanted, strict=True):
        assert difference(got, value) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "channels", "width"), [(2, 1, 130, 4), (2, 19, 128, 4), (1, 2, 5, 3)])
@pytest.mark.parametrize("continues", [True, False])
def test_the_convolution_equals_torch(dtype, batch, length, channels, width, continues):
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(batch, length, 2 * channels, generator=generator).to(dtype)
    x = projected[..., :channels]  # as in_proj puts it out
    weight = torch.randn(channels, 1, width, generator=generator).to(dtype)
    bias = torch.randn(channels, generator=generator).to(dtype) if batch > 1 else None
    window = torch.randn(batch, channels, width, generator=generator).to(dtype)  # as transformers' cache holds it
    history = window[..., 1:].transpose(1, 2) if continues else None
    before = torch.zeros(batch, width - 1, channels) if history is None else history.float()
    padded = torch.cat([before, x.float()], dim=1).transpose(1, 2).double()
    wanted = F.conv1d(padded, weight.double(), None if bias is None else bias.double(), groups=channels)
    wanted = F.silu(wanted).transpose(1, 2)
    given = [None if t is None else t.to(DEVICE) for t in (x, weight, bias, history)]
    got = gpu.causal_conv_silu(*given).cpu()
    assert got.dtype == dtype
    assert difference(got.float(), wanted) < (EXACT if dtype == torch.float32 else torch.finfo(dtype).eps)
