"""Options: what is accepted, and one clear sentence for what is not."""

import pytest

from ssmc.compressor import configure, kept_states
from ssmc.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("n", "sparsity", "round_to", "kept"),
    [
        (16, 0.5, 1, 8),
        (16, 0.25, 1, 12),
        (16, 0.75, 1, 4),
        (16, 0.9, 1, 2),
        (16, 0.95, 1, 1),
        (16, 0.25, 8, 8),  # 12 lies between 8 and 16: fewer
        (16, 0.25, "power-of-two", 8),
        (16, 0.6, "power-of-two", 8),
        (16, 0.7, "power-of-two", 4),
        (16, 0.5, 5, 10),  # 8 is nearer to 10 than to 5
        (5, 0.5, 1, 2),
        (8, 0.99, "power-of-two", 1),
    ],
)
def test_kept_states(n, sparsity, round_to, kept):
    assert kept_states(n, sparsity, round_to) == kept


@pytest.mark.parametrize(
    ("n", "sparsity", "round_to", "words"),
    [(16, 0.01, 1, "removes none"), (16, 0.99, 1, "leave none"), (16, 0.1, 16, "removes none"), (4, 0.5, 8, "smaller")],
)
def test_a_count_that_makes_no_sense_is_refused(n, sparsity, round_to, words):
    with pytest.raises(UsageError, match=words):
        kept_states(n, sparsity, round_to)


@pytest.mark.parametrize("sparsity", [0, 1, -1, 2, float("nan"), float("inf"), "half"])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(UsageError, match=r"sparsity .* does not work"):
        configure(model="tiny", sparsity=sparsity)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "best"}, "score 'best' does not work.*sparsessm-vote.*exact"),
        ({"pattern": "row"}, "pattern 'row' does not work"),
        ({"nsamples": 0}, "nsamples 0"),
        ({"seqlen": 1}, "seqlen 1"),
        ({"seed": -1}, "seed -1"),
        ({"round_to": 0}, "round_to 0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"sparsety": 0.5}, "no option 'sparsety'.*sparsity"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        configure(model="tiny", **options)


def test_all_mistakes_are_named_at_once():
    with pytest.raises(UsageError, match=r"sparsity 2(.|\n)*seqlen 0"):
        configure(model="tiny", sparsity=2, seqlen=0)
