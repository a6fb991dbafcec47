"""The ridge solver where moments are singular, and a whole run on text that determines nothing."""

import pytest
import torch

from ssmc.compressor import configure
from ssmc.compressor.methods.ridge import factor, fit, inverse, ridged, solve
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.models import random_mamba2, random_model
from tests.support.pruning import prune_layers


def moment(rank, size=8):
    x = torch.randn(50, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mix = torch.randn(rank, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x @ mix).t() @ (x @ mix)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_solving_and_inverting_are_those_of_numpy(rank):
    matrix = ridged(moment(rank))
    right = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(solve(matrix, right), torch.linalg.solve(matrix, right), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(inverse(matrix) @ matrix, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_moment_that_rounding_made_indefinite_gets_a_little_more_and_no_more():
    vectors, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    values = torch.tensor([10.0, 1, 1, 1, 1, 1, 1, -1e-9], dtype=torch.float64)
    matrix = vectors @ values.diag() @ vectors.t()
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(matrix)
    lower = factor(matrix)
    torch.testing.assert_close(lower @ lower.t(), matrix, rtol=0, atol=1e-6)


def test_inputs_of_which_nothing_is_known_keep_their_weights():
    moments = moment(2)
    before = torch.randn(3, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert not fit(torch.zeros(3, 8), moments).any()  # the change that is asked for: none
    unseen = torch.linalg.svd(moments)[2][2:]  # directions that no token took
    change = fit(before @ moments, moments)
    torch.testing.assert_close(change @ unseen.t(), torch.zeros(3, 6, dtype=torch.float64), rtol=0, atol=1e-6)


def test_what_is_no_moment_is_refused_in_a_sentence():
    with pytest.raises(CalibrationError, match="not positive definite"):
        factor(-torch.eye(3, dtype=torch.float64))
    with pytest.raises(CalibrationError, match="not finite"):
        ridged(torch.full((2, 2), torch.inf))


@pytest.mark.parametrize(
    ("family", "pattern"), [("mamba", "column+channel"), ("mamba", "column"), ("mamba2", "column")]
)
def test_text_of_one_token_prunes_without_a_crash(family, pattern):
    """The same token again and again: every second moment has rank one, or next to it."""
    architecture = architecture_for(family)
    model = use_fast_scan(random_model() if family == "mamba" else random_mamba2())
    tokens = torch.full((2, 64), 7)
    config = configure(model="test", pattern=pattern, round_channels=4 if "channel" in pattern else None)
    results = prune_layers(model, architecture, tokens, config, dict.fromkeys(model.state_dict(), torch.float32))
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert all(result.states.error <= result.states.error_unrepaired * 1.001 for result in results)
