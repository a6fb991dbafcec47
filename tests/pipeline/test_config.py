"""Options: what is accepted, and one clear sentence for what is not."""

from dataclasses import replace

import pytest

from ssmc.compressor import configure, make_plan
from ssmc.compressor.methods.channels.counts import channels_to_keep
from ssmc.compressor.methods.states.counts import states_to_keep
from ssmc.compressor.options.renamed import renamed
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions
from ssmc.runtime.models.families import Dimensions, architecture_for

SIZES = Dimensions(n_layer=4, d_model=128, d_inner=256, d_state=16, dt_rank=8, d_conv=4, vocab_size=99)


def plan(config, sizes=SIZES):
    return make_plan(config, architecture_for("mamba"), sizes)


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
def test_states_to_keep(n, sparsity, round_to, kept):
    assert states_to_keep(n, sparsity, round_to) == kept


@pytest.mark.parametrize(
    ("n", "sparsity", "round_to", "words"),
    [(16, 0.01, 1, "removes none"), (16, 0.99, 1, "leave none"), (16, 0.1, 16, "removes none"), (4, 0.5, 8, "smaller")],
)
def test_a_count_that_makes_no_sense_is_refused(n, sparsity, round_to, words):
    with pytest.raises(UsageError, match=words):
        states_to_keep(n, sparsity, round_to)


@pytest.mark.parametrize("sparsity", [0, 1, -1, 2, float("nan"), float("inf"), "half"])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(UsageError, match=r"sparsity .* does not work"):
        configure(model="tiny", sparsity=sparsity)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "best"}, "score 'best' does not work.*exact.*sparsessm-vote"),
        ({"pattern": "row"}, "pattern 'row' does not work.*column.*N:M"),
        ({"pattern": "4:2"}, "4:2 does not work"),
        ({"pattern": "unstructured", "score": "exact"}, "exact does not go with the pattern unstructured; .*ghost"),
        ({"score": "sparsegpt"}, "sparsegpt does not go with the pattern column"),
        ({"scope": "mlp"}, "scope 'mlp'.*ffn.*in_proj"),
        ({"pattern": "layer", "scope": "ffn"}, "cope does not go with the pattern layer"),
        ({"pattern": "unstructured", "scope": "ffn", "alpha": 0.6}, "alpha 0.6"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"nsamples": 0}, "nsamples 0"),
        ({"seqlen": 1}, "seqlen 1"),
        ({"seed": -1}, "seed -1"),
        ({"round_to": 0}, "round_to 0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"pattern": "column+unstructured"}, "'unstructured' cannot be combined; layer, column, channel, mlp"),
        ({"pattern": "column+column"}, "column.column' does not work: a part is named twice"),
        ({"pattern": "column+"}, "cannot be combined"),
        ({"pattern": "column+channel", "sparsity": {"column": 0.5}}, "how much of channel goes"),
        ({"pattern": "column+channel", "sparsity": "column=0.5,layer=0.5"}, "layer is no part of .*column.channel"),
        ({"pattern": "column+channel", "sparsity": "column=0.5,channel=2"}, "between 0 and 1"),
        ({"pattern": "column+channel", "sparsity": "column=0.5,column=0.5"}, "named twice"),
        ({"pattern": "column+channel", "sparsity": "column="}, "part=value"),
        ({"pattern": "column+channel", "sparsity": {}}, "names no part"),
        ({"sparsity": True}, "between 0 and 1"),
        ({"pattern": "column+channel", "score": "column=obs"}, "obs does not go with the pattern column; exact"),
        ({"pattern": "column+channel", "score": "similarity"}, "similarity does not go with .*column.channel"),
        ({"pattern": "column+channel", "score": {"channel": None}}, "score .* does not work"),
        ({"pattern": "channel", "scope": "ffn"}, "cope does not go with the pattern channel"),
        ({"scope": "ffn", "target": "all"}, "target is the old name of scope, and both are given"),
        ({"pattern": "column", "widths": "8,8"}, "idths goes with the pattern channel"),
        ({"pattern": "channel", "widths": "8,wide"}, "widths '8,wide' does not work"),
        ({"pattern": "channel", "widths": [0, 8]}, "widths .* does not work"),
        ({"pattern": "channel", "states": [8]}, "tates goes with the pattern column"),
        ({"round_channels": 0}, "round_channels 0"),
        ({"pruned_entry": "forget"}, "runed_entry forget goes with .*unstructured"),
        ({"pruned_entry": "forget", "pattern": "2:4"}, "runed_entry forget .*scope ssm"),
        ({"pruned_entry": "forget", "pattern": "unstructured", "scope": "ffn"}, "runed_entry forget"),
        ({"sparsety": 0.5}, "no option 'sparsety'.*sparsity"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        configure(model="tiny", **options)


@pytest.mark.parametrize("options", [{"pattern": "unstructured"}, {"pattern": "2:4", "scope": "all"}])
def test_entries_that_forget_go_with_patterns_of_entries(options):
    assert configure(model="tiny", pruned_entry="forget", **options).pruned_entry == "forget"


def test_all_mistakes_are_named_at_once():
    with pytest.raises(UsageError, match=r"sparsity 2(.|\n)*seqlen 0"):
        configure(model="tiny", sparsity=2, seqlen=0)


def test_defaults_follow_the_pattern():
    assert configure(model="tiny").in_scope == ("A_log",)
    assert configure(model="tiny", pattern="unstructured").in_scope == ("A_log",)
    assert configure(model="tiny", pattern="2:4").in_scope == ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    assert configure(model="tiny", pattern="layer").in_scope == ()
    scores = {p: configure(model="tiny", pattern=p).first_score for p in ("column", "unstructured", "2:4", "layer")}
    assert scores == {"column": "exact", "unstructured": "ghost", "2:4": "ghost", "layer": "mamba-shedder"}


def test_modules_in_scope_run_in_order_whatever_the_order_asked():
    assert configure(model="tiny", pattern="unstructured", target="out_proj,ssm,in_proj").in_scope == (
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
        ({"pattern": "channel", "score": "magnitude"}, True),
        ({"pattern": "channel", "score": "magnitude", "repair": False}, False),
        ({"pattern": "column+channel", "score": "channel=random,column=random", "repair": False}, False),
        ({"pattern": "column+channel", "score": "channel=random", "repair": False}, True),
        ({"pattern": "layer", "score": "random"}, True),  # for the repair
        ({"pattern": "layer", "score": "random", "repair": False}, False),
    ],
)
def test_text_is_read_only_when_something_is_decided_by_it(options, needs):
    assert plan(configure(model="tiny", **options)).needs_text is needs


def test_a_combined_pattern_is_written_in_the_order_it_is_carried_out():
    config = configure(model="tiny", pattern="channel+layer+column", sparsity=0.25)
    assert config.pattern == "layer+column+channel"
    assert config.parts == ("layer", "column", "channel")
    assert {config.sparsity_of(part) for part in config.parts} == {0.25}
    assert config.in_scope == ("A_log",)
    assert [config.score_of(part) for part in config.parts] == ["mamba-shedder", "exact", "obs"]


@pytest.mark.parametrize("typed", [True, False])
def test_values_for_each_part_from_the_command_line_and_from_a_recipe(typed):
    sparsity, score = {"channel": 0.5, "column": 0.75}, {"channel": "activation"}
    if typed:
        sparsity, score = "channel=0.5,column=0.75", "channel=activation"
    config = configure(model="tiny", pattern="column+channel", sparsity=sparsity, score=score)
    assert (config.sparsity_of("column"), config.sparsity_of("channel")) == (0.75, 0.5)
    assert config.score_of("column") == "exact"
    assert config.score_of("channel") == "activation"
    written = config.model_dump(mode="json")
    assert written["sparsity"] == {"column": 0.75, "channel": 0.5}
    assert configure(**written) == config


def test_a_plain_score_judges_the_parts_it_can():
    config = configure(model="tiny", pattern="layer+column+channel", score="activation")
    assert [config.score_of(part) for part in config.parts] == ["mamba-shedder", "exact", "activation"]
    config = configure(model="tiny", pattern="layer+column+channel", score="random")
    assert {config.score_of(part) for part in config.parts} == {"random"}


def test_a_single_pattern_keeps_plain_values():
    config = configure(model="tiny", pattern="column", sparsity="column=0.75", score={"column": "energy"})
    assert config == configure(model="tiny", pattern="column", sparsity=0.75, score="energy")
    assert (config.sparsity, config.first_score) == (0.75, "energy")


@pytest.mark.parametrize(
    ("d", "sparsity", "multiple", "width"),
    [
        (1536, 0.5, None, 768),
        (1536, 0.3, None, 1088),  # 1075.2
        (512, 0.25, None, 384),
        (512, 0.3125, None, 320),  # 352 lies between 320 and 384: fewer
        (512, 0.3125, 32, 352),
        (96, 0.5, None, 48),  # a multiple of 8 by default
        (24, 0.5, None, 12),
        (24, 0.99, None, 2),
        (100, 0.1, 16, 96),
        (1536, 0.5, 1, 768),
    ],
)
def test_channels_to_keep(d, sparsity, multiple, width):
    assert channels_to_keep(d, sparsity, multiple) == width


@pytest.mark.parametrize(("d", "sparsity", "multiple"), [(1536, 0.01, None), (24, 0.01, 1), (24, 0.5, 64)])
def test_a_width_that_removes_nothing_is_refused(d, sparsity, multiple):
    with pytest.raises(UsageError, match=f"{d} channels.*removes none"):
        channels_to_keep(d, sparsity, multiple)


def test_what_stays_in_each_layer():
    sizes = replace(SIZES, n_layer=3)
    combined = plan(configure(model="m", pattern="column+channel", sparsity=0.5), sizes).keep
    assert combined.states == (8, 8, 8)
    assert combined.channels == (128, 128, 128)
    listed = plan(configure(model="m", pattern="column+channel", widths="256,100,7", states=[16, 8, 4]), sizes).keep
    assert listed.channels == (256, 100, 7)
    assert listed.states == (16, 8, 4)
    assert plan(configure(model="m", pattern="layer"), sizes).keep.channels == (256, 256, 256)
    for wrong, words in (("256,100", "2 layers, the model has 3"), ("257,1,1", "257 in a layer that has 256")):
        with pytest.raises(UsageError, match=words):
            plan(configure(model="m", pattern="channel", widths=wrong), sizes)


MAMBA2 = Mamba2Dimensions(3, 128, 256, 16, 8, 4, 99, head_dim=32, n_groups=1)


@pytest.mark.parametrize(
    ("family", "sizes", "options", "fits"),
    [
        ("mamba", SIZES, {}, False),  # the repair of the states folds into their C rows
        ("mamba", SIZES, {"pattern": "channel"}, True),
        ("mamba", SIZES, {"pattern": "layer"}, True),
        ("mamba", SIZES, {"pattern": "channel", "repair": False}, False),
        ("mamba", SIZES, {"pattern": "ssm-module"}, False),
        ("mamba2", MAMBA2, {}, True),
        ("mamba2", MAMBA2, {"repair": False}, False),
        ("mamba2", MAMBA2, {"pattern": "unstructured"}, False),
        ("falcon_mamba", SIZES, {}, True),  # norms stand between
        ("jamba", SIZES, {}, True),
    ],
)
def test_whether_out_proj_is_fitted_is_answered_once(family, sizes, options, fits):
    found = make_plan(configure(model="m", **options), architecture_for(family), sizes)
    assert found.fits_out_proj is fits
    assert found.follows_dense is fits
    assert make_plan(configure(model="m", refine=0, **options), architecture_for(family), sizes) == found


@pytest.mark.parametrize("name", ["target", "scope"])
def test_an_option_is_read_by_its_old_name_too(name):
    assert configure(model="m", **{name: "all"}).scope == "all"
    found, notes = renamed({"model": "m", name: "all"})
    assert found == {"model": "m", "scope": "all"}
    assert notes == (
        [] if name == "scope" else ["The option target is now called scope; the old name is still accepted."]
    )
