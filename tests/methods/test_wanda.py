"""Magnitude and Wanda against their definitions, entry by entry."""

import math

import pytest
import torch

from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.methods.weights.wanda import magnitude, wanda
from ssmc.compressor.options.sparsity import NM
from tests.methods.test_masks import kept_by_sorting, random


@pytest.fixture(scope="module")
def x():
    return random(50, 8, seed=3) * torch.tensor([0.1, 5, 1, 0.3, 2, 1, 7, 0.01])  # inputs of unequal size


@pytest.fixture(scope="module", name="W")
def weight():
    return random(6, 8, seed=4)


def kept_of(mask_row):
    return set(mask_row.nonzero()[:, 0].tolist())


def by_definition(W, x):
    return [[abs(float(w)) * math.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j, w in enumerate(r)] for r in W]


def test_wanda_compares_weight_times_input_norm_within_each_output(W, x):
    moment = SecondMoment(8)
    moment.add(x)
    mask = wanda(W, moment.total.diagonal(), 0.5)
    importance = by_definition(W, x)
    for row, kept in zip(importance, mask, strict=True):
        assert kept_of(kept) == kept_by_sorting(row, 4)
    assert not torch.equal(mask, wanda(W, torch.ones(8), 0.5))  # the inputs matter


def test_wanda_in_groups(W, x):
    mask = wanda(W, x.square().sum(0), NM(1, 4))
    for row, kept in zip(by_definition(W, x), mask, strict=True):
        groups = [{4 * g + i for i in kept_by_sorting(row[4 * g : 4 * g + 4], 1)} for g in range(2)]
        assert kept_of(kept) == groups[0] | groups[1]


def test_wanda_of_a_depthwise_convolution_takes_each_channels_own_inputs(W):
    squares = random(6, 8, seed=5).square()  # (D, K)
    mask = wanda(W, squares, 0.25)
    for d in range(6):
        importance = [abs(float(W[d, k])) * math.sqrt(float(squares[d, k])) for k in range(8)]
        assert kept_of(mask[d]) == kept_by_sorting(importance, 6)


def test_magnitude_compares_the_whole_tensor(W):
    mask = magnitude(W * torch.arange(1, 7)[:, None], 0.3)
    scaled = (W.abs() * torch.arange(1, 7)[:, None]).flatten().tolist()
    assert kept_of(mask.flatten()) == kept_by_sorting(scaled, 48 - round(0.3 * 48))


def test_magnitude_in_groups_counts_n_kept(W):
    mask = magnitude(W, NM(3, 4))
    assert (mask.view(6, 2, 4).sum(-1) == 3).all()
    lowest = W.abs().view(6, 2, 4).argmin(-1, keepdim=True)
    assert not mask.view(6, 2, 4).gather(-1, lowest).any()


def test_equal_weights_are_decided_by_position():
    assert magnitude(torch.ones(2, 3), 0.5).tolist() == [[True, True, True], [False, False, False]]
    assert wanda(torch.ones(2, 4), torch.ones(4), 0.5).tolist() == [[True, True, False, False]] * 2
