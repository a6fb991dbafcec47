"""Runs that aim at an amount of memory: counted as transformers allocates it, refused where it cannot be reached."""

import json

import pytest
import torch

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.memory import format_bytes
from tests.families.test_memory import allocated
from tests.support.commandline import run
from tests.support.families import bamba, random_ids, short, with_tokenizer
from tests.support.models import random_model, save_transformers

BATCH, LENGTH = 3, 20
SEQUENCES = {"batch": BATCH, "length": LENGTH}


@torch.no_grad()
def held(directory):
    """Bytes that a model of stock transformers takes with sequences of tokens that are all read."""
    model = load_checkpoint(directory).model
    output = model(random_ids(BATCH, LENGTH), use_cache=True)
    cache = getattr(output, "past_key_values", None) or output.cache_params
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    return weights + allocated(cache, "recurrent_states", "conv_states", "keys", "values")


@pytest.fixture(scope="module", params=["mamba", "bamba"])
def dense(request, tmp_path_factory):
    """A pure model and a hybrid, of which a search may remove states."""
    sizes = {"vocab_size": 4096}
    model = random_model(**sizes) if request.param == "mamba" else bamba(**sizes)
    return with_tokenizer(save_transformers(model, tmp_path_factory.mktemp("memory") / request.param))


def test_what_comes_out_takes_what_was_asked_for(dense, tmp_path):
    whole = held(dense)
    asked = whole - 1000
    result = compress(dense, out=tmp_path / "out", pattern="column", target_memory=asked, **SEQUENCES, **short(dense))
    came = held(export(tmp_path / "out").directory)
    goal = result.manifest["goal"]
    assert goal["outcome"]["memory"] == goal["expected"]["memory"] == pytest.approx(came, rel=1e-3)
    assert came <= asked
    assert goal["sizes"]["d_state"] < load_checkpoint(dense).dimensions.d_state
    assert goal["latency_table"] is None


def test_what_cannot_be_met_or_is_met_already_is_said_before_any_text_is_read(dense, tmp_path):
    whole = held(dense)
    calib = {"calib": tmp_path / "no-such-text.jsonl", "out": tmp_path / "out", **SEQUENCES}
    with pytest.raises(
        UsageError, match=r"cannot reach 1\.00 KiB for 3 sequences of 20 tokens \(the least is \d+ KiB\)"
    ):
        compress(dense, target_memory="1KiB", pattern="column", **calib)
    with pytest.raises(UsageError, match=rf"takes {format_bytes(whole)} for 3 sequences .* nothing has to be removed"):
        compress(dense, target_memory=whole, **calib)
    assert not (tmp_path / "out").exists()


def test_other_goals_of_a_hybrid_are_refused(tmp_path):
    dense = with_tokenizer(save_transformers(bamba(vocab_size=4096), tmp_path / "bamba"))
    for options, sentence in (
        ({"target_params": 0.9, "per_layer": True}, "no stock loader takes sizes that differ by layer"),
        ({"target_memory": "10KiB", "per_layer": True}, "Leave --per-layer out"),
        ({"target_memory": "10KiB", "target_params": 0.9}, "no other goal goes with it"),
    ):
        with pytest.raises(UsageError, match=sentence):
            compress(dense, out=tmp_path / "out", **options, **short(dense))


def test_the_command_shows_what_was_asked_for_and_what_came_out(tmp_path, capsys):
    options = ("--target-memory", "12MiB", "--batch", 20, "--length", 64, "--pattern", "column", "--no-repair")
    done = run(capsys, "compress", "tiny-mamba2", *options, "--nsamples", 2, "--seqlen", 32, "--out", tmp_path / "out")
    assert done.code == 0
    assert "down to 12.0 MiB of memory for its weights and 20 sequences of 64 tokens" in done.out
    assert "memory, 20 x 64 tokens" in done.out
    outcome = json.loads((tmp_path / "out" / "ssmc.json").read_text())["goal"]["outcome"]
    assert 11 * 2**20 < outcome["memory"] <= 12 * 2**20
    wrong = run(capsys, "compress", "tiny", "--target-memory", "8 gigs")
    assert "Write a number with its unit, such as 8GiB" in wrong.sentence(2)
