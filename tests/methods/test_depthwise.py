"""conv1d: least squares per channel on real windows, and the best sets by trying them all."""

import itertools

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.weights.depthwise import hull_slopes, prune_depthwise
from ssmc.compressor.methods.weights.second_moments import DepthwiseSecondMoment
from ssmc.compressor.methods.weights.wanda import magnitude
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.errors import CalibrationError, UsageError

CHANNELS, TAPS = 5, 4


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def x():
    """(B, L, D): neighbouring tokens alike, channels of unequal size."""
    return random(3, 40, CHANNELS, seed=1).cumsum(1) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0])


@pytest.fixture(scope="module", name="H")
def hessian(x):
    return hessian_of(x, TAPS)


@pytest.fixture(scope="module", name="W")
def weight():
    return random(CHANNELS, TAPS, seed=2)


def hessian_of(x, taps):
    moment = DepthwiseSecondMoment(x.shape[2], taps)
    moment.add(x)
    return moment.total


def windows(x, taps):
    """(D, B L, K) numpy: what tap k of channel d reads, with zeros before the start."""
    batch, length, channels = x.shape
    rows = np.zeros((channels, batch * length, taps))
    for b, t, d, k in np.ndindex(batch, length, channels, taps):
        if t - taps + 1 + k >= 0:
            rows[d, b * length + t, k] = x[b, t - taps + 1 + k, d]
    return rows


def fitted(rows, w, keep):
    """Least squares of one channel: taps and squared error."""
    fit, keep = np.zeros(len(w)), list(keep)
    if keep:
        fit[keep] = np.linalg.lstsq(rows[:, keep], rows @ w, rcond=None)[0]
    return fit, ((rows @ (fit - w)) ** 2).sum()


def best_errors(rows, w):
    """Lowest error of losing 0..K taps, and of every set."""
    taps = range(len(w))
    sets = {keep: fitted(rows, w, keep)[1] for c in range(len(w) + 1) for keep in itertools.combinations(taps, c)}
    return [min(e for s, e in sets.items() if len(s) == len(w) - c) for c in range(len(w) + 1)], sets


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8, NM(2, 4), NM(1, 2)])
def test_taps_that_stay_are_least_squares_of_their_own_channel(W, x, H, target):
    result = prune_depthwise(W, H, target)
    errors = energy = 0.0
    for d, rows in enumerate(windows(x, TAPS)):
        fit, error = fitted(rows, W[d].numpy(), result.mask[d].nonzero()[:, 0].tolist())
        np.testing.assert_allclose(result.weight[d], fit, atol=1e-3)
        errors, energy = errors + error, energy + ((rows @ W[d].numpy()) ** 2).sum()
    assert result.error == pytest.approx(errors / energy, rel=1e-4)
    assert not result.weight[~result.mask].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.77, 0.99])
def test_exactly_what_was_asked_goes(W, H, sparsity):
    result = prune_depthwise(W, H, sparsity)
    assert int((~result.mask).sum()) == round(sparsity * W.numel())


@pytest.mark.parametrize(("n", "m", "taps"), [(2, 4, 4), (1, 4, 4), (1, 2, 4), (1, 2, 6), (2, 4, 8)])
def test_nm_is_the_best_allowed_set_of_every_channel(x, n, m, taps):
    W = random(CHANNELS, taps, seed=3)
    result = prune_depthwise(W, hessian_of(x, taps), NM(n, m))
    assert (result.mask.view(CHANNELS, -1, m).sum(-1) == n).all()
    for d, rows in enumerate(windows(x, taps)):
        _, sets = best_errors(rows, W[d].numpy())
        allowed = {s for s in sets if all(sum(g <= k < g + m for k in s) == n for g in range(0, taps, m))}
        best = min(allowed, key=sets.get)
        assert result.mask[d].nonzero()[:, 0].tolist() == list(best)


@pytest.mark.parametrize("seed", range(4))
def test_unstructured_is_the_best_of_all_masks_but_for_one_channel(x, H, seed):
    W = random(CHANNELS, TAPS, seed=seed)
    curves = [best_errors(rows, w)[0] for rows, w in zip(windows(x, TAPS), W.numpy(), strict=True)]
    best = curves[0]  # lowest error of losing c taps from the channels so far, all splits tried
    for curve in curves[1:]:
        totals = range(len(best) + len(curve) - 1)
        best = [min(best[a] + curve[c - a] for a in range(len(best)) if 0 <= c - a < len(curve)) for c in totals]
    energy = best[-1]  # losing every tap
    one_channel = max(max(np.diff(curve)) for curve in curves)
    exact = 0
    for total in range(W.numel()):
        error = prune_depthwise(W, H, total / W.numel()).error * energy
        assert best[total] * (1 - 1e-6) - 1e-6 <= error <= best[total] + one_channel
        exact += error == pytest.approx(best[total], rel=1e-3, abs=1e-6)
    assert exact >= 0.7 * W.numel()


def test_it_beats_magnitude_with_and_without_a_fit(W, x, H):
    result = prune_depthwise(W, H, 0.5)
    mask, refitted, plain, energy = magnitude(W, 0.5), 0.0, 0.0, 0.0
    for rows, w, kept in zip(windows(x, TAPS), W.numpy(), mask, strict=True):
        refitted += fitted(rows, w, kept.nonzero()[:, 0].tolist())[1]
        plain += ((rows @ (w * ~kept.numpy())) ** 2).sum()
        energy += ((rows @ w) ** 2).sum()
    assert result.error < refitted / energy < plain / energy


def test_a_silent_channel_goes_first_and_keeps_what_it_keeps(W, x):
    silenced = x.clone()
    silenced[..., 2] = 0
    H = hessian_of(silenced, TAPS)
    result = prune_depthwise(W, H, 0.15)  # 3 of 20 taps
    assert (~result.mask).sum(1).tolist() == [0, 0, 3, 0, 0]
    assert torch.equal(result.weight[2][result.mask[2]], W[2][result.mask[2]])
    assert result.error == 0.0
    everything = prune_depthwise(W, torch.zeros_like(H), 0.5)
    assert int((~everything.mask).sum()) == 10
    assert everything.error == 0.0


def test_scale_and_stored_type(W, H):
    expected, stored = prune_depthwise(W, H, 0.5), W.half()
    torch.testing.assert_close(prune_depthwise(W, 1e-8 * H, 0.5).weight, expected.weight)
    result = prune_depthwise(stored, H, 0.5)
    assert result.weight.dtype == torch.float32
    assert torch.equal(stored, W.half())


def testhull_slopes_are_those_of_the_convex_minorant():
    curve = torch.tensor([[0.0, 5.0, 6.0, 7.0, 20.0], [0.0, 1.0, 3.0, 6.0, 10.0], [0.0, 4.0, 4.0, 12.0, 12.0]])
    expected = [[7 / 3, 7 / 3, 7 / 3, 13.0], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 4.0, 4.0]]
    torch.testing.assert_close(hull_slopes(curve), torch.tensor(expected))


def test_refusals(W, H):
    with pytest.raises(UsageError, match="groups of 8"):
        prune_depthwise(W, H, NM(4, 8))
    with pytest.raises(UsageError, match="9 taps"):
        prune_depthwise(torch.ones(2, 9), torch.eye(9).expand(2, 9, 9), 0.5)
    with pytest.raises(UsageError, match="sparsity"):
        prune_depthwise(W, H, 1.0)
    with pytest.raises(CalibrationError, match="not finite"):
        prune_depthwise(W, H * torch.nan, 0.5)
