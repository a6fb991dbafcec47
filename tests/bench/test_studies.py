"""The studies: constructed layers against running the scan without the removed states, cells against `compress`."""

import copy
import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from benchmarks.studies import layers as study_layers
from benchmarks.studies import models as study_models
from benchmarks.studies import pages as study_pages
from benchmarks.studies import run as studies
from ssmc.compressor import compress, configure
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.scan import scan_states
from ssmc.runtime.tiny import heldout_path
from tests.support.naive import hidden_states, scan_output

SMALL = study_layers.Uniformity(d_inner=3, d_state=4, length=20, samples=2, keep=2, seeds=1, knobs=(0.0, 0.9))
RARE = study_layers.Rare(length=800, seeds=1, rates=(0.005, 0.5), vote_samples=(2,))


def repaired_output(inputs, h, kept, target):
    """The gated output nearest to `target` that the kept states can make: least squares over all of M at once."""
    C, g = inputs.C.double().numpy(), inputs.z.double().numpy()
    gate = g / (1 + np.exp(-g))
    columns = [
        (gate * h[:, 1:, :, k] * C[:, :, None, n]).ravel() for k in kept for n in range(inputs.d_state)
    ]  # y is linear in every entry of M
    design = np.stack(columns, axis=1)
    solution, *_ = np.linalg.lstsq(design, target.ravel(), rcond=None)
    return (design @ solution).reshape(target.shape)


@pytest.mark.parametrize("knob", SMALL.knobs)
def test_errors_and_the_best_set_are_those_of_running_every_subset(knob):
    inputs = study_layers.uniform_layer(SMALL, knob, seed=0)
    h = hidden_states(inputs)
    full = scan_output(inputs, h)
    energy = (full**2).sum()
    errors = {False: {}, True: {}}
    for kept in combinations(range(SMALL.d_state), SMALL.keep):
        errors[False][kept] = ((scan_output(inputs, h, kept=kept) - full) ** 2).sum() / energy
        errors[True][kept] = ((repaired_output(inputs, h, kept, full) - full) ** 2).sum() / energy
    for row in study_layers.uniformity_rows(SMALL, knob, seed=0):
        truth = errors[row["repair"]]
        best = min(truth.values())
        expected = np.mean(list(truth.values())) if row["kept"] is None else truth[tuple(row["kept"])]
        assert row["error"] == pytest.approx(expected, rel=1e-3)
        assert row["best_error"] == pytest.approx(best, rel=1e-3)
        assert row["ratio"] == pytest.approx(expected / best, rel=2e-3)
        assert row["ratio"] >= 0.999


def test_the_knob_makes_states_alike():
    correlations = [study_layers.uniformity_rows(SMALL, knob, seed=0)[0]["correlation"] for knob in SMALL.knobs]
    assert correlations[0] < 0.4
    assert correlations[1] > 0.9


def ranks(kind, rate):
    rows = study_layers.rare_rows(RARE, kind, rate, seed=0)
    return {row["score"].split(",")[0]: row["rank"] for row in rows}


def test_the_vote_forgets_a_rarely_written_state_and_sums_keep_it():
    rank = ranks(study_layers.WRITTEN, 0.005)
    assert rank["sparsessm-vote"] == RARE.d_state  # the first to go
    assert rank["sparsessm-l2"] == rank["energy"] == rank["ghost"] == rank["exact"] == 1
    assert ranks(study_layers.WRITTEN, 0.5)["sparsessm-vote"] == 1


def test_only_scores_that_look_at_the_product_keep_a_state_written_and_read_at_the_same_rare_steps():
    rank = ranks(study_layers.BOTH, 0.005)
    assert rank["energy"] == rank["exact"] == 1
    assert rank["ghost"] == rank["sparsessm-l2"] == rank["sparsessm-vote"] == RARE.d_state


@pytest.mark.parametrize("kind", study_layers.KINDS)
@pytest.mark.parametrize("rate", RARE.rates)
def test_the_rare_state_acts_at_its_rate_and_matters_as_much_at_every_rate(kind, rate):
    study = replace(RARE, length=2000, vote_samples=())
    inputs = study_layers.rare_layer(study, rate, kind, study.samples, seed=1)
    active = torch.ones(inputs.B.shape[:2], dtype=torch.bool)
    for factor, kinds in ((inputs.B, (study_layers.WRITTEN, study_layers.BOTH)), (inputs.C, (study_layers.READ,))):
        if kind in kinds:
            active = factor[..., study_layers.RARE] != 0
    assert active.float().mean() == pytest.approx(rate)
    alone = study_layers.rare_rows(study, kind, rate, seed=1)[0]["alone"]
    assert 0.2 < alone < 0.75  # of 10 + 7 parts of the energy


@pytest.fixture(scope="module")
def subject(tiny):
    """What the command makes of its options, with very little text."""
    args = studies.arguments(["tiny", "--nsamples", "2", "--seqlen", "64", "--window", "64", "--windows", "2"])
    args.only = ["alpha"]
    return studies.read_subject(args)


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "column", "score": "sparsessm-l2", "repair": False},
        {"pattern": "2:4", "scope": "ssm", "score": "sparsessm-vote"},
    ],
)
def test_a_cell_is_what_compress_writes(options, subject, tmp_path):
    """The figure of a table is the perplexity of the model that `ssmc compress` saves with the same options."""
    subject, settings = subject
    row, *_ = study_models.measure(subject, study_models.Cell("t", "r", "c", options))
    compress("tiny", out=tmp_path / "out", nsamples=2, seqlen=64, **options)
    saved = use_fast_scan(load_checkpoint(tmp_path / "out", dtype=torch.float32).model)
    expected = perplexity(saved, subject.text, 64)
    assert row["perplexity"] == pytest.approx(expected.ppl, rel=1e-4)
    dense = np.array(settings["dense_window_nll"])
    assert row["excess_nats"] == pytest.approx(float(np.mean(np.array(expected.window_nll) - dense)), abs=1e-5)


def test_cells_cover_what_the_paper_reports():
    cells = study_models.methods_cells((0.25, 0.5, 0.75))
    places = {(c.column, c.row) for c in cells}
    entrywise = {(table, row) for _, table, row in study_models.PAPER if row not in ("dense", study_models.OURS)}
    assert entrywise <= places
    assert {"2:4", "4:8", "column 25 %", "unstructured 75 %"} <= {c.column for c in cells}
    assert len({(c.table, c.row, c.column) for c in cells}) == len(cells)
    for cell in cells:  # every one is a run that `ssmc compress` would take
        configure(model="tiny", **cell.options)


def test_a_cell_that_cannot_be_measured_says_why(subject):
    cell = study_models.Cell("t", "r", "c", {"pattern": "3:7", "scope": "ssm", "score": "magnitude"})
    assert "groups of 7" in study_models.measure(subject[0], cell)[0]["failed"]


def test_entries_without_memory_forget_and_the_others_do_not(tiny):
    """Against the scan written out: h = dt u B alone where the entry is pruned."""
    model = copy.deepcopy(tiny.model)
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        mixer.A_log[:, ::2] = 0
        hidden = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0))
        study_models.forget_pruned(tiny, model)
        inputs = tiny.architecture.scan_inputs(mixer, *tiny.architecture.expand(mixer, hidden))
        states = scan_states(inputs)[:, 1:]  # (1, 5, N, D)
        drive = (inputs.dt * inputs.u)[:, :, None] * inputs.B[..., None]
    torch.testing.assert_close(states[:, :, ::2], drive[:, :, ::2])
    assert not torch.allclose(states[:, 1:, 1::2], drive[:, 1:, 1::2], atol=1e-3)


def test_entries_are_scored_with_and_without_memory(subject):
    options = {"pattern": "unstructured", "score": "magnitude"}
    plain, forgetful = study_models.measure(subject[0], study_models.Cell(study_models.ENTRIES, "r", "c", options))
    assert (plain["table"], forgetful["table"]) == (study_models.ENTRIES, study_models.FORGETFUL)
    assert plain["perplexity"] != forgetful["perplexity"]


def model_study(name, cells, size=None):
    rows = [
        {
            "table": cell.table,
            "row": cell.row,
            "column": cell.column,
            "perplexity": math.exp(2 + 0.01 * i),
            "nll": 2 + 0.01 * i,
            "excess_nats": 0.01 * i,
            "excess_stderr": 0.001,
            "window_nll": [2 + 0.01 * i, 2 + 0.02 * i],
        }
        for i, cell in enumerate(cells)
    ]
    settings = {"model": "m", "size": size, "dense_perplexity": math.exp(2)}
    conditions = {
        "cpu": "a CPU",
        "torch_threads": 1,
        "device": "cpu",
        "python": "3",
        "versions": {},
        "date": "2000-01-01",
    }
    return {"study": name, "command": "c", "settings": settings, "seconds": 1, "conditions": conditions, "rows": rows}


def test_the_readme_is_rebuilt_from_all_json_present(tmp_path):
    methods = model_study("methods", study_models.methods_cells((0.25, 0.5)), size="370M")
    methods["rows"][0] = {
        "table": "entries",
        "row": "magnitude",
        "column": "unstructured 25 %",
        "failed": "It overflows.",
    }
    alpha = model_study("alpha", study_models.alpha_cells())
    (tmp_path / "methods.json").write_text(json.dumps(methods))
    study_pages.rebuild(tmp_path)
    (tmp_path / "alpha.json").write_text(json.dumps(alpha))
    readme = study_pages.rebuild(tmp_path).read_text()
    titles = [line for line in readme.splitlines() if line.startswith("## ")]
    assert titles == [f"## {study_pages.PAGES[n].title}" for n in ("methods", "alpha")] + ["## The paper's own numbers"]
    figure = next(r for r in methods["rows"] if (r["row"], r["column"]) == ("sparsessm", "unstructured 50 %"))
    assert f"{figure['perplexity']:.3f} (paper 15.04)" in readme
    assert "It overflows." in readme
    first, again = (tmp_path / "alpha.svg").read_bytes(), study_pages.rebuild(tmp_path)
    assert readme == again.read_text()
    assert first == (tmp_path / "alpha.svg").read_bytes()


def test_a_partial_run_keeps_the_other_studies(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "Rare", lambda: RARE)
    monkeypatch.setattr(studies, "Uniformity", lambda: SMALL)
    studies.main(["--only", "uniformity", "--out", str(tmp_path), "--pages", str(tmp_path)])
    kept = (tmp_path / "uniformity.json").read_bytes()
    studies.main(["--only", "rare", "--out", str(tmp_path), "--pages", str(tmp_path)])
    assert (tmp_path / "uniformity.json").read_bytes() == kept
    readme = (tmp_path / "README.md").read_text()
    assert study_pages.PAGES["uniformity"].title in readme
    assert "Written rarely (0.5 % of the steps): always kept by `sparsessm`" in readme
    assert str(tmp_path) not in readme


def test_no_path_of_this_machine_is_published(tmp_path):
    args = studies.arguments([str(tmp_path), "--text", str(heldout_path().parent / "calibration.jsonl")])
    line = studies.command("samples", args)
    assert str(tmp_path.parent) not in line
    assert "--text calibration.jsonl" in line


def test_an_unknown_study_is_refused(capsys):
    with pytest.raises(SystemExit):
        studies.arguments(["--only", "alpha,beta"])
    assert "'beta'" in capsys.readouterr().err
