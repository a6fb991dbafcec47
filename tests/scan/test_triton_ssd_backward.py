"""Gradients of Mamba-2's Triton kernels against autograd through a loop over tokens in float64; see `test_triton`."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.scan import SsdInputs, ssd_scan
from tests.families.test_mamba2 import random_ids, random_inputs, random_state
from tests.support.models import random_mamba2

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
backward = pytest.importorskip("ssmc.runtime.scan.gpu.ssd.backward")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = 2e-6 if DEVICE.type == "cpu" else 5e-5  # a GPU's exponentials, and products in three TF32 parts
NAMES = ("u", "dt", "A", "B", "C", "D")


def recurrence(inputs: SsdInputs, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of `SsdInputs`, a token at a time, all heads at once."""
    shape, per_group = (inputs.heads, inputs.head_dim), inputs.heads // inputs.groups
    rows = []
    for t in range(inputs.length):
        u, dt = inputs.u[:, t].unflatten(1, shape), inputs.dt[:, t]
        B, C = (x[:, t].repeat_interleave(per_group, dim=1) for x in (inputs.B, inputs.C))
        h = torch.exp(dt * inputs.A)[..., None, None] * h + (dt[..., None] * u)[..., None] * B[:, :, None]
        rows.append(((h * C[:, :, None]).sum(-1) + inputs.D[:, None] * u).flatten(1))
    return torch.stack(rows, dim=1), h


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """||difference|| relative to ||wanted||."""
    assert got.shape == wanted.shape
    return float((got.cpu().double() - wanted.double()).norm() / wanted.double().norm())


def leaves(inputs: SsdInputs, state: torch.Tensor, dtype: torch.dtype | None = None, device: str = "cpu"):
    """The same numbers as tensors that want gradients, each of its own memory."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(device, dtype or tensor.dtype).clone().requires_grad_()

    return replace(inputs, **{name: leaf(getattr(inputs, name)) for name in NAMES}), leaf(state)


def weighed(y: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """A number that depends on every output differently."""
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=g).to(t.device) for t in (y, end)]
    return (y.double() * weights[0]).sum() + (end.double() * weights[1]).sum()


def gradients(inputs: SsdInputs, state: torch.Tensor) -> list[torch.Tensor]:
    return [*(getattr(inputs, name).grad for name in NAMES), state.grad]


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "length": 21, "heads": 2, "groups": 2, "d_state": 12},
        {"batch": 1, "length": 19, "heads": 2, "groups": 1, "d_state": 24, "head_dim": 20},
        {"batch": 1, "length": 1, "heads": 2, "groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_those_of_the_recurrence(sizes, dtype):
    inputs = random_inputs(**sizes)
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "B", "C", "D")})
    exact, ours = (leaves(inputs, random_state(inputs), *how) for how in ((torch.float64,), (None, DEVICE)))
    weighed(*recurrence(*exact)).backward()
    weighed(*ssd_scan(*ours, backend="triton")).backward()
    for name, got, wanted in zip((*NAMES, "state"), gradients(*ours), gradients(*exact), strict=True):
        assert got.dtype == (dtype if name in "uBCD" else torch.float32)
        assert difference(got, wanted) < (EXACT if dtype == torch.float32 else 2 * torch.finfo(dtype).eps), name


def test_gradients_at_the_sizes_of_real_heads():
    """Tiles as large as they get: heads of 64 channels, 128 states, more tokens than a chunk; in bfloat16."""
    inputs = random_inputs(batch=1, length=70, heads=2, groups=1, d_state=128, head_dim=64)
    inputs = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in ("u", "B", "C", "D")})
    exact, ours = (leaves(inputs, random_state(inputs), *how) for how in ((torch.float64,), (None, DEVICE)))
    weighed(*recurrence(*exact)).backward()
    weighed(*ssd_scan(*ours, backend="triton")).backward()
    for name, got, wanted in zip((*NAMES, "state"), gradients(*ours), gradients(*exact), strict=True):
        assert difference(got, wanted) < 2e-2, name


@pytest.mark.parametrize("which", ["output", "state"])
def test_several_spans_slices_and_blocks_of_channels(which):
    """A head of more channels than a program takes, states of several tiles, heads that do not divide into slices."""
    inputs = random_inputs(batch=1, length=36, heads=3, groups=1, d_state=20, head_dim=18)
    state = random_state(inputs)
    plan = backward.BackwardPlan(block=16, tokens=16, warps=4, widest=16, chunks=2, slices=2, head_slices=2)
    exact = leaves(inputs, state, torch.float64)
    y, end = recurrence(*exact)
    g = torch.Generator().manual_seed(7)
    dy, d_end = torch.randn(y.shape, generator=g), torch.randn(end.shape, generator=g)
    (y * dy if which == "output" else end * d_end).sum().backward()
    given = [dy.to(DEVICE), None] if which == "output" else [None, d_end.to(DEVICE)]
    on_device = {name: getattr(inputs, name).to(DEVICE) for name in NAMES}
    found = backward.gradients(replace(inputs, **on_device), state.to(DEVICE), *given, plan)
    for name, got, wanted in zip((*NAMES, "state"), found, gradients(*exact), strict=True):
        if which == "state" and name in "CD":
            assert not got.any(), name
        else:
            assert difference(got, wanted) < EXACT, name


def test_what_needs_no_gradient_gets_none_and_a_second_derivative_is_refused():
    inputs = random_inputs(batch=1, length=3, heads=2, groups=1)
    moved = {name: getattr(inputs, name).to(DEVICE) for name in NAMES}
    moved["u"].requires_grad_()
    y, _ = ssd_scan(replace(inputs, **moved), backend="triton")
    (gradient,) = torch.autograd.grad(y.square().sum(), moved["u"], create_graph=True)
    assert moved["B"].grad is None
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        gradient.sum().backward()


def test_a_model_trains_as_the_stock_one_does():
    stock = random_mamba2(num_heads=4, head_dim=12, num_hidden_layers=2)
    fast = use_fast_scan(copy.deepcopy(stock).to(DEVICE), "triton")
    ids = random_ids(1, 9)
    for model in (stock, fast):
        tokens = ids.to(model.device)
        model(tokens, labels=tokens).loss.backward()
    for (name, wanted), got in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert difference(got.grad, wanted.grad) < 20 * EXACT, name
