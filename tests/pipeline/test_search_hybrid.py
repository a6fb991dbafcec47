"""A goal for a hybrid: sizes counted against stock models, the table by kind of layer, candidates carried out."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress
from ssmc.compressor.search.hybrid_latency import REST, KindTable, measure_kinds
from ssmc.compressor.search.hybrid_sizes import HybridSizes, Removed
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.measure.latency import Workload
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.support.families import FAMILIES, TINY_VOCAB, random_ids, short, with_tokenizer
from tests.support.models import save_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Nemotron-H with the tokenizer of `tiny`, as a user has it."""
    directory = tmp_path_factory.mktemp("dense") / "m"
    return with_tokenizer(save_transformers(FAMILIES["nemotron_h"](vocab_size=TINY_VOCAB), directory))


WITHOUT_EXPERTS = ["linear_attention", "mlp", "full_attention", "linear_attention"]
CHANGES = {
    "nemotron_h": {"layers_block_type": WITHOUT_EXPERTS},
    "nemotron_h with experts": {},
    "falcon_h1": {},
    "bamba": {"mamba_n_groups": 1},
    "granitemoehybrid": {"mamba_n_groups": 1},
    "granitemoehybrid without experts": {"mamba_n_groups": 1, "num_local_experts": 0},
    "jamba": {},
    "jamba without experts": {"num_experts": 1},
    "zamba2": {"mamba_ngroups": 1},
}
MIXERS, EXPERTS = {"column", "head", "head-dim"}, {"expert", "expert-width"}
AXES = {
    "nemotron_h": MIXERS | {"mlp", "attention", "width"},
    "nemotron_h with experts": MIXERS | {"mlp", "attention"} | EXPERTS,
    "falcon_h1": MIXERS | {"mlp", "attention", "width"},
    "bamba": MIXERS | {"mlp", "attention", "width"},
    "granitemoehybrid": MIXERS | {"mlp", "attention"} | EXPERTS,
    "granitemoehybrid without experts": MIXERS | {"mlp", "attention", "width"},
    "jamba": {"column", "channel", "attention"} | EXPERTS,
    "jamba without experts": {"column", "channel", "mlp", "attention", "width"},
    "zamba2": MIXERS,
}


@pytest.mark.parametrize("which", CHANGES)
def test_parameters_are_those_of_stock_models_of_these_sizes(which, tmp_path):
    family, changes = which.split()[0], CHANGES[which]
    checkpoint = load_checkpoint(save_transformers(FAMILIES[family](**changes), tmp_path / "m"))
    sizes = HybridSizes(checkpoint)
    candidates = sizes.candidates()
    assert {axis for removed in candidates for axis in removed.by_axis} == AXES[which]
    for removed in random.Random(0).sample(candidates, 3):
        stock = AutoModelForCausalLM.from_config(sizes.smaller(removed))
        constants = sum(b.numel() for name, b in stock.named_buffers() if name in stock.state_dict())
        counted = stock.num_parameters() + constants
        assert sizes.share_of_parameters(removed) == pytest.approx(counted / sizes.parameters, abs=1e-12)


def test_time_is_that_of_the_kinds_of_layers_less_what_each_axis_saves(folder):
    table = KindTable({"mixer": 6.0, "mlp": 3.0, REST: 1.0}, {"mlp": (0.5, {"mixer": 6.0, "mlp": 1.5, REST: 1.0})}, {})
    assert table.ratio(Removed((("mlp", 0.25),))) == pytest.approx((6 + 3 * 0.75 + 1) / 10)
    sizes = HybridSizes(load_checkpoint(folder), ("column", "mlp"))
    measured = measure_kinds(sizes, Workload("prefill", 1, 16), torch.device("cpu"))
    assert set(measured.seconds) == {"mixer", "attention", "mlp", "mlp+expert", REST}
    assert set(measured.smaller) == {"column", "mlp"}
    assert all(seconds > 0 for seconds in measured.seconds.values())


def test_a_share_of_the_parameters_is_reached_and_any_candidate_can_be_carried_out(folder, tmp_path):
    options = {"pattern": "mlp+attention", "target_params": 0.992, **short(folder)}
    result = compress(folder, out=tmp_path / "best", **options)
    goal = result.manifest["goal"]
    losses = [entry["added_up_nats"] for entry in goal["candidates"]]
    assert 1 < len(losses) <= 10
    assert losses == sorted(losses)
    assert all(entry["parameters"] <= 0.992 for entry in goal["candidates"])
    tried = {n: e["excess_nats"] for n, e in enumerate(goal["candidates"], 1) if e["excess_nats"] is not None}
    assert goal["chosen"] == min(tried, key=lambda n: (tried[n], n))
    smaller = load_checkpoint(export(result.directory).directory)
    assert smaller.parameters / load_checkpoint(folder).parameters == pytest.approx(goal["outcome"]["parameters"])
    other = compress(folder, out=tmp_path / "other", candidate=2, **options)
    wanted = goal["candidates"][1]["removed"]
    assert other.manifest["goal"]["chosen"] == 2
    assert {part: other.config.sparsity_of(part) for part in other.config.parts} == wanted


@pytest.mark.parametrize(
    ("family", "pattern", "share"),
    [("granitemoehybrid", "expert+expert-width", 0.985), ("jamba", "expert+column", 0.985), ("zamba2", "head", 0.99)],
)
def test_a_goal_is_met_in_every_family(family, pattern, share, tmp_path):
    """Experts, Mamba-1 mixers and shared blocks: the export, in stock transformers, has what was counted."""
    changes = {"zamba2": {"mamba_ngroups": 1}}.get(family, {})
    dense = with_tokenizer(save_transformers(FAMILIES[family](vocab_size=TINY_VOCAB, **changes), tmp_path / "m"))
    result = compress(dense, out=tmp_path / "out", pattern=pattern, target_params=share, **short(dense))
    counted = result.manifest["goal"]["outcome"]["parameters"]
    assert counted <= share
    smaller, whole = load_checkpoint(export(result.directory).directory), load_checkpoint(dense)
    assert smaller.parameters / whole.parameters == pytest.approx(counted, abs=1e-9)
    assert torch.isfinite(AutoModelForCausalLM.from_pretrained(smaller.directory)(random_ids(1, 8)).logits).all()


def test_what_cannot_be_reached_is_refused(folder, tmp_path):
    for options, words in (
        ({"target_params": 0.1}, "cannot reach 0.1 of the parameters"),
        ({"target_params": 0.9, "pattern": "layer"}, "A search removes column, head, head-dim, mlp, attention"),
        ({"target_params": 0.992, "candidate": 99, "pattern": "mlp+attention"}, "no candidate 99"),
    ):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", **options, **short(folder))
    with pytest.raises(UsageError, match="candidate"):
        compress("tiny", out=tmp_path / "out", target_params=0.9, candidate=2)
    assert not (tmp_path / "out").exists()
