"""A goal for a hybrid: sizes counted against stock models, the table by kind of layer, candidates carried out."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmc.compressor import compress
from ssmc.compressor.foreseen import configuration_left
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search import hybrid
from ssmc.compressor.search.allocation import Curve
from ssmc.compressor.search.hybrid_latency import REST, KindTable, measure_kinds, read_kind_table, sizes_of
from ssmc.compressor.search.hybrid_sizes import HybridSizes, Removed
from ssmc.exporters import export
from ssmc.exporters.foresight import refuse_left
from ssmc.runtime.errors import UsageError, VerificationError
from ssmc.runtime.measure.latency import Workload
from ssmc.runtime.measure.timing import Ratio
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
    "nemotron_h with latent experts": {"moe_latent_size": 8},
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
    "nemotron_h with experts": MIXERS | {"mlp", "attention", "width"} | EXPERTS,
    "nemotron_h with latent experts": MIXERS | {"mlp", "attention", "width"} | EXPERTS,
    "falcon_h1": MIXERS | {"mlp", "attention", "width"},
    "bamba": MIXERS | {"mlp", "attention", "width"},
    "granitemoehybrid": MIXERS | {"mlp", "attention", "width"} | EXPERTS,
    "granitemoehybrid without experts": MIXERS | {"mlp", "attention", "width"},
    "jamba": {"column", "channel", "attention", "width"} | EXPERTS,
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


def test_what_a_run_leaves_is_foreseen(folder, tmp_path):
    """The oracle is the configuration of the export; experts that stay are fewer and narrower."""
    pattern = "expert+expert-width+width+column"
    result = compress(folder, out=tmp_path / "o", pattern=pattern, sparsity=0.34, round_channels=1, **short(folder))
    exported = AutoConfig.from_pretrained(export(result.directory).directory)
    checkpoint = load_checkpoint(folder)
    plan = make_plan(result.config, checkpoint.architecture, checkpoint.dimensions, checkpoint.config)
    foreseen, dense = configuration_left(plan), checkpoint.config
    for name in ("hidden_size", "ssm_state_size", "n_routed_experts", "moe_intermediate_size"):
        assert getattr(foreseen, name) == getattr(exported, name) < getattr(dense, name)


def test_time_is_that_of_the_kinds_of_layers_less_what_each_axis_saves(folder):
    table = KindTable({"mixer": 6.0, "mlp": 3.0, REST: 1.0}, {"mlp": (0.5, {"mixer": 6.0, "mlp": 1.5, REST: 1.0})}, {})
    assert table.ratio(Removed((("mlp", 0.25),))) == pytest.approx((6 + 3 * 0.75 + 1) / 10)
    sizes = HybridSizes(load_checkpoint(folder), ("column", "mlp"))
    measured = measure_kinds(sizes, Workload("prefill", 1, 16), torch.device("cpu"))
    assert set(measured.seconds) == {"mixer", "attention", "mlp", "mlp+expert", REST}
    assert set(measured.smaller) == {"column", "mlp"}
    assert all(seconds > 0 for seconds in measured.seconds.values())
    for axis, kinds in (("column", {"mixer"}), ("mlp", {"mlp", "mlp+expert"})):
        _, found = measured.smaller[axis]  # what has fewer parameters takes no longer, and all else as long
        assert {kind for kind, seconds in found.items() if seconds != measured.seconds[kind]} <= kinds
        assert all(0 < seconds <= measured.seconds[kind] for kind, seconds in found.items())


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


def test_after_steps_the_loss_is_that_on_sequences_that_no_step_saw(folder, tmp_path):
    options = {"pattern": "mlp+attention", "target_params": 0.992, "distill": 1, **short(folder)}
    manifest = compress(folder, out=tmp_path / "out", **options).manifest
    outcome, done = manifest["goal"]["outcome"], manifest["distilled"]
    assert outcome["excess_nats"] == done["excess"]
    assert outcome["excess_before_steps"] != done["excess_before"]  # that is of the text of the trials


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


def test_a_search_for_a_runtime_keeps_to_what_that_takes(tmp_path):
    """Query heads, d_inner and d_model of a Jamba stay in llama.cpp; the losses of all are measured all the same."""
    dense = saved("jamba without experts", tmp_path)
    options = {"runtime": "llama.cpp", "refuse": partial(refuse_left, "llama.cpp"), "repair": False, **short(dense)}
    result = compress(dense, out=tmp_path / "out", target_params=0.99, **options)
    goal = result.manifest["goal"]
    assert {axis for entry in goal["candidates"] for axis in entry["removed"]} <= {"column", "mlp"}
    assert export(result.directory, runtime="llama.cpp").comparison.max_difference < 1e-3
    with pytest.raises(UsageError, match=r"Nothing that meets the goal with --pattern attention runs in llama.cpp"):
        compress(dense, out=tmp_path / "no", target_params=0.998, pattern="attention", **options)


def test_states_are_rounded_in_a_search(folder, tmp_path):
    options = {"pattern": "column+mlp", "round_to": "power-of-two", "repair": False, **short(folder)}
    result = compress(folder, out=tmp_path / "out", target_params=0.99, **options)
    removed = [entry["removed"].get("column", 0) for entry in result.manifest["goal"]["candidates"]]
    assert {round(8 * (1 - share), 6) for share in removed} <= {1, 2, 4, 8}
    assert len({*removed}) > 2


def test_what_cannot_be_reached_is_refused(folder, tmp_path):
    options = short(folder) | {"calib": tmp_path / "no-such.txt"}  # before any text is read
    table = {"latency_table": a_table(folder, tmp_path / "table.json"), "length": 16}
    for goal, words in (
        ({"target_params": 0.1}, "cannot reach 0.1 of the parameters"),
        ({"target_latency": 0.1, **table}, "cannot reach 0.1 of the time"),
        ({"target_params": 0.9, "pattern": "layer"}, "A search removes column, head, head-dim, mlp, attention"),
    ):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", **goal, **options)
    for options, words in (({"target_params": 0.992, "candidate": 99, "pattern": "mlp+attention"}, "no candidate 99"),):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", **options, **short(folder))
    with pytest.raises(UsageError, match="candidate"):
        compress("tiny", out=tmp_path / "out", target_params=0.9, candidate=2)
    assert not (tmp_path / "out").exists()


def saved(which, directory):
    """A small random model with the tokenizer of `tiny`."""
    family = which.split()[0]
    return with_tokenizer(save_transformers(FAMILIES[family](vocab_size=TINY_VOCAB, **CHANGES[which]), directory / "m"))


def a_table(folder, file, **changes):
    """A table in which half of any axis saves as much of the only kind of layer, so that nothing is timed."""
    sizes = HybridSizes(load_checkpoint(folder))
    smaller = {axis: (0.5, {"all": 0.7 + 0.02 * i, REST: 1.0}) for i, axis in enumerate(sizes.axes)}
    table = KindTable({"all": 1.0, REST: 1.0}, smaller, {}, sizes_of(sizes), Workload("prefill", 1, 16))
    file.write_text(json.dumps(table.to_json() | changes))
    return file


@pytest.fixture
def unclocked(monkeypatch):
    """Models take what the table says, times what is set here."""
    factor = {"times": 1.0}

    def clock(self, several, budget):
        found = {removed: factor["times"] * self.table.added_up(removed) for removed in several}
        return {removed: Ratio(time, time, time, 15) for removed, time in found.items()}

    monkeypatch.setattr(hybrid.HybridSearch, "_clock", clock)
    return factor


@pytest.mark.parametrize("which", CHANGES)
def test_a_share_of_the_time_is_reached_in_every_family_and_any_candidate_can_be_carried_out(
    which, tmp_path, unclocked
):
    """By a table that is given, so that the list of the second search is that of the first."""
    dense = saved(which, tmp_path)
    options = {"latency_table": a_table(dense, tmp_path / "table.json"), "length": 16, "repair": False, **short(dense)}
    result = compress(dense, out=tmp_path / "out", target_latency=0.85, **options)
    goal = result.manifest["goal"]
    assert set(goal["latency_table"]["smaller"]) == AXES[which]
    assert all(entry["time"] <= 0.85 for entry in goal["candidates"])
    assert goal["outcome"]["time"] == pytest.approx(goal["candidates"][goal["chosen"] - 1]["time"])
    last = len(goal["candidates"])
    other = compress(dense, out=tmp_path / "other", target_latency=0.85, candidate=last, **options)
    assert [e["removed"] for e in other.manifest["goal"]["candidates"]] == [e["removed"] for e in goal["candidates"]]
    assert {part: other.config.sparsity_of(part) for part in other.config.parts} == goal["candidates"][-1]["removed"]
    for found in (result, other):
        assert_counted(found, dense)


def assert_counted(found, dense):
    """The export has the parameters that the search counted."""
    smaller = load_checkpoint(export(found.directory).directory)
    counted = found.manifest["goal"]["outcome"]["parameters"]
    assert smaller.parameters / load_checkpoint(dense).parameters == pytest.approx(counted, abs=1e-9)


@pytest.mark.parametrize("which", ["jamba", "granitemoehybrid", "zamba2"])
def test_a_bound_of_the_loss_is_kept_in_every_family(which, tmp_path, unclocked):
    dense = saved(which, tmp_path)
    options = {"latency_table": a_table(dense, tmp_path / "table.json"), "length": 16, **short(dense)}
    result = compress(dense, out=tmp_path / "out", max_ppl_increase=0.5, **options)
    goal = result.manifest["goal"]
    assert goal["chosen"] == 1
    assert goal["outcome"]["ppl_increase"] <= 0.5
    assert goal["candidates"][0]["time"] < 1
    assert_counted(result, dense)


def test_candidates_are_timed_first_and_the_table_set_right(folder, tmp_path, unclocked, monkeypatch):
    """Of models that all take 1.1 times what the table says, those are chosen that it foretells 1 / 1.1 of the goal."""
    options = {"length": 16, "pattern": "column+mlp+attention", **short(folder)}
    sizes, workload = HybridSizes(load_checkpoint(folder)), Workload("prefill", 1, 16)
    given = read_kind_table(a_table(folder, tmp_path / "t"), sizes, workload, torch.device("cpu"))
    monkeypatch.setattr(hybrid, "measure_kinds", lambda *_: given)
    unclocked["times"] = 1.1
    result = compress(folder, out=tmp_path / "out", target_latency=0.9, **options)
    goal = result.manifest["goal"]
    assert goal["latency_table"]["correction"] == pytest.approx(1.1)
    assert goal["outcome"]["time"] <= 0.9
    assert 1 <= len(goal["clocked"]) <= 9
    assert not any("missed" in note for note in result.notes)
    again = compress(  # by the table that was set right, without timing anything
        folder, out=tmp_path / "again", target_latency=0.9, latency_table=tmp_path / "out" / "ssmc.json", **options
    )
    assert again.manifest["goal"]["candidates"] == goal["candidates"]
    unclocked["times"] = 1.5  # a goal that is missed by more than a tenth is told
    late = compress(
        folder, out=tmp_path / "late", target_latency=0.9, latency_table=tmp_path / "out" / "ssmc.json", **options
    )
    assert any("The goal was missed: the model takes 1." in note for note in late.notes)


def test_a_bound_of_the_loss_is_kept_by_searching_on(folder, tmp_path, unclocked, monkeypatch):
    """Where whole candidates cost ten times what their axes do alone, slower ones are tried until one is within."""
    options = {"latency_table": a_table(folder, tmp_path / "t"), "length": 16, **short(folder)}
    trial = hybrid.HybridSearch.try_out

    def dearer(self, removed):
        self.losses[removed] = 0.01 * sum(share for _, share in removed.shares) * 10 ** (len(removed.shares) > 1)
        return self.losses[removed]

    monkeypatch.setattr(hybrid.HybridSearch, "try_out", dearer)
    result = compress(folder, out=tmp_path / "out", max_ppl_increase=0.02, **options)
    goal = result.manifest["goal"]
    assert goal["expected"]["excess_nats"] <= 0.02
    assert goal["candidates"][1]["added_up_nats"] <= 0.02  # what was expected to be within, and was not
    said, outcomes = hybrid.above, []

    def worse_at_first(ours, dense):
        outcomes.append(said(ours, dense) | {"excess_nats": 0.5 if not outcomes else 0.01})
        return outcomes[-1]

    monkeypatch.setattr(hybrid, "above", worse_at_first)
    monkeypatch.setattr(
        hybrid.HybridSearch, "try_out", lambda self, removed: self.losses.setdefault(removed, self.expected(removed))
    )
    monkeypatch.setattr(hybrid.HybridSearch, "_curve", lambda self, axis: Curve((0.5,), (0.02,)))
    again = compress(folder, out=tmp_path / "again", max_ppl_increase=0.02, **options)
    assert len(outcomes) == 2  # what came out of the first was not within the bound
    assert again.manifest["goal"]["outcome"]["excess_nats"] == 0.01
    monkeypatch.setattr(hybrid.HybridSearch, "try_out", lambda self, removed: self.losses.setdefault(removed, 1.0))
    with pytest.raises(VerificationError, match=r"Nothing that was tried keeps .* within 2.00% .* was 171"):
        compress(folder, out=tmp_path / "none", max_ppl_increase=0.02, **options)
    monkeypatch.setattr(hybrid.HybridSearch, "try_out", trial)
    assert not (tmp_path / "none").exists()


def test_a_table_for_something_else_is_refused(folder, tmp_path):
    options = {"target_latency": 0.9, "out": tmp_path / "out", "length": 16, **short(folder)}
    options |= {"calib": tmp_path / "no-such.txt"}  # before any text is read
    table = a_table(folder, tmp_path / "table.json")
    for changes, given, words in (
        ({}, tmp_path / "no-such.json", "cannot be read: No such file"),
        ({"schema": "ssmc-latency/1"}, table, "no latency table of a hybrid"),
        ({"seconds": {"all": 1.0}}, table, "no latency table of a hybrid"),
        ({"correction": -1}, table, "no latency table of a hybrid"),
        ({"device": "cuda"}, table, "is for the device cuda, this run is for cpu"),
        ({"workload": {"phase": "decode"}}, table, "a step of decoding|decod"),
        ({"model": {"parameters": 7}}, table, "is for a model of {'parameters': 7}"),
        ({"smaller": {"mlp": (0.5, {"all": 0.5, REST: 1.0})}}, table, "has no times with fewer column, head"),
    ):
        a_table(folder, table, **changes)
        with pytest.raises(UsageError, match=words):
            compress(folder, latency_table=given, **options)
    assert not (tmp_path / "out").exists()
