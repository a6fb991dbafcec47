"""Runs with a target, from the goal to the artefact: counted, reproducible, honest about what came out."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import Goal, compress, configure, read_recipe
from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.options.patterns import combinable
from ssmc.compressor.search import counting, trials
from ssmc.exporters import export
from ssmc.exporters.cutting import shrink
from ssmc.runtime.bench import LatencyTable, Workload, read_latency_table
from ssmc.runtime.errors import CalibrationError, UsageError, VerificationError
from ssmc.runtime.manifest import read_compressed
from ssmc.runtime.measure.timing import Ratio
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import Dimensions
from tests.support.models import random_mamba2, random_model, save_transformers

SMALL = {"nsamples": 4, "seqlen": 64}
SIZES = Dimensions(4, 16, 32, 4, 3, 4, 4096)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small random model with the tokenizer of `tiny`."""
    folder = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "state_size": 4, "num_hidden_layers": 4}
    save_transformers(random_model(vocab_size=4096, time_step_rank=3, **sizes), folder)
    shutil.copy(load_checkpoint("tiny").directory / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A made-up latency table: half of the time in the blocks' width, a little in their states, a fifth elsewhere."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    block = tuple(tuple(0.15 * w / 32 + 0.05 * n / 4 for n in (1, 4)) for w in (8, 32))
    LatencyTable(SIZES, Workload("prefill", 1, 512), "cpu", "float32", (8, 32), (1, 4), block, 0.2, 4, 6, {}).write(
        path
    )
    return path


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """The clocks run as always, only not for long."""
    for name in ("measure_latency", "time_sizes"):
        monkeypatch.setattr(trials, name, partial(getattr(trials, name), repeats=2, budget=0.1))


def run(dense, out, **options):
    result = compress(dense, out=out, **SMALL, **options)
    return result, result.manifest["goal"]


def test_a_target_of_parameters_is_met_exactly_as_counted(dense, tmp_path):
    _, target = run(dense, tmp_path / "out", target_params=0.98, pattern="layer+column+channel")
    total = sum(p.numel() for p in load_checkpoint(dense).model.parameters())
    smaller = load_checkpoint(export(tmp_path / "out").directory)
    assert sum(p.numel() for p in smaller.model.parameters()) == pytest.approx(target["outcome"]["parameters"] * total)
    assert target["outcome"]["parameters"] <= 0.98
    assert target["expected"]["parameters"] == target["outcome"]["parameters"]
    assert smaller.dimensions.as_dict() | target["sizes"] == smaller.dimensions.as_dict()
    assert target["latency_table"] is None
    assert "time" not in target["outcome"]


def test_width_is_searched_where_nothing_is_timed(dense, tmp_path):
    """By default; the counted share is that of the export, and the run that was found is an ordinary one."""
    result, target = run(dense, tmp_path / "out", target_params=0.6)
    assert "width" in result.config.parts
    assert target["curves"]["width"]["shares"]
    smaller = load_checkpoint(export(tmp_path / "out").directory)
    total = sum(p.numel() for p in load_checkpoint(dense).model.parameters())
    assert sum(p.numel() for p in smaller.model.parameters()) == pytest.approx(target["outcome"]["parameters"] * total)
    assert smaller.dimensions.d_model == target["sizes"]["d_model"] < SIZES.d_model
    with pytest.raises(UsageError, match="tables of times are of one d_model"):
        compress(dense, out=tmp_path / "no", target_latency=0.8, pattern="column+width", **SMALL)


def test_for_llama_cpp_width_and_channels_are_cut_by_one_ratio(dense, tmp_path):
    checkpoint, goal = load_checkpoint(dense), Goal(target_params=0.6)
    config = configure(model=str(dense), pattern="column+channel+width", runtime="llama.cpp")
    found = counting.Counting(checkpoint, config, goal).candidates()
    assert found
    assert all(sizes.d_inner == 2 * (sizes.d_model or 16) for sizes in found)
    _, target = run(dense, tmp_path / "out", target_params=0.6, runtime="llama.cpp", pattern=config.pattern)
    assert target["sizes"]["d_inner"] == 2 * target["sizes"]["d_model"] < 32


def test_heads_and_width_of_a_mamba2_are_cut_by_one_ratio(tmp_path):
    """By default; stock transformers loads the export, which has as many parameters as were counted."""
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "num_hidden_layers": 2, "expand": 2}
    folder = save_transformers(random_mamba2(vocab_size=4096, **sizes), tmp_path / "dense")
    shutil.copy(load_checkpoint("tiny").directory / "tokenizer.json", folder)
    result, target = run(folder, tmp_path / "out", target_params=0.8, pattern="column+head+head-dim+width")
    total, found = sum(p.numel() for p in load_checkpoint(folder).model.parameters()), target["sizes"]
    assert 2 * found["d_model"] == found["d_inner"] < 64
    done = export(result.directory)
    stock = AutoModelForCausalLM.from_pretrained(done.directory)
    assert stock.num_parameters() == pytest.approx(target["outcome"]["parameters"] * total)
    assert stock.config.expand == 2
    for pattern in ("head", "channel"):
        with pytest.raises(UsageError, match=f"Leave {pattern} out of --pattern, or use --pattern head.head-dim.width"):
            compress(folder, out=tmp_path / "no", target_params=0.8, pattern=pattern, **SMALL)


def test_layers_may_have_sizes_of_their_own_where_the_user_allows_it(tmp_path):
    """tiny's first layer matters most for its channels; the ONNX export, which pads nothing, has what was counted."""
    options = {"target_params": 0.85, "pattern": "channel", "nsamples": 4, "seqlen": 256}
    alike = compress("tiny", out=tmp_path / "alike", **options)
    own = compress("tiny", out=tmp_path / "own", per_layer=True, **options)
    widths = own.config.widths
    assert alike.config.widths is None
    assert len(set(widths)) > 1
    assert max(widths) == widths[0]
    before, after = (result.manifest["goal"]["outcome"] for result in (alike, own))
    assert after["parameters"] <= 0.85
    assert after["excess_nats"] < before["excess_nats"]
    weights = own.manifest["goal"]["layer_weights"]["channel"]
    assert sum(weights) == pytest.approx(1)
    assert weights[0] == max(weights)
    again = compress(out=tmp_path / "again", **read_recipe(tmp_path / "own" / "recipe.yaml"))
    assert again.config.widths == widths
    masked = load_checkpoint(tmp_path / "own")
    manifest = read_compressed(tmp_path / "own")
    smaller = shrink(masked, manifest, uneven=True).tensors
    dense = sum(p.numel() for p in load_checkpoint("tiny").model.parameters())
    assert sum(tensor.numel() for tensor in smaller.values()) == pytest.approx(after["parameters"] * dense)


def test_a_target_of_time_takes_the_least_loss_that_was_tried(dense, table, tmp_path):
    _, target = run(dense, tmp_path / "out", target_latency=0.8, latency_table=table)
    model = read_latency_table(table)
    trials = {(t["n_layer"], t["d_inner"], t["d_state"]): t["excess_nats"] for t in target["trials"]}
    allowed = {key: loss for key, loss in trials.items() if model.ratio([key[1:]] * key[0]) <= 0.8}
    chosen = tuple(target["sizes"].values())
    assert chosen in allowed
    assert target["expected"]["time"] == pytest.approx(model.ratio([chosen[1:]] * chosen[0]))
    assert 0 < target["outcome"]["time_low"] <= target["outcome"]["time"] <= target["outcome"]["time_high"]


def test_the_recipe_names_what_was_found_and_gives_the_same_bytes(dense, table, tmp_path):
    found, _ = run(dense, tmp_path / "found", target_latency=0.75, latency_table=table)
    recipe = read_recipe(tmp_path / "found" / "recipe.yaml")
    assert not any(key.startswith(("target_", "max_ppl")) for key in recipe)
    assert set(recipe["pattern"].split("+")) <= set(combinable())
    again = compress(out=tmp_path / "again", **recipe)
    assert "target" not in again.manifest
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    twice, _ = run(dense, tmp_path / "twice", target_latency=0.75, latency_table=tmp_path / "found" / "ssmc.json")
    assert twice.config == found.config


def test_a_bound_of_perplexity_gives_the_fastest_within_it(dense, table, tmp_path):
    _, target = run(dense, tmp_path / "out", max_ppl_increase=0.02, latency_table=table)
    bound = math.log(1.02)
    assert target["outcome"]["excess_nats"] <= bound
    model = read_latency_table(table)
    chosen = model.ratio([tuple(target["sizes"].values())[1:]] * target["sizes"]["n_layer"])
    beyond = [t for t in target["trials"] if t["excess_nats"] > bound]
    assert all(
        model.ratio([(t["d_inner"], t["d_state"])] * t["n_layer"]) < chosen
        for t in beyond
        if t["added_up_nats"] > bound and t["n_layer"] < 4 and t["d_state"] < 4 and t["d_inner"] < 32
    )


def test_a_measured_table_is_kept_in_the_manifest(dense, tmp_path):
    _, target = run(dense, tmp_path / "out", target_latency=0.95, phase="decode", length=16)
    kept = read_latency_table(tmp_path / "out" / "ssmc.json")
    assert kept.workload == Workload("decode", 1, 16)
    assert json.dumps(kept.to_json()) == json.dumps(target["latency_table"])
    assert target["clocked"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_params": 0.01}, r"cannot reach 0\.01 of the parameters \(the least is 0\.9"),
        ({"target_latency": 0.01}, r"cannot reach 0\.01 of the time \(the least is 0\."),
        ({"target_latency": 0.5, "phase": "decode"}, "is for a prefill of 512 tokens at batch 1, this run is for"),
        ({"target_latency": 0.5, "batch": 2}, "a new one is measured"),
    ],
)
def test_what_cannot_be_met_is_said_and_nothing_is_written(dense, table, tmp_path, options, sentence):
    with pytest.raises(UsageError, match=sentence):
        run(dense, tmp_path / "out", pattern="layer+column", latency_table=table, **options)
    assert not (tmp_path / "out").exists()


def test_a_table_of_another_model_is_refused(table, tmp_path):
    with pytest.raises(UsageError, match=r"a model of .* Leave it out, and a new one is measured"):
        compress("tiny", out=tmp_path / "out", target_latency=0.8, latency_table=table, **SMALL)


def test_what_costs_more_than_the_bound_is_refused(tmp_path):
    with pytest.raises(VerificationError, match=r"more than the 1\.0% allowed, so nothing was written"):
        run("tiny", tmp_path / "out", target_params=0.75, max_ppl_increase=0.01, pattern="layer")
    assert not (tmp_path / "out").exists()


def test_trials_are_measured_on_text_they_are_not_fitted_to():
    drawn = torch.arange(20)[:, None]
    spare = Samples.split(drawn, 12)
    assert spare.fit[:, 0].tolist() == list(range(8))
    assert spare.held_out[:, 0].tolist() == list(range(12, 20))
    assert not spare.seen
    assert not spare.notes
    short = Samples.split(drawn[:6], 12)
    assert short.fit[:, 0].tolist() == [0, 1, 2]
    assert short.held_out[:, 0].tolist() == [3, 4, 5]
    assert short.seen
    assert "no samples to spare" in short.notes[0]
    with pytest.raises(CalibrationError, match="at least two calibration samples"):
        Samples.split(drawn[:1], 12)


def test_of_several_attempts_the_best_is_written_and_sizes_are_enumerated_once(dense, table, tmp_path, monkeypatch):
    """A machine on which every pruned model turns out slower than its trial, each later one more so."""
    came_out, clocked, attempts, enumerated = iter((0.8, 0.9, 1.0)), set(), [], []

    def clock(model, architecture, several, workload, **_):
        ratios = []
        for blocks in map(tuple, several):
            attempts.extend([blocks] if blocks in clocked else [])
            ratio = next(came_out) if blocks in clocked else 0.55
            clocked.add(blocks)
            ratios.append(Ratio(ratio, ratio, ratio, 6))
        return ratios

    def enumerate_sizes(*sizes):
        enumerated.append(sizes)
        return every(*sizes)

    every = counting.enumerate_sizes
    monkeypatch.setattr(trials, "measure_latency", lambda *_, **__: read_latency_table(table))
    monkeypatch.setattr(trials, "time_sizes", clock)
    monkeypatch.setattr(counting, "enumerate_sizes", enumerate_sizes)
    result, goal = run(dense, tmp_path / "out", target_latency=0.6, pattern="column+channel", round_channels=4)
    assert len(set(attempts)) == 3
    assert goal["outcome"]["time"] == 0.8
    assert attempts[0] == tuple((goal["sizes"]["d_inner"], goal["sizes"]["d_state"]) for _ in attempts[0])
    assert any("0.800 of the dense one's time, 0.600 were asked for" in note for note in result.notes)
    assert load_checkpoint(export(tmp_path / "out").directory).dimensions.d_inner == goal["sizes"]["d_inner"]
    assert len(enumerated) == 3  # once a search, however many curves it measures


def test_with_distillation_candidates_are_judged_after_a_few_steps(dense, tmp_path):
    result = compress(dense, out=tmp_path / "out", target_params=0.97, pattern="layer+channel", distill=2, **SMALL)
    goal = result.manifest["goal"]
    taught = {(t["n_layer"], t["d_inner"]): t["excess_nats"] for t in goal["taught"]}
    at_once = {(t["n_layer"], t["d_inner"]): t["excess_nats"] for t in goal["trials"]}
    found = (goal["sizes"]["n_layer"], goal["sizes"]["d_inner"])
    assert len(taught) > 1
    assert found == min(taught, key=taught.get)
    assert all(loss != at_once[sizes] for sizes, loss in taught.items())
    assert goal["expected"]["excess_nats"] == taught[found]
    assert result.manifest["distilled"]["steps"] == 2
    assert goal["outcome"]["excess_nats"] != goal["outcome"]["excess_before_steps"]


def test_trials_choose_layers_once_and_the_run_takes_their_choice(dense, tmp_path, monkeypatch):
    from ssmc.compressor.methods.layers.scores import MambaShedder

    chosen, choose = [], MambaShedder.choose
    monkeypatch.setattr(MambaShedder, "choose", lambda *told: chosen.append(choose(*told)) or chosen[-1])
    result = compress(dense, out=tmp_path / "out", target_params=0.97, pattern="layer", **SMALL)
    assert len(chosen) == 1
    again = compress(
        dense, out=tmp_path / "again", pattern="layer", sparsity=result.config.sparsity_of("layer"), **SMALL
    )
    assert [r.layer for r in result.removals] == [r.layer for r in again.removals]
    assert result.manifest["removed"] == again.manifest["removed"]
