"""The selective scan against a naive loop written from the formula, in float64 and independent of ssmc's code."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssmc.runtime import scan
from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan import ScanInputs, scan_states, selective_scan

KERNELS = ["cpu", "reference"]


def random_inputs(batch: int, length: int, d_inner: int, d_state: int, seed: int = 0, gated: bool = True) -> ScanInputs:
    """Inputs with the strides of a real layer: z, B and C are slices of wider projections."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    projected = normal(batch, length, 2 * d_inner)
    low_rank = normal(batch, length, 3 + 2 * d_state)
    return ScanInputs(
        u=normal(batch, length, d_inner),
        dt=torch.exp(1.5 * normal(batch, length, d_inner) - 2),
        A=-torch.exp(normal(d_inner, d_state)),
        B=low_rank[..., 3 : 3 + d_state],
        C=low_rank[..., 3 + d_state :],
        D=normal(d_inner),
        z=projected[..., d_inner:] if gated else None,
    )


def random_state(inputs: ScanInputs) -> torch.Tensor:
    shape = (inputs.batch, inputs.d_inner, inputs.d_state)
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


def naive(inputs: ScanInputs, state: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence for each sequence, token and channel, float64: y (B, L, D), all states (B, L + 1, N, D)."""
    u, dt, A, B, C, D = (getattr(inputs, name).double().numpy() for name in ("u", "dt", "A", "B", "C", "D"))
    z = None if inputs.z is None else inputs.z.double().numpy()
    batch, length, d_inner = u.shape
    y = np.empty(u.shape)
    states = np.empty((batch, length + 1, A.shape[1], d_inner))
    for b in range(batch):
        for d in range(d_inner):
            h = np.zeros(A.shape[1]) if state is None else state[b, d].double().numpy()
            states[b, 0, :, d] = h
            for t in range(length):
                h = np.exp(dt[b, t, d] * A[d]) * h + dt[b, t, d] * B[b, t] * u[b, t, d]
                states[b, t + 1, :, d] = h
                y[b, t, d] = h @ C[b, t] + D[d] * u[b, t, d]
                if z is not None:
                    y[b, t, d] *= z[b, t, d] / (1 + np.exp(-z[b, t, d]))
    return y, states


def difference(got: torch.Tensor, wanted: np.ndarray | torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("d_state", [1, 4, 5, 8, 16, 64])
@pytest.mark.parametrize(("batch", "length", "d_inner"), [(3, 37, 45), (1, 1, 33), (2, 1, 64), (1, 66, 7)])
def test_equals_the_formula(backend, batch, length, d_inner, d_state):
    inputs = random_inputs(batch, length, d_inner, d_state)
    state = random_state(inputs)
    y, states = naive(inputs, state)
    got_y, got_state = selective_scan(inputs, state, backend)
    assert difference(got_y, y) < 1e-6
    assert difference(got_state.transpose(1, 2), states[:, -1]) < 1e-6
    assert difference(scan_states(inputs, state, backend), states) < 1e-6


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("length", [1, 9])
def test_zero_state_and_no_gate(backend, length):
    inputs = random_inputs(2, length, 20, 16, gated=False)
    y, states = naive(inputs)
    got_y, got_state = selective_scan(inputs, backend=backend)
    assert difference(got_y, y) < 1e-6
    assert difference(got_state.transpose(1, 2), states[:, -1]) < 1e-6
    assert difference(scan_states(inputs, backend=backend), states) < 1e-6


def test_the_largest_state_and_several_shares_of_work():
    inputs = random_inputs(2, 33, 200, 256)  # enough work for more than one thread
    y, state = selective_scan(inputs, backend="cpu")
    wanted_y, wanted_state = selective_scan(inputs, backend="reference")
    assert difference(y, wanted_y) < 2e-6
    assert difference(state, wanted_state) < 2e-6


@pytest.mark.parametrize("length", [1, 40])
def test_any_strides_will_do(length):
    inputs = random_inputs(2, length, 40, 16)
    y, states = naive(inputs)
    names = ("u", "dt", "B", "C", "z")
    channels_first = {n: getattr(inputs, n).transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    odd = replace(inputs, A=inputs.A.t().contiguous().t(), D=inputs.D.repeat_interleave(2)[::2], **channels_first)
    assert not odd.A.is_contiguous()
    got, end = selective_scan(odd, torch.zeros(2, 16, 40).transpose(1, 2), "cpu")
    assert difference(got, y) < 1e-6
    assert difference(end.transpose(1, 2), states[:, -1]) < 1e-6
    shared = replace(inputs, B=inputs.B[:1].expand(2, -1, -1))
    assert difference(selective_scan(shared, backend="cpu")[0], naive(shared)[0]) < 1e-6


def tokens(inputs: ScanInputs, part: slice) -> ScanInputs:
    pieces = {name: getattr(inputs, name)[:, part] for name in ("u", "dt", "B", "C", "z")}
    return replace(inputs, **pieces)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("at", [0, 1, 2, 31, 32, 33, 49, 50])
def test_a_split_anywhere_equals_the_whole(backend, at):
    inputs = random_inputs(2, 50, 40, 16)
    whole, end = selective_scan(inputs, backend=backend)
    first, middle = selective_scan(tokens(inputs, slice(0, at)), backend=backend)
    kept = middle.clone()
    second, last = selective_scan(tokens(inputs, slice(at, None)), middle, backend)
    assert torch.equal(middle, kept), "the state given was modified"
    assert difference(torch.cat([first, second], dim=1), whole) < 1e-6
    assert difference(last, end) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 40])
def test_half_inputs_are_computed_in_float32(dtype, length):
    inputs = random_inputs(2, length, 40, 16)
    half = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "B", "C", "D", "z")})
    y, states = naive(half)
    got, state = selective_scan(half, backend="cpu")
    assert got.dtype == dtype
    assert state.dtype == torch.float32
    assert difference(state.transpose(1, 2), states[:, -1]) < 1e-6
    # the only rounding to half precision is that of the result
    assert difference(got.float(), torch.from_numpy(y).to(dtype).float()) < torch.finfo(dtype).eps
    assert difference(scan_states(half, backend="cpu"), states) < 1e-6


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "z"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_go_where_the_formula_sends_them(name, value, length):
    if name in ("dt", "A") and value == (float("-inf") if name == "dt" else float("inf")):
        pytest.skip("dt is positive, A negative")
    inputs = random_inputs(2, length, 40, 8)
    tensor = getattr(inputs, name).clone()
    tensor[(7, 3) if name == "A" else (1, length // 2, 3)] = value
    spoiled = replace(inputs, **{name: tensor})
    state = random_state(inputs)
    with np.errstate(all="ignore"):
        y, states = naive(spoiled, state)
    got, end = selective_scan(spoiled, state, "cpu")
    assert not np.isfinite(y).all() or name == "A"  # a state that forgets everything at once is finite
    agree_where_finite(got, y, value)
    agree_where_finite(end.transpose(1, 2), states[:, -1], value)
    agree_where_finite(scan_states(spoiled, state, "cpu"), states, value)


def agree_where_finite(got: torch.Tensor, wanted: np.ndarray, value: float) -> None:
    """NaN stays NaN; an infinite state may become NaN where float32 rounds its decay to zero and float64 does not."""
    got = got.numpy()
    spoiled = np.isnan if np.isnan(value) else lambda x: ~np.isfinite(x)
    np.testing.assert_array_equal(spoiled(got), spoiled(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(got[finite], wanted[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 40])
def test_extreme_steps_forget_or_keep_cleanly(length):
    inputs = random_inputs(1, length, 48, 16)
    steps = torch.tensor([0.0, 1e-30, 1e-8, 1.0, 80.0, 127.0, 1e4, 1e30]).repeat(6)
    inputs = replace(
        inputs,
        dt=steps.expand(1, length, 48),
        u=inputs.u / steps.clamp(min=1),
        A=-torch.logspace(-6, 4, 16).expand(48, 16),
    )
    state = random_state(inputs)
    y, states = naive(inputs, state)
    got, end = selective_scan(inputs, state, "cpu")
    assert difference(got, y) < 1e-5
    np.testing.assert_allclose(end.transpose(1, 2).numpy(), states[:, -1], rtol=2e-4, atol=1e-6)


def test_a_slowly_decaying_state_does_not_drift():
    length = 4000
    inputs = random_inputs(1, length, 32, 1)
    inputs = replace(inputs, dt=torch.full((1, length, 32), 1e-3), A=torch.full((32, 1), -0.02), u=inputs.u * 0)
    _, end = selective_scan(inputs, torch.ones(1, 32, 1), "cpu")
    decay = np.exp(np.float64(np.float32(1e-3)) * np.float64(np.float32(-0.02)) * length)
    # the float32 factor itself is off by up to 2^-25 per step, whatever exp computes it; a biased exp adds to that
    assert abs(end.numpy() / decay - 1).max() < length * 2**-25


def test_the_result_does_not_depend_on_the_number_of_threads():
    inputs = random_inputs(2, 200, 130, 16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(selective_scan(inputs, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for y, state in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(state, results[0][1])


def test_several_threads_may_scan_at_once():
    inputs = [random_inputs(1, 150, 256, 16, seed) for seed in range(4)]
    wanted = [selective_scan(i, backend="reference")[0] for i in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, y in zip(pool.map(lambda i: selective_scan(i, backend="cpu")[0], inputs), wanted, strict=True):
                assert difference(got, y) < 1e-5


def test_auto_gives_gradients_and_they_are_those_of_the_formula():
    inputs = random_inputs(1, 3, 4, 2)
    names = ("u", "dt", "A", "B", "C", "D", "z")

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return selective_scan(ScanInputs(**dict(zip(names, tensors, strict=True))))[0].square().sum()

    tensors = [getattr(inputs, name).clone().requires_grad_() for name in names]
    gradients = torch.autograd.grad(loss(*tensors), tensors)
    generator = torch.Generator().manual_seed(1)
    for position, gradient in enumerate(gradients):
        with torch.no_grad():
            direction = torch.randn(gradient.shape, generator=generator)
            ends = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in tensors]
                moved[position] += sign * 1e-3 * direction
                named = ScanInputs(**dict(zip(names, moved, strict=True)))
                ends.append((naive(named)[0] ** 2).sum())
            slope = (ends[0] - ends[1]) / 2e-3
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-3, abs=1e-3), names[position]


def test_auto_uses_the_kernel_without_gradients(monkeypatch):
    inputs = random_inputs(1, 4, 8, 2)
    calls = []
    kernels = scan._kernels("cpu")
    real = kernels.selective_scan
    monkeypatch.setattr(kernels, "selective_scan", lambda *a: calls.append(1) or real(*a))
    selective_scan(inputs)
    assert calls == [1]
    selective_scan(replace(inputs, u=inputs.u.clone().requires_grad_()))
    assert calls == [1]
    with torch.no_grad():
        selective_scan(replace(inputs, D=torch.nn.Parameter(inputs.D)))
    assert calls == [1, 1]


def test_without_numba_auto_falls_back_and_cpu_says_so(monkeypatch):
    inputs = random_inputs(1, 4, 8, 2)
    wanted = naive(inputs)[0]
    monkeypatch.setitem(sys.modules, "numba", None)  # makes `import numba` fail
    for name in ("cpu", "kernels"):
        monkeypatch.delitem(sys.modules, f"ssmc.runtime.scan.{name}", raising=False)
        monkeypatch.delattr(scan, name, raising=False)
    scan._kernels.cache_clear()
    try:
        assert difference(selective_scan(inputs)[0], wanted) < 1e-6
        with pytest.raises(UsageError, match="numba cannot be imported"):
            selective_scan(inputs, backend="cpu")
    finally:
        scan._kernels.cache_clear()


def test_what_the_kernel_cannot_do_is_refused():
    inputs = random_inputs(1, 4, 8, 2)
    with pytest.raises(UsageError, match="no scan backend 'cuda'"):
        selective_scan(inputs, backend="cuda")
    with pytest.raises(UsageError, match="not in CPU memory"):
        selective_scan(replace(inputs, u=inputs.u.to("meta")), backend="cpu")


@pytest.mark.parametrize("name", ["dt", "z", "A", "B", "C", "D"])
def test_shapes_that_do_not_belong_together_are_refused(name):
    inputs = random_inputs(2, 4, 8, 3)
    tensor = getattr(inputs, name)
    with pytest.raises(ValueError, match=rf"\b{name} must be"):
        selective_scan(replace(inputs, **{name: tensor[..., :-1]} if name != "A" else {"A": tensor[:-1]}))
    with pytest.raises(ValueError, match="state must be"):
        selective_scan(inputs, torch.zeros(2, 3, 8))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("shape", [(1, 0, 5, 4), (0, 3, 5, 4)])
def test_empty_inputs_keep_the_state(shape, backend):
    inputs = random_inputs(*shape)
    state = random_state(inputs)
    y, end = selective_scan(inputs, state, backend)
    assert y.shape == inputs.u.shape
    assert torch.equal(end, state)
    assert scan_states(inputs, state, backend).shape == (shape[0], shape[1] + 1, shape[3], shape[2])
