"""Eq. 7: the ramp over the rank, its mean, its order, its limits."""

import math
from fractions import Fraction

import pytest
import torch

from ssmc.compressor.methods.weights.sensitivity import allocate, ramp, sensitivity
from ssmc.runtime.errors import CalibrationError, UsageError


def test_sensitivity_is_the_trace_per_weight():
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sensitivity(x.t() @ x, 15) == pytest.approx(float((x**2).sum()) / 15)
    assert sensitivity(torch.eye(4).expand(3, 4, 4), 12) == 1.0  # conv1d: one matrix per channel


def test_least_sensitive_layer_loses_most_and_steps_are_even():
    assert ramp([3.0, 1.0, 2.0], 0.5, 0.04) == pytest.approx([0.46, 0.54, 0.5])
    sparsities = ramp([10.0, 5.0, 1000.0, 7.0, 6.0], 0.3, 0.1)
    by_sensitivity = [sparsities[i] for i in (1, 4, 3, 0, 2)]
    assert by_sensitivity == pytest.approx([0.4, 0.35, 0.3, 0.25, 0.2])


@pytest.mark.parametrize("layers", [1, 2, 3, 24, 48, 64])
@pytest.mark.parametrize(("sparsity", "alpha"), [(0.5, 0.04), (0.3, 0.29), (0.9, 0.05), (0.5, 0.0)])
def test_the_mean_is_the_target(layers, sparsity, alpha):
    values = torch.rand(layers, generator=torch.Generator().manual_seed(layers)).tolist()
    sparsities = ramp(values, sparsity, alpha)
    mean = sum(map(Fraction, sparsities)) / layers  # no rounding in the mean itself
    assert abs(mean - Fraction(sparsity)) < 1e-15
    assert all(sparsity - alpha - 1e-12 <= s <= sparsity + alpha + 1e-12 for s in sparsities)


def test_one_layer_gets_the_target():
    assert ramp([4.2], 0.5, 0.04) == [0.5]


def test_equal_sensitivities_get_equal_sparsities():
    assert ramp([1.0, 1.0, 1.0, 1.0], 0.5) == [0.5] * 4
    tied = ramp([2.0, 1.0, 2.0, 3.0], 0.5, 0.3)
    assert tied == pytest.approx([0.5, 0.8, 0.5, 0.2])


def test_in_proj_and_out_proj_are_ranked_on_their_own_and_the_rest_is_flat():
    sparsities = allocate({"in_proj": [1.0, 2.0], "out_proj": [900.0, 800.0], "x_proj": [1.0, 5.0]}, 0.5, 0.04)
    assert sparsities == {
        "in_proj": pytest.approx([0.54, 0.46]),
        "out_proj": pytest.approx([0.46, 0.54]),
        "x_proj": [0.5, 0.5],
    }


@pytest.mark.parametrize(("sparsity", "alpha"), [(0.03, 0.04), (0.97, 0.04), (0.5, 0.5), (0.5, -0.1), (0.5, math.nan)])
def test_a_ramp_that_leaves_the_range_is_refused(sparsity, alpha):
    with pytest.raises(UsageError, match=r"alpha .* Use an alpha of at least 0 and below"):
        ramp([1.0, 2.0], sparsity, alpha)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -1.0, 2.0])
def test_a_target_outside_its_range_is_refused(sparsity):
    with pytest.raises(UsageError, match="sparsity"):
        ramp([1.0, 2.0], sparsity, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sensitivity_that_is_no_number_is_refused(value):
    with pytest.raises(CalibrationError, match="sensitivity"):
        ramp([1.0, value], 0.5)
