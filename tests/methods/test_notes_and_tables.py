"""What a run says besides its result: by the plan, so that every place says the same."""

from types import SimpleNamespace

import pytest
import torch

from ssmc.compressor import compress, configure, make_plan
from ssmc.compressor.methods.channels.out_proj import OutProjRecord
from ssmc.compressor.methods.method import LayerResult, Outcome
from ssmc.compressor.methods.states.prune import StatesRecord
from ssmc.compressor.methods.tables import ranges
from ssmc.compressor.notes import notes_for
from ssmc.runtime.models.architectures.dimensions import Dimensions, Mamba2Dimensions
from ssmc.runtime.models.families import architecture_for

SIZES = Dimensions(n_layer=2, d_model=64, d_inner=128, d_state=16, dt_rank=4, d_conv=4, vocab_size=99)
HEADS = Mamba2Dimensions(2, 64, 128, 16, 8, 4, 99, head_dim=16, n_groups=1)


def outcome(family, tokens=100, **options):
    """A run that is over, on so many tokens."""
    sizes = HEADS if architecture_for(family).capabilities.heads else SIZES
    plan = make_plan(configure(model="tiny", **options), architecture_for(family), sizes)
    records = (StatesRecord(0.1, 0.2, True, 0.03), *([OutProjRecord(0.01, 0.05)] if plan.fits_out_proj else []))
    layers = [LayerResult(tuple(range(8)), None, records)] * 2
    calibration = SimpleNamespace(tokens=torch.zeros(1, tokens), shortfall=None)
    return Outcome(plan, layers, (), calibration)


@pytest.mark.parametrize(
    ("family", "options", "warned"),
    [
        ("falcon_mamba", {}, True),
        ("jamba", {}, True),
        ("mamba2", {}, True),
        ("bamba", {}, True),
        ("mamba", {"pattern": "channel"}, True),
        ("mamba", {}, False),
        ("falcon_mamba", {"repair": False}, False),
        ("mamba2", {"score": "energy", "repair": False}, False),
    ],
)
def test_too_little_text_for_the_fit_is_said_wherever_there_is_a_fit(family, options, warned):
    least = 8 * max(outcome(family, **options).plan.keep.channels)
    few, enough = (notes_for(outcome(family, tokens, **options)) for tokens in (least - 1, least))
    assert any(f"out_proj was fitted on {least - 1} tokens" in note for note in few) is warned
    assert not any("out_proj was fitted" in note for note in enough)


@pytest.mark.parametrize(
    ("family", "fits"), [("mamba2", True), ("bamba", True), ("falcon_mamba", True), ("mamba", False)]
)
def test_the_fit_of_out_proj_has_a_table_wherever_there_is_one(family, fits):
    done = outcome(family)
    tables = {table.title: table for step in done.plan.steps for table in step.tables(done)}
    assert ("out_proj, fitted to the dense model" in tables) is fits
    if fits:
        assert tables["out_proj, fitted to the dense model"].rows[0] == ("0", "1.00e-02", "5.00e-02")
    assert tables["States"].rows[1] == ("1", "8", "0-7", "1.00e-01", "2.00e-01")


def test_ranges_of_numbers():
    assert ranges((0, 1, 2, 3, 5, 8, 9)) == "0-3 5 8-9"
    assert ranges(()) == ""


def test_an_option_by_its_old_name_gives_a_note_and_the_same_bytes(tmp_path):
    options = {"pattern": "unstructured", "score": "magnitude", "ffn_score": "magnitude"}
    old = compress("tiny", out=tmp_path / "old", target="all", **options)
    new = compress("tiny", out=tmp_path / "new", scope="all", **options)
    assert [note for note in old.notes if note not in new.notes] == [
        "The option target is now called scope; the old name is still accepted."
    ]
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "old" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
