"""Gradients of the scan by Triton's kernels against autograd through the formula in float64, and against the CPU's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.scan import ScanInputs, selective_scan
from tests.scan.test_scan import random_inputs, random_state
from tests.scan.test_scan_backward import assert_close, gradients, leaves, outputs_of_the_formula, wanted, weights
from tests.support.gpu import HAS_CUDA
from tests.support.models import random_model, random_tokens

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
gpu = pytest.importorskip("ssmc.runtime.scan.gpu")

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
EXACT = 5e-6 if DEVICE.type == "cpu" else 3e-5


def moved(inputs: ScanInputs) -> ScanInputs:
    return ScanInputs(**{name: t if t is None else t.to(DEVICE) for name, t in vars(inputs).items()})


def on_cpu(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in found.items()}


# chunks of 32 tokens, 8 at a time (4 from 9 states on), and blocks of 32 channels, full, partial and several
@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "d_state", "gated"),
    [(2, 13, 35, 3, True), (1, 1, 3, 1, True), (1, 16, 32, 5, False), (1, 6, 2, 17, True), (1, 75, 2, 9, True)],
)
def test_equal_autograd_through_the_formula(batch, length, d_inner, d_state, gated):
    inputs = random_inputs(batch, length, d_inner, d_state, gated=gated)
    state = random_state(inputs)
    got = gradients(moved(inputs), state.to(DEVICE), "triton")
    assert_close(on_cpu(got), wanted(inputs, state), EXACT)


def test_equal_those_of_the_cpu_and_leave_what_was_read_alone():
    inputs = random_inputs(1, 21, 33, 1)
    state = random_state(inputs)
    given = moved(inputs)
    kept = {name: t.clone() for name, t in vars(given).items() if t is not None}
    there = state.to(DEVICE)
    assert_close(on_cpu(gradients(given, there, "triton")), gradients(inputs, state, "cpu"), EXACT)
    assert torch.equal(there.cpu(), state)
    assert all(torch.equal(getattr(given, name), t) for name, t in kept.items())


def test_stretches_of_tokens_add_up_to_the_whole():
    inputs = random_inputs(2, 41, 6, 2)
    state = random_state(inputs)
    y_weight, last_weight = (w.to(DEVICE) for w in weights(inputs, state))
    stretch_bytes = 4 * 2 * 6 * 2  # one chunk of states: stretches of 32 tokens
    whole = gpu.backward.gradients(moved(inputs), state.to(DEVICE), y_weight, last_weight)
    cut = gpu.backward.gradients(moved(inputs), state.to(DEVICE), y_weight, last_weight, stretch_bytes)
    named = [name for name, t in whole._asdict().items() if t is not None]
    assert_close(*({name: getattr(found, name).cpu() for name in named} for found in (cut, whole)), 1e-6)


def test_bias_and_softplus_inside_the_kernel_have_gradients():
    inputs = random_inputs(1, 11, 34, 2)
    raw = replace(inputs, dt=3 * inputs.u.flip(1) - 2, dt_bias=torch.linspace(-2, 2, 34))
    given = moved(raw)
    tensors = {name: t.detach().requires_grad_() for name, t in vars(given).items() if t is not None}
    y, _ = selective_scan(ScanInputs(**tensors), backend="triton")
    weight = weights(inputs, random_state(inputs))[0]
    got = torch.autograd.grad((y * weight.to(DEVICE)).sum(), [tensors["dt"], tensors["dt_bias"]])
    dt, bias = raw.dt.double().requires_grad_(), raw.dt_bias.double().requires_grad_()
    right = leaves(replace(inputs, dt=F.softplus(raw.dt + raw.dt_bias)), random_state(inputs), torch.float64)
    h, loss = 0.0, 0.0
    for k, step in enumerate(F.softplus(dt + bias).unbind(1)):
        drive = (step * right["u"][:, k])[..., None] * right["B"][:, k, None]
        h = torch.exp(step[..., None] * right["A"]) * h + drive
        out = (h * right["C"][:, k, None]).sum(-1) + right["D"] * right["u"][:, k]
        loss = loss + (out * F.silu(right["z"][:, k]) * weight[:, k]).sum()
    truth = torch.autograd.grad(loss, [dt, bias])
    assert_close(*({"dt": a.cpu(), "dt_bias": b.cpu()} for a, b in (got, truth)), EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_have_its_dtype_and_are_rounded_once(dtype):
    inputs = random_inputs(1, 9, 6, 2)
    half = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "B", "C", "z")})
    state = random_state(inputs)
    given = {name: t.to(DEVICE).requires_grad_() for name, t in vars(half).items() if t is not None}
    y, last = selective_scan(ScanInputs(**given), state.to(DEVICE), backend="triton")
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    weight = weights(inputs, state)[0].to(dtype)
    found = dict(zip(given, torch.autograd.grad(y, list(given.values()), weight.to(DEVICE)), strict=True))
    assert all(found[name].dtype == t.dtype for name, t in given.items())
    exact = leaves(half, state, torch.float64)
    y, _ = outputs_of_the_formula(exact)
    right = torch.autograd.grad(y, [exact[name] for name in given], weight.double())
    rough = {name: t.float().cpu() for name, t in found.items()}
    assert_close(rough, dict(zip(given, right, strict=True)), torch.finfo(dtype).eps)


def test_a_stock_model_learns_the_same_with_it():
    ids = random_tokens((1, 6))
    found = []
    for device in (torch.device("cpu"), DEVICE):  # the first without our scan, the second with it
        model = random_model().to(device)
        use_stock_scan(model) if not found else use_fast_scan(model, "triton")
        model(ids.to(device), labels=ids.to(device)).loss.backward()
        found.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(found[1], found[0], 2e-3 if HAS_CUDA else 2e-5)  # a GPU's products of matrices are rounded otherwise


def test_a_second_derivative_is_refused():
    given = moved(random_inputs(1, 2, 2, 1))
    u = given.u.clone().requires_grad_()
    y, _ = selective_scan(replace(given, u=u), backend="triton")
    (first,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
