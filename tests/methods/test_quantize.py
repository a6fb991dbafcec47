"""Weights in few bits: grids against all grids there are, GPTQ against Optimal Brain Surgeon a column at a time."""

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.quantize.awq import awq, best_scales
from ssmc.compressor.methods.quantize.descent import Descent
from ssmc.compressor.methods.quantize.gptq import gptq, swept, visiting_orders
from ssmc.compressor.methods.quantize.grid import DIGITS, digits_for, fit_grid, spanning_grid
from ssmc.compressor.methods.weights.sparsegpt import relative_error
from ssmc.compressor.methods.weights.sweep import DAMPING
from ssmc.compressor.options.quantization import group_for
from ssmc.runtime.errors import CalibrationError, CheckpointError
from ssmc.runtime.quantized import FILE, GridShape, read_quantized, write_quantized

OUT, IN, GROUP = 6, 32, 16
SHAPES = [GridShape(4, GROUP), GridShape(4, GROUP, symmetric=False), GridShape(8, GROUP)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", name="W")
def weight():
    W = random(OUT, IN, seed=3)
    W[2, 5:9] = 0
    return W


@pytest.fixture(scope="module", name="H")
def hessian():
    """Of correlated inputs of unequal size, as activations are."""
    x = random(200, IN, seed=1) @ (random(IN, IN, seed=2) + 2 * torch.eye(IN))
    return (x.t() @ x).double()


def naive(W, grid, H, order, damping=0.01):
    """GPTQ from its definition: round one input, refit all inputs that are not rounded yet by least squares."""
    H = (H + damping * H.diagonal().mean() * torch.eye(IN, dtype=H.dtype)).numpy()
    now, scale, zero = W.double().numpy().copy(), grid.scale.double().numpy(), grid.zero.double().numpy()
    kept = now != 0
    for place, j in enumerate(order):
        group, rest = j // grid.shape.group, order[place + 1 :]
        codes = np.round(now[:, j] / scale[:, group] + zero[:, group]).clip(grid.shape.lowest, grid.shape.highest)
        rounded = np.where(kept[:, j], scale[:, group] * (codes - zero[:, group]), 0)
        change = rounded - now[:, j]
        if len(rest):
            now[:, rest] -= np.outer(change, np.linalg.solve(H[np.ix_(rest, rest)], H[rest, j]))
        now[:, j] = rounded
    return torch.from_numpy(now)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_sweep_is_optimal_brain_surgery_in_its_order(W, H, shape):
    grid = fit_grid(W, shape, H.diagonal())
    orders = visiting_orders(H.diagonal())
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert orders[0].tolist() == H.diagonal().argsort(descending=True).tolist()
    for order in orders:
        found = swept(W, H, grid, order, DAMPING)
        torch.testing.assert_close(found.double(), naive(W, grid, H, order.tolist()), rtol=1e-5, atol=1e-6)


def damped(H):
    """H in the units of its mean diagonal, with what GPTQ adds."""
    H = H / H.diagonal().mean()
    return H + DAMPING * torch.eye(IN, dtype=H.dtype)


def errors_of(W, numbers, H):
    change = W.double() - numbers.double()
    return torch.einsum("oi,ij,oj->o", change, damped(H), change)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_four_bits_of_every_output_are_better_than_in_any_order(W, H, shape):
    grid = fit_grid(W, shape, H.diagonal())
    least = torch.stack([errors_of(W, swept(W, H, grid, o, DAMPING), H) for o in visiting_orders(H.diagonal())]).amin(0)
    now = errors_of(W, gptq(W, H, shape).weight(), H)
    assert (now <= least * (1 + 1e-5)).all()
    assert now.sum() < 0.97 * least.sum()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_scales_are_those_of_least_squares(W, H, shape):
    grid = fit_grid(W, shape, H.diagonal())
    codes = grid.codes(W)
    found = Descent(W, H, DAMPING).best_scales(grid, codes)
    root = torch.linalg.cholesky(damped(H)).t().numpy()  # root' root = H
    for row in range(OUT):
        steps = (codes[row] - grid.zero[row].repeat_interleave(GROUP)).double().numpy()
        columns = np.zeros((IN, IN // GROUP))
        for i in range(IN):
            columns[i, i // GROUP] = steps[i]
        wanted = np.linalg.lstsq(root @ columns, root @ W[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row], wanted, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_codes_descend_until_no_single_one_can_be_better(W, H, shape):
    grid, descent = fit_grid(W, shape, H.diagonal()), Descent(W, H, DAMPING)
    codes = grid.codes(W)
    first = errors_of(W, grid.numbers(codes), H)
    for _ in range(20):
        codes = descent.best_codes(grid, codes)
    least = errors_of(W, grid.numbers(codes), H)
    assert (least <= first).all()
    assert least.sum() < 0.9 * first.sum()
    for i in range(IN):
        for step in (-1, 1):
            other = codes.clone()
            other[:, i] = (other[:, i] + step).clamp(shape.lowest, shape.highest)
            other[W == 0] = codes[W == 0]
            assert (errors_of(W, grid.numbers(other), H) >= least * (1 - 1e-5)).all()


def test_a_group_that_was_pruned_keeps_its_scale(W, H):
    empty = W.clone()
    empty[1, :GROUP] = 0
    shape = SHAPES[0]
    quantized = gptq(empty, H, shape)
    assert torch.equal(quantized.weight()[1, :GROUP], torch.zeros(GROUP))
    assert quantized.scale.isfinite().all()
    assert (quantized.scale != 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gptq_loses_less_than_rounding_and_keeps_zeros(W, H, shape):
    before = W.clone()
    quantized, rounded = gptq(W, H, shape), spanning_grid(W, shape).quantized(W)
    assert relative_error(W, quantized.weight(), H) < 0.8 * relative_error(W, rounded.weight(), H)
    assert torch.equal(quantized.weight()[W == 0], torch.zeros(4))
    assert torch.equal(W, before)
    codes = quantized.codes.int()
    assert codes.min() >= shape.lowest
    assert codes.max() <= shape.highest


def test_an_input_that_is_never_there_is_rounded_to_nearest(W, H):
    dead = H.clone()
    dead[7], dead[:, 7] = 0, 0
    shape = GridShape(8, GROUP)
    moved = (gptq(W, dead, shape).weight() - W)[:, 7].abs()
    assert moved.max() < 0.6 * fit_grid(W, shape, dead.diagonal()).scale[:, 0].max()


def test_what_overflows_is_refused(W, H):
    with pytest.raises(CalibrationError, match="overflow"):
        gptq(W, H * torch.inf, SHAPES[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_to_the_nearest_number_of_the_grid(W, shape):
    grid = spanning_grid(W, shape)
    codes = torch.arange(shape.lowest, shape.highest + 1).float()
    numbers = grid.scale[..., None] * (codes - grid.zero[..., None])  # (out, groups, codes)
    every = numbers.repeat_interleave(GROUP, 1)
    nearest = every.gather(2, (every - W[..., None]).abs().argmin(2, keepdim=True))[..., 0]
    torch.testing.assert_close(grid.quantized(W).weight(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(grid.scale, grid.scale.half().float())
    assert (W - nearest).abs().max() <= 0.51 * grid.scale.max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scale_times_code_is_exact_in_the_stored_type(W, H, shape, dtype):
    weight = gptq(W / 50, H, shape, digits_for(dtype, shape)).weight()
    assert torch.equal(weight.to(dtype).float(), weight)


def test_a_fitted_grid_is_no_worse_than_any_smaller_range(W):
    counts, shape = torch.linspace(0.5, 2, IN), GridShape(4, IN)

    def errors(grid):
        return ((grid.quantized(W).weight() - W).square() * counts).sum(1)

    best = errors(fit_grid(W, shape, counts))
    for part in (1.0, 0.9, 0.8, 0.7, 0.5):
        assert (best <= errors(spanning_grid(W * part, shape)) + 1e-6).all()
    assert (best < errors(spanning_grid(W, shape))).any()


def test_the_lowest_code_goes_to_the_larger_end():
    for sign in (1.0, -1.0):
        W = sign * torch.cat([torch.tensor([8.0]), torch.arange(-7.0, 8.0)])[None]
        grid = fit_grid(W, GridShape(4, GROUP), torch.ones(GROUP))
        assert grid.quantized(W).codes[0, 0] == -8
        torch.testing.assert_close(grid.quantized(W).weight(), W, rtol=5e-3, atol=0)


def test_scaled_inputs_lose_less(H):
    unequal = torch.linspace(0, 3, IN).exp().double()
    W, H = random(OUT, IN, seed=4), H * unequal[:, None] * unequal
    shape = GridShape(4, IN)
    scales = best_scales(W, H, shape, DIGITS)
    scaled = awq(W * scales, H / (scales[:, None] * scales).double(), shape).weight() / scales
    assert relative_error(W, scaled, H) < 0.9 * relative_error(W, awq(W, H, shape).weight(), H)


@pytest.mark.parametrize(
    ("inputs", "asked", "group"), [(256, 128, 128), (192, 128, 64), (48, 128, 16), (24, 128, None)]
)
def test_groups_divide_the_inputs(inputs, asked, group):
    assert group_for(inputs, asked) == group


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_on_disk_are_those_in_memory(tmp_path, W, shape):
    weight, other = (spanning_grid(w, shape).quantized(w) for w in (W, -W))
    write_quantized(tmp_path, {"a.weight": other, "b.weight": weight})
    first = (tmp_path / FILE).read_bytes()
    read = read_quantized(tmp_path)["b.weight"]
    assert read.shape == shape
    assert torch.equal(read.weight(), weight.weight())
    write_quantized(tmp_path, {"b.weight": weight, "a.weight": other})
    assert (tmp_path / FILE).read_bytes() == first
    (tmp_path / FILE).write_bytes(first[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        read_quantized(tmp_path)
