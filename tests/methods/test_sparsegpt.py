"""SparseGPT against Optimal Brain Surgeon a weight at a time, and against exact least squares."""

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.weights.second_moments import SecondMoment, StateMoment
from ssmc.compressor.methods.weights.sparsegpt import (
    BLOCK,
    DAMPING,
    MaskRule,
    default_span,
    prune_by_rule,
    relative_error,
    sparsegpt,
    sparsegpt_a_log,
)
from ssmc.compressor.methods.weights.wanda import magnitude, wanda
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.errors import CalibrationError, UsageError

OUT, IN, TOKENS = 6, 16, 80


def sparsegpt_with_mask(weight, hessian, mask, block=BLOCK, damping=DAMPING):
    """Only the update of the weights that stay, for a mask (out, in) chosen elsewhere, True where kept."""
    rule = MaskRule(block, lambda losses, start: mask[:, start : start + losses.shape[1]])
    return prune_by_rule(weight, hessian, rule, block, damping)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def x():
    """Correlated inputs of unequal size, as activations are."""
    return random(TOKENS, IN, seed=1) @ (random(IN, IN, seed=2) + 2 * torch.eye(IN, dtype=torch.float64))


@pytest.fixture(scope="module", name="H")
def hessian(x):
    return x.t() @ x


@pytest.fixture(scope="module", name="W")
def weight():
    return random(OUT, IN, seed=3)


def surgeon(W, H, choose, span, damping=DAMPING):
    """OBS weight by weight; `choose(losses, start)` gets the losses (out, span) and says which entries stay."""
    W, H = W.numpy().copy(), H.numpy()
    H = H + damping * np.diag(H).mean() * np.eye(len(H))
    kept = np.ones(W.shape, dtype=bool)
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(len(H))]
    for j in range(len(H)):
        if j % span == 0:
            group = range(j, min(j + span, len(H)))
            losses = np.stack([W[:, c] ** 2 / inverses[c][0, 0] for c in group], axis=1)
            kept[:, j : j + span] = choose(losses, j)
        for row in range(len(W)):
            if not kept[row, j]:
                W[row, j:] -= W[row, j] / inverses[j][0, 0] * inverses[j][0]
                W[row, j] = 0
    return W, kept


def least_squares(W, x, kept):
    """The best weights with zeros outside `kept`, row by row."""
    x, best = x.numpy(), np.zeros(W.shape)
    for row, (w, keep) in enumerate(zip(W.numpy(), np.asarray(kept), strict=True)):
        best[row, keep] = np.linalg.lstsq(x[:, keep], x @ w, rcond=None)[0]
    return torch.from_numpy(best)


def random_mask(seed=5):
    return random(OUT, IN, seed=seed) > 0


@pytest.mark.parametrize("block", [1, 3, 128])
def test_with_a_given_mask_it_is_obs_weight_by_weight(W, H, block):
    mask = random_mask()
    expected, _ = surgeon(W, H, lambda losses, start: mask[:, start : start + 1], span=1)
    result = sparsegpt_with_mask(W, H, mask, block=block)
    np.testing.assert_allclose(result.weight, expected, atol=1e-10)
    assert torch.equal(result.mask, mask)


@pytest.mark.parametrize("span", [1, 5, 8, 16, 128])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_unstructured_chooses_by_obs_loss_span_by_span(W, H, span, block):
    def lowest_go(losses, start):
        done, then = (round(0.4 * OUT * IN) * c // IN for c in (start, start + losses.shape[1]))
        kept = np.ones(losses.size, dtype=bool)
        kept[np.argsort(losses.ravel())[: then - done]] = False
        return kept.reshape(losses.shape)

    expected, kept = surgeon(W, H, lowest_go, span=span)
    result = sparsegpt(W, H, 0.4, span=span, block=block)
    np.testing.assert_array_equal(result.mask, kept)
    np.testing.assert_allclose(result.weight, expected, atol=1e-10)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("block", [3, 8, 10, 128])  # also those that are not whole groups
def test_nm_chooses_each_group_by_obs_loss_when_reached(W, H, n, m, block):
    def highest_stay(losses, start):
        kept = np.zeros(losses.shape, dtype=bool)
        np.put_along_axis(kept, np.argsort(losses, axis=1)[:, -n:], True, axis=1)
        return kept

    expected, kept = surgeon(W, H, highest_stay, span=m)
    result = sparsegpt(W, H, NM(n, m), block=block)
    np.testing.assert_array_equal(result.mask, kept)
    np.testing.assert_allclose(result.weight, expected, atol=1e-10)
    assert (result.mask.view(OUT, -1, m).sum(-1) == n).all()


def test_it_is_exact_where_greed_loses_nothing(W, x, H):
    # all that goes lies left of all that stays, row by row: no weight is fixed too early
    lost = torch.tensor([0, 1, 5, 8, 15, 16])
    mask = torch.arange(IN) >= lost[:, None]
    result = sparsegpt_with_mask(W, H, mask, damping=1e-9)
    np.testing.assert_allclose(result.weight, least_squares(W, x, mask), atol=1e-5)


def test_what_lies_left_of_the_pruned_column_stays_as_it_is(W, H):
    mask = torch.ones(OUT, IN, dtype=torch.bool)
    mask[:, -2] = False
    result = sparsegpt_with_mask(W, H, mask)
    assert torch.equal(result.weight[:, :-2], W[:, :-2])
    H = H + DAMPING * H.diagonal().mean() * torch.eye(IN, dtype=H.dtype)
    moved = W[:, -1] + W[:, -2] * H[-2, -1] / H[-1, -1]  # least squares over the one column left
    torch.testing.assert_close(result.weight[:, -1], moved)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, NM(2, 4), NM(4, 8)])
def test_its_error_lies_between_the_best_possible_and_that_without_an_update(W, x, H, target):
    result = sparsegpt(W, H, target, span=4, damping=1e-9)
    best = relative_error(W, least_squares(W, x, result.mask), H)
    without = relative_error(W, W * result.mask, H)
    assert best * (1 - 1e-9) < result.error < 0.7 * without
    assert result.error < relative_error(W, W * magnitude(W, target), H)
    assert result.error < relative_error(W, W * wanda(W, H.diagonal(), target), H)


def test_the_error_is_that_of_the_outputs(W, x, H):
    result = sparsegpt(W, H, 0.5)
    change, dense = x @ (result.weight - W).t(), x @ W.t()
    assert result.error == pytest.approx(float(change.square().sum() / dense.square().sum()))


@pytest.mark.parametrize("shape", [(6, 16), (1, 16), (7, 5), (3, 1)])
@pytest.mark.parametrize("span", [None, 3, 4, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.333, 0.5, 0.777, 0.99])
def test_the_whole_matrix_loses_exactly_what_was_asked(shape, span, sparsity):
    W, x = random(*shape, seed=7), random(30, shape[1], seed=8)
    result = sparsegpt(W, x.t() @ x, sparsity, span=span)
    assert int((~result.mask).sum()) == round(sparsity * W.numel())
    assert not result.weight[~result.mask].any()
    assert result.weight[result.mask].all()


def test_nothing_pruned_nothing_changed(W, H):
    result = sparsegpt(W, H, 0.0)
    assert torch.equal(result.weight, W)
    assert result.error == 0.0


@pytest.mark.parametrize("span", [1, 4, 128])
def test_dead_inputs_become_zero_go_first_and_disturb_nobody(W, x, span):
    dead, live = [0, 9], [j for j in range(IN) if j not in (0, 9)]
    silenced = x.clone()
    silenced[:, dead] = 0
    H = silenced.t() @ silenced
    result = sparsegpt(W, H, 0.5, span=span)
    assert not result.mask[:, dead].any()
    assert not result.weight[:, dead].any()
    assert int((~result.mask).sum()) == W.numel() // 2
    alone = sparsegpt_with_mask(W[:, live], H[live][:, live], result.mask[:, live])
    torch.testing.assert_close(result.weight[:, live], alone.weight)
    assert result.error == pytest.approx(alone.error)


def test_more_dead_weights_than_the_mask_takes(W, x):
    silenced = x.clone()
    silenced[:, 4:] = 0
    result = sparsegpt(W, silenced.t() @ silenced, 0.25)
    assert int((~result.mask).sum()) == W.numel() // 4
    assert not result.weight[:, 4:].any()
    assert torch.equal(result.weight[:, :4], W[:, :4])


def test_a_layer_that_hears_nothing(W):
    result = sparsegpt(W, torch.zeros(IN, IN), 0.5)
    assert not result.weight.any()
    assert result.error == 0.0
    assert int((~result.mask).sum()) == W.numel() // 2


def test_singular_hessian_is_damped_more_until_it_factors(W):
    x = random(5, IN, seed=9)  # fewer tokens than inputs
    result = sparsegpt(W, x.t() @ x, 0.5, damping=0.0)
    assert result.damping > 0
    assert result.weight.isfinite().all()
    assert result.error < relative_error(W, W * result.mask, x.t() @ x)
    assert sparsegpt(W, x.t() @ x, 0.5).damping == DAMPING  # the usual damping is enough at once


def test_retries_go_up_tenfold(W):
    H = torch.eye(IN, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05  # smallest eigenvalue -0.05
    assert sparsegpt(W, H, 0.5).damping == pytest.approx(0.1)
    H[0, 1] = H[1, 0] = 1.5
    assert sparsegpt(W, H, 0.5).damping == pytest.approx(1.0)


def test_pivots_that_are_only_rounding_count_as_a_failure(W):
    H = torch.eye(IN, dtype=torch.float64)
    H[3, 3] = 1e-14  # factors, but float64 sums of products are not that exact
    assert sparsegpt(W, H, 0.5, damping=0.0).damping == pytest.approx(1e-6)


def test_wide_layers_are_inverted_by_halves_alike():
    x, W = random(900, 600, seed=14), random(3, 600, seed=15)
    H = x.t() @ x
    mask = torch.arange(600) >= 300  # a prefix goes, so least squares is the answer
    result = sparsegpt_with_mask(W, H, mask.expand(3, -1), damping=0.0)
    assert result.damping == 0.0
    np.testing.assert_allclose(result.weight, least_squares(W, x, mask.expand(3, -1)), atol=1e-8)


def test_twin_inputs_take_over_from_one_another(W, x):
    twins = torch.cat([x, x], dim=1)  # singular, and half of it is superfluous
    mask = torch.arange(2 * IN) >= IN
    result = sparsegpt_with_mask(torch.cat([W, W], 1), twins.t() @ twins, mask.expand(OUT, -1), damping=1e-9)
    torch.testing.assert_close(result.weight[:, IN:], 2 * W, rtol=0, atol=1e-2)
    assert result.error < 1e-9


@pytest.mark.parametrize("H", [torch.full((IN, IN), torch.nan), torch.diag(torch.full((IN,), torch.inf))])
def test_a_hessian_that_overflowed(W, H):
    with pytest.raises(CalibrationError, match="not finite"):
        sparsegpt(W, H, 0.5)


def test_the_paper_s_span_is_for_wide_layers_only(W, H):
    assert [default_span(inputs) for inputs in (3, 16, 768, 2048, 5120)] == [1, 1, 48, 128, 128]
    default = sparsegpt(W, H, 0.5)
    assert torch.equal(default.mask, sparsegpt(W, H, 0.5, span=default_span(IN)).mask)
    assert default.error < sparsegpt(W, H, 0.5, span=128).error


def test_what_is_no_hessian_is_refused(W):
    H = torch.eye(IN, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1e6
    with pytest.raises(CalibrationError, match="not positive definite"):
        sparsegpt(W, H, 0.5)
    with pytest.raises(ValueError, match=r"16 x 16, not \(4, 4\)"):
        sparsegpt(W, torch.eye(4), 0.5)


@pytest.mark.parametrize("target", [1.0, -0.5, NM(4, 5)])
def test_targets_that_make_no_sense(W, H, target):
    with pytest.raises(UsageError):
        sparsegpt(W, H, target)


@pytest.mark.parametrize("target", [0.5, NM(2, 4)])
def test_samples_in_any_order_and_hessians_at_any_scale_prune_alike(W, x, H, target):
    expected = sparsegpt(W, H, target)
    streamed = SecondMoment(IN)
    for sample in x.view(8, 10, IN).flip(0):
        streamed.add(sample)
    for other in (streamed.total, streamed.mean(), 1e-9 * H, 1e9 * H):
        result = sparsegpt(W, other, target)
        assert torch.equal(result.mask, expected.mask)
        torch.testing.assert_close(result.weight, expected.weight)
        assert result.error == pytest.approx(expected.error)


def test_scale_does_not_change_how_dead_inputs_are_handled(W, x):
    silenced = x * torch.tensor([0.0] * 3 + [1.0] * (IN - 3), dtype=torch.float64)
    H = silenced.t() @ silenced
    torch.testing.assert_close(sparsegpt(W, H, 0.6).weight, sparsegpt(W, 1e-6 * H, 0.6).weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_float32_at_least_and_leaves_the_weight_alone(W, H, dtype):
    stored = W.to(dtype)
    before = stored.clone()
    result = sparsegpt(stored, H, 0.5)
    assert torch.equal(stored, before)
    assert result.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = sparsegpt(stored.double(), H, 0.5)
    assert torch.equal(result.mask, exact.mask)
    torch.testing.assert_close(result.weight.double(), exact.weight, rtol=1e-4, atol=1e-4)


def test_equal_losses_are_decided_by_position():
    result = sparsegpt(torch.ones(2, 4), torch.eye(4), NM(2, 4))
    assert result.mask.tolist() == [[True, True, False, False]] * 2


@pytest.mark.parametrize("target", [0.5, NM(4, 8)])
def test_a_log_is_pruned_by_the_moment_of_its_hidden_states(target):
    states, A_log = random(2, 7, 8, 5, seed=11), random(5, 8, seed=12)  # (B, T, N, D), (D, N)
    moment = StateMoment(8)
    moment.add(states)
    H = torch.zeros(8, 8, dtype=torch.float64)
    for b, t, d in np.ndindex(2, 7, 5):
        H += torch.outer(states[b, t, :, d], states[b, t, :, d])

    def all_states_at_once(losses, start):
        lines = [losses.ravel()] if target == 0.5 else losses
        return np.stack([line > np.sort(line)[line.size // 2 - 1] for line in lines]).reshape(losses.shape)

    expected, kept = surgeon(A_log, H, all_states_at_once, span=8)
    result = sparsegpt_a_log(A_log, moment.total, target)
    np.testing.assert_array_equal(result.mask, kept)
    np.testing.assert_allclose(result.weight, expected, atol=1e-10)


def test_a_single_row_is_not_pruned_in_place():
    weight = random(1, 8, seed=13)
    before = weight.clone()
    sparsegpt(weight, torch.eye(8), 0.5)
    assert torch.equal(weight, before)
