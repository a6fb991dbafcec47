"""Masks: exact counts, a true top-K, ties by position, N:M means n kept."""

import itertools

import pytest
import torch

from ssmc.compressor.methods.weights.masks import (
    lowest_mask,
    nm_mask,
    per_row_mask,
    pruned_count,
    unstructured_mask,
)
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.errors import CalibrationError, UsageError


def kept_by_sorting(values, keep):
    """Positions of the `keep` highest of a list, ties to the earlier one."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])


def random(*shape, levels=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) if levels is None else torch.randint(levels, shape, generator=g).float()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.77, 0.99])
@pytest.mark.parametrize("levels", [None, 3, 1])  # many ties, nothing but ties
def test_unstructured_is_the_top_k_of_the_whole_tensor(sparsity, levels):
    importance = random(7, 5, 3, levels=levels)
    mask = unstructured_mask(importance, sparsity)
    assert mask.dtype == torch.bool
    assert mask.shape == importance.shape
    keep = 105 - round(sparsity * 105)
    assert set(mask.flatten().nonzero()[:, 0].tolist()) == kept_by_sorting(importance.flatten().tolist(), keep)


@pytest.mark.parametrize("levels", [None, 3, 1])
def test_per_row_compares_within_a_row(levels):
    importance = random(6, 9, levels=levels) * torch.arange(1, 7)[:, None]  # rows of unequal size
    mask = per_row_mask(importance, 0.4)
    for values, kept in zip(importance.tolist(), mask, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == kept_by_sorting(values, 9 - round(0.4 * 9))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("levels", [None, 2])
def test_nm_keeps_n_of_every_m_consecutive(n, m, axis, levels):
    importance = random(8, 16, 24, levels=levels)
    mask = nm_mask(importance, n, m, axis)
    assert mask.shape == importance.shape
    lines = zip(importance.movedim(axis, -1).reshape(-1, m), mask.movedim(axis, -1).reshape(-1, m), strict=True)
    for values, kept in itertools.islice(lines, 0, None, 7):
        assert set(kept.nonzero()[:, 0].tolist()) == kept_by_sorting(values.tolist(), n)


def test_nm_counts_what_stays():
    assert nm_mask(torch.tensor([1.0, 2.0, 3.0, 4.0]), 1, 4).tolist() == [False, False, False, True]
    assert NM(1, 4).sparsity == 0.75
    assert str(NM(1, 4)) == "1:4"


def test_nm_refuses_an_axis_that_is_not_whole_groups():
    with pytest.raises(UsageError, match=r"4:8 needs whole groups of 8 entries, but the axis has 4"):
        nm_mask(random(3, 4), 4, 8)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (-1, 2)])
def test_nm_refuses_patterns_that_keep_nothing_or_all(n, m):
    with pytest.raises(UsageError, match=f"pattern {n}:{m}"):
        nm_mask(random(3, 8), n, m)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        unstructured_mask(random(3, 4), sparsity)


def test_everything_may_go_from_a_short_row():
    assert pruned_count(4, 0.9) == 4
    assert not per_row_mask(random(2, 4), 0.9).any()
    assert not lowest_mask(random(5), 5).any()


@pytest.mark.parametrize("mask", [lambda x: unstructured_mask(x, 0.5), lambda x: nm_mask(x, 2, 4)])
def test_nan_is_no_importance(mask):
    importance = random(2, 8)
    importance[1, 3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        mask(importance)


def test_infinite_importance_stays():
    importance = torch.tensor([0.0, float("inf"), 1.0, float("inf")])
    assert unstructured_mask(importance, 0.5).tolist() == [False, True, False, True]
