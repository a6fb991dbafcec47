"""Gradients of the CPU scan against autograd through the formula in float64, which shares no code with ssmc."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ssmc.runtime import scan
from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan import ScanInputs, scan_states, selective_scan
from tests.scan.test_scan import random_inputs, random_state

FIELDS = ("u", "dt", "A", "B", "C", "D", "z")


def outputs_of_the_formula(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y (B, L, D) and the final state (B, D, N), written from the recurrence, differentiable in every tensor."""
    h, rows = t["state"], []
    for k in range(t["u"].shape[1]):
        decay = torch.exp(t["dt"][:, k, :, None] * t["A"])
        h = decay * h + (t["dt"][:, k] * t["u"][:, k])[:, :, None] * t["B"][:, k, None, :]
        y = (h * t["C"][:, k, None, :]).sum(-1) + t["D"] * t["u"][:, k]
        rows.append(y * F.silu(t["z"][:, k]) if "z" in t else y)
    return torch.stack(rows, 1), h


def leaves(inputs: ScanInputs, state: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    named = {name: getattr(inputs, name) for name in FIELDS if getattr(inputs, name) is not None} | {"state": state}
    return {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in named.items()}


def weights(inputs: ScanInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradients of both outputs, so that every entry of every gradient counts."""
    g = torch.Generator().manual_seed(5)
    return tuple(torch.randn(t.shape, generator=g).to(t.device) for t in (inputs.u, state))


def gradients(
    inputs: ScanInputs, state: torch.Tensor, backend: str, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    t = leaves(inputs, state, dtype)
    y, last = selective_scan(replace(inputs, **{name: t[name] for name in t if name != "state"}), t["state"], backend)
    y_weight, last_weight = weights(inputs, state)
    loss = (y.float() * y_weight).sum() + (last * last_weight).sum()
    return dict(zip(t, torch.autograd.grad(loss, list(t.values())), strict=True))


def wanted(inputs: ScanInputs, state: torch.Tensor) -> dict[str, torch.Tensor]:
    t = leaves(inputs, state, torch.float64)
    loss = sum((o * w).sum() for o, w in zip(outputs_of_the_formula(t), weights(inputs, state), strict=True))
    return dict(zip(t, torch.autograd.grad(loss, list(t.values())), strict=True))


def assert_close(got: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == right.keys()
    for name, gradient in right.items():
        assert got[name].shape == gradient.shape
        error = float((got[name].double() - gradient.double()).abs().max() / gradient.abs().max())
        assert error < tolerance, f"{name} differs by {error:.1e} relative"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("d_state", [1, 2, 5, 16])
# a single token; tiles of 32 tokens and blocks of 32 channels, full, partial, and several; a second group of blocks
@pytest.mark.parametrize(("batch", "length", "d_inner"), [(3, 37, 45), (1, 1, 33), (1, 64, 7), (1, 33, 150)])
def test_equals_autograd_through_the_formula(batch, length, d_inner, d_state, gated):
    inputs = random_inputs(batch, length, d_inner, d_state, gated=gated)
    state = random_state(inputs)
    assert_close(gradients(inputs, state, "cpu"), wanted(inputs, state), 3e-6)


def test_equals_autograd_through_the_reference():
    inputs = random_inputs(2, 70, 40, 8)
    state = random_state(inputs)
    assert_close(gradients(inputs, state, "cpu"), gradients(inputs, state, "reference"), 5e-6)


def test_strides_do_not_matter_and_shared_readers_get_the_sum():
    inputs = random_inputs(3, 40, 40, 6)
    names = ("u", "dt", "B", "C", "z")
    odd = {n: getattr(inputs, n).transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    state = random_state(inputs)
    right = gradients(inputs, state, "cpu")
    assert_close(gradients(replace(inputs, A=inputs.A.t().contiguous().t(), **odd), state, "cpu"), right, 1e-6)
    B = inputs.B[:1].clone().requires_grad_()
    y, _ = selective_scan(replace(inputs, B=B.expand(3, -1, -1)), state, "cpu")
    (shared,) = torch.autograd.grad((y * weights(inputs, state)[0]).sum(), B)
    t = leaves(replace(inputs, B=inputs.B[:1].expand(3, -1, -1)), state, torch.float64)
    loss = (outputs_of_the_formula(t)[0] * weights(inputs, state)[0]).sum()
    (right,) = torch.autograd.grad(loss, t["B"])
    torch.testing.assert_close(shared, right.sum(0, keepdim=True).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", ["output", "state"])
def test_one_of_the_two_outputs_may_be_unused(used):
    inputs = random_inputs(1, 9, 8, 4)
    u = inputs.u.clone().requires_grad_()
    y, last = selective_scan(replace(inputs, u=u), backend="cpu")
    (got,) = torch.autograd.grad((y if used == "output" else last).square().sum(), u)
    t = leaves(inputs, inputs.initial_state(), torch.float64)
    y, last = outputs_of_the_formula(t)
    (right,) = torch.autograd.grad((y if used == "output" else last).square().sum(), t["u"])
    torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-5)


def test_half_inputs_get_half_gradients():
    inputs = random_inputs(1, 40, 40, 4)
    half = replace(inputs, **{name: getattr(inputs, name).bfloat16() for name in FIELDS if name not in ("dt", "A")})
    state = random_state(inputs)
    t = {name: getattr(half, name).detach().requires_grad_() for name in FIELDS}
    y, _ = selective_scan(replace(half, **t), state, "cpu")
    got = dict(zip(t, torch.autograd.grad((y.float() * weights(half, state)[0]).sum(), list(t.values())), strict=True))
    exact = leaves(half, state, torch.float64)
    loss = (outputs_of_the_formula(exact)[0] * weights(half, state)[0].bfloat16()).sum()
    right = dict(zip(exact, torch.autograd.grad(loss, list(exact.values())), strict=True))
    assert got["u"].dtype == torch.bfloat16
    assert got["dt"].dtype == torch.float32
    assert_close(got, {name: right[name] for name in t}, 1e-2)


def test_the_same_bits_whatever_the_threads_do():
    inputs = random_inputs(2, 150, 300, 16)
    state = random_state(inputs)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 5):
            torch.set_num_threads(threads)
            results.append(gradients(inputs, state, "cpu"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


def test_auto_takes_it_when_gradients_are_asked_for(monkeypatch):
    kernels, calls = scan._kernels("cpu_backward"), []
    real = kernels.selective_scan
    monkeypatch.setattr(kernels, "selective_scan", lambda *a: calls.append(1) or real(*a))
    inputs = random_inputs(1, 4, 8, 2)
    selective_scan(inputs)
    assert calls == []
    y, _ = selective_scan(replace(inputs, u=inputs.u.clone().requires_grad_()))
    assert calls == [1]
    assert y.requires_grad


def test_what_has_no_gradients_is_refused():
    inputs = random_inputs(1, 4, 8, 2)
    u = inputs.u.clone().requires_grad_()
    with pytest.raises(UsageError, match="no gradients of all states"):
        scan_states(replace(inputs, u=u), backend="cpu")
    assert scan_states(replace(inputs, u=u)).requires_grad  # auto: the reference has them
    y, _ = selective_scan(replace(inputs, u=u), backend="cpu")
    (first,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
