"""The Triton kernels against a naive loop written from the formula: on a GPU, or through Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssmc.runtime.scan import ScanInputs

from .test_scan import difference, naive, random_inputs, random_state, tokens

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
gpu = pytest.importorskip("ssmc.runtime.scan.gpu")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORT_CHUNKS = gpu.Plan(block=64, warps=1, tokens=2, chunk=8)


def moved(inputs: ScanInputs, **changes: torch.Tensor | None) -> ScanInputs:
    """The inputs on the device of the kernels, some replaced."""
    tensors = {name: t if t is None else t.to(DEVICE) for name, t in (vars(inputs) | changes).items()}
    return ScanInputs(**tensors)


def scanned(inputs: ScanInputs, state: torch.Tensor | None = None, plan: gpu.Plan | None = SHORT_CHUNKS):
    """Output and final state on the CPU, as the kernels compute them."""
    state = None if state is None else state.to(DEVICE)
    return [t.cpu() for t in gpu.selective_scan(moved(inputs), state, plan)]


@pytest.mark.parametrize("d_state", [1, 4, 5, 8, 12, 16, 64])
def test_equals_the_formula(d_state):
    inputs = random_inputs(2, 17, 37, d_state)
    state = random_state(inputs)
    y, states = naive(inputs, state)
    got, final = scanned(inputs, state)
    assert difference(got, y) < 1e-6
    assert difference(final.transpose(1, 2), states[:, -1]) < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 8, 65])
@pytest.mark.parametrize("plan", [None, gpu.Plan(32, 1, 4, 16)], ids=["default", "short-chunks"])
def test_any_length_and_several_blocks_of_channels(length, plan):
    inputs = random_inputs(1, length, 70 if length < 8 else 33, 5, gated=False)
    y, states = naive(inputs)
    got, final = scanned(inputs, plan=plan)
    assert difference(got, y) < 1e-6
    assert difference(final.transpose(1, 2), states[:, -1]) < 1e-6


@pytest.mark.parametrize("d_inner", [64, 70])  # a whole block of channels, or not
def test_softplus_and_bias_in_the_kernel_equal_those_outside(d_inner):
    inputs = random_inputs(1, 9, d_inner, 4)
    raw = 6 * torch.randn(inputs.dt.shape, generator=torch.Generator().manual_seed(2)) - 4  # small and large steps
    bias = torch.linspace(-3, 3, d_inner)
    fused = replace(inputs, dt=raw, dt_bias=bias)
    y, states = naive(replace(inputs, dt=torch.log1p(torch.exp((raw + bias).double()))))
    got, final = scanned(fused)
    assert difference(got, y) < 1e-6
    assert difference(final.transpose(1, 2), states[:, -1]) < 1e-6
    small = replace(fused, u=torch.ones_like(inputs.u), B=torch.ones_like(inputs.B), dt=raw.fill_(-12))
    steps = naive(replace(small, dt=torch.log1p(torch.exp((raw + bias).double()))))[1][:, 1]
    first = scanned(tokens(small, slice(0, 1)))[1].transpose(1, 2)
    assert (first.double() / torch.from_numpy(steps) - 1).abs().max() < 1e-6, "small steps are not accurate"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    inputs = random_inputs(2, 9, 40, 12)
    half = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("u", "B", "C", "D", "z")})
    y, states = naive(half)
    got, final = scanned(half)
    assert got.dtype == dtype
    assert final.dtype == torch.float32
    assert difference(final.transpose(1, 2), states[:, -1]) < 1e-6
    # the only rounding to half precision is that of the result
    assert difference(got.float(), torch.from_numpy(y).to(dtype).float()) < torch.finfo(dtype).eps


def test_pieces_equal_the_whole_and_leave_the_state_given_alone():
    inputs = random_inputs(3, 13, 20, 4)
    whole, end = scanned(inputs)
    first, middle = scanned(tokens(inputs, slice(0, 5)))
    state = middle.to(DEVICE)
    second, last = gpu.selective_scan(moved(tokens(inputs, slice(5, None))), state, SHORT_CHUNKS)
    assert torch.equal(state.cpu(), middle)
    assert difference(torch.cat([first, second.cpu()], dim=1), whole) < 1e-6
    assert difference(last.cpu(), end) < 1e-6


def test_any_strides_will_do():
    inputs = random_inputs(2, 5, 40, 8)
    y, states = naive(inputs)
    names = ("u", "dt", "B", "C", "z")
    channels_first = {n: getattr(inputs, n).transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    odd = replace(inputs, A=inputs.A.t().contiguous().t(), D=inputs.D.repeat_interleave(2)[::2], **channels_first)
    got, end = scanned(odd, torch.zeros(2, 8, 40).transpose(1, 2))
    assert difference(got, y) < 1e-6
    assert difference(end.transpose(1, 2), states[:, -1]) < 1e-6
    shared = replace(inputs, B=inputs.B[:1].expand(2, -1, -1))
    assert difference(scanned(shared)[0], naive(shared)[0]) < 1e-6


@pytest.mark.parametrize("plan", [gpu.Plan(64, 1, 2, 8), gpu.Plan(64, 1, 2, 64)])
def test_all_states(plan):
    inputs = random_inputs(2, 11, 37, 5)
    state = random_state(inputs)
    got = gpu.scan_states(moved(inputs), state.to(DEVICE), plan).cpu()
    assert difference(got, naive(inputs, state)[1]) < 1e-6


@pytest.mark.parametrize("states", [*range(1, 20), 64, 100, 256])
def test_states_are_cut_into_powers_of_two_without_padding(states):
    parts = gpu.parts_of(states)
    assert sum(parts) == states
    assert all(part & (part - 1) == 0 for part in parts)
    assert sorted(set(parts), reverse=True) == list(parts)


def test_a_full_gpu_gets_one_pass_and_an_empty_one_many_chunks():
    def chunks(batch: int, length: int) -> int:
        shape = torch.empty(batch, length, 5120, device="meta")
        inputs = ScanInputs(shape, shape, torch.empty(5120, 16, device="meta"), *(shape[..., :16],) * 2, shape[0, 0])
        plan = gpu.plan_for(inputs, multiprocessors=132)
        assert plan.chunk % plan.tokens == 0
        return -(-length // plan.chunk)

    assert chunks(1, 2048) == 14
    assert chunks(4, 2048) == 4
    assert chunks(8, 2048) == 1
    assert chunks(1, 16) == 1
