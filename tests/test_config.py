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
        ({"pattern": "row"}, "pattern 'row' does not work.*column.*N:M"),
        ({"pattern": "4:2"}, "4:2 does not work"),
        ({"pattern": "unstructured", "score": "exact"}, "exact does not judge the pattern unstructured; .*ghost"),
        ({"score": "sparsegpt"}, "sparsegpt does not judge the pattern column"),
        ({"target": "mlp"}, "target 'mlp'.*ffn.*in_proj"),
        ({"pattern": "layer", "target": "ffn"}, "arget does not go with the pattern layer"),
        ({"pattern": "unstructured", "target": "ffn", "alpha": 0.6}, "alpha 0.6"),
        ({"alpha": -0.1}, "alpha -0.1"),
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


def test_defaults_follow_the_pattern():
    assert configure(model="tiny").targets == ("A_log",)
    assert configure(model="tiny", pattern="unstructured").targets == ("A_log",)
    assert configure(model="tiny", pattern="2:4").targets == ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    assert configure(model="tiny", pattern="layer").targets == ()
    judges = {p: configure(model="tiny", pattern=p).judge.value for p in ("column", "unstructured", "2:4", "layer")}
    assert judges == {"column": "exact", "unstructured": "sparsessm", "2:4": "sparsessm", "layer": "mamba-shedder"}


def test_targets_run_in_order_whatever_the_order_asked():
    assert configure(model="tiny", pattern="unstructured", target="out_proj,ssm,in_proj").targets == (
        "A_log",
        "in_proj",
        "out_proj",
    )


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, True),
        ({"score": "magnitude", "repair": False}, False),
        ({"score": "magnitude"}, True),
        ({"pattern": "unstructured", "score": "random"}, False),
        ({"pattern": "2:4", "ffn_score": "magnitude"}, False),
        ({"pattern": "2:4"}, True),
        ({"pattern": "layer"}, True),
        ({"pattern": "layer", "score": "random"}, False),
    ],
)
def test_text_is_read_only_when_something_is_decided_by_it(options, needs):
    assert configure(model="tiny", **options).needs_text is needs
