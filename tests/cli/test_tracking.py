"""What a run measures, logged: to a CSV file here; to mlflow, wandb and trackio where they are installed."""

import csv
import importlib.util
import json

import pytest

from ssmc.runtime.errors import OutputError, UsageError
from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.tracking import RunInfo, Tracker, numbers_in, register_tracker, tracked, tracker_names
from ssmc.runtime.tracking.tracker import TRACKERS
from tests.support.commandline import run

FEW = ("--nsamples", "1", "--seqlen", "32", "--score", "energy")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_errors_and_times_of_every_layer_in_a_csv_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = run(capsys, "compress", "tiny", "--out", "half", *FEW, "--log-to", "csv")
    assert done.code == 0, done.err
    assert "Logged to ssmc-logs/half.csv" in done.words
    found = rows(tmp_path / "ssmc-logs" / "half.csv")
    layers = json.loads((tmp_path / "half" / MANIFEST).read_text())["layers"]
    for name in ("error", "error_unrepaired"):
        logged = [(int(r["step"]), float(r["value"])) for r in found if r["name"] == name]
        assert logged == [(number, layer[name]) for number, layer in enumerate(layers)]
    seconds = [float(r["value"]) for r in found if r["name"] == "seconds"]
    (total,) = (float(r["value"]) for r in found if r["name"] == "total_seconds")
    assert len(seconds) == len(layers)
    assert 0 < sum(seconds) < total
    options = {r["name"]: r["value"] for r in found if r["kind"] == "option"}
    assert options == {"command": "compress", "model": "tiny", "nsamples": "1", "seqlen": "32", "score": "energy"}
    assert found[-1] == {"kind": "end", "step": "", "name": "status", "value": "done"}


def test_a_run_that_fails_says_so_and_nothing_is_overwritten(tmp_path, capsys):
    logs = ("--log-to", "csv", "--log-dir", tmp_path / "logs")
    for _ in range(2):
        done = run(capsys, "compress", "tiny", "--out", tmp_path / "half", "--calib", tmp_path / "no.txt", *logs)
        done.sentence(4)
    one, other = rows(tmp_path / "logs" / "half.csv"), rows(tmp_path / "logs" / "half-2.csv")
    assert one == other
    assert one[-1]["value"] == "failed"


def test_what_cannot_be_logged_to_is_refused_before_any_work(tmp_path, capsys):
    out = ("--out", tmp_path / "half")
    assert "Choose csv, mlflow, trackio, wandb" in run(capsys, "compress", "tiny", *out, "--log-to", "paper").sentence(
        2
    )
    for name in tracker_names():
        package = TRACKERS.find(name).package
        if package and importlib.util.find_spec(package) is None:
            said = run(capsys, "compress", "tiny", *out, "--log-to", f"csv,{name}", "--log-dir", tmp_path).sentence(2)
            assert f"pip install 'ssmc[{name}]'" in said
    (tmp_path / "file").write_text("")
    said = run(capsys, "compress", "tiny", *out, "--log-to", "csv", "--log-dir", tmp_path / "file").sentence(5)
    assert "--log-dir" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.fixture
def faulty():
    class Faulty(Tracker):
        name = "faulty"
        at = "log"

        def start(self, run):
            if self.at == "start":
                raise ConnectionError("no server")

        def log(self, figures, step=None):
            raise ConnectionError("the server has gone")

        def finish(self, failed):
            raise AssertionError("it had failed before")

    yield register_tracker(Faulty)
    TRACKERS._registered.pop("faulty")


def test_a_tracker_that_fails_does_not_take_the_result_with_it(tmp_path, faulty):
    info, said = RunInfo("compress", "half", {}, tmp_path), []
    with tracked(["faulty", "csv"], info, said) as tracking:
        tracking.layers([{"error": 0.5}])
    assert said[0] == "The log is not whole: faulty failed (the server has gone)."
    assert ("figure", "0", "error", "0.5") in [tuple(row.values()) for row in rows(tmp_path / "half.csv")]
    faulty.at = "start"
    with pytest.raises(OutputError, match=r"faulty failed \(no server\)"), tracked(["faulty"], info):
        raise AssertionError("the run has begun")
    with pytest.raises(ValueError, match="there already"):
        register_tracker(TRACKERS.find("csv"))
    with pytest.raises(UsageError), tracked(["nowhere"], info):
        pass


def test_numbers_of_records():
    modules = [{"name": "in_proj", "error": 0.25, "target": "0.5"}, {"name": "out_proj", "error": None}]
    record = {"kept": [3, 4, 5], "error": 0.5, "repaired": True, "modules": modules, "goal": {"a(b)": 2}, "x": 1e999}
    assert numbers_in(record) == {"kept": 3.0, "error": 0.5, "modules/in_proj/error": 0.25, "goal/a_b_": 2.0}


@pytest.mark.parametrize("name", [name for name in tracker_names() if name != "csv"])
def test_other_peoples_trackers_where_they_are_installed(tmp_path, monkeypatch, name):
    pytest.importorskip(TRACKERS.find(name).package)
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    said = []
    with tracked([name], RunInfo("compress", "half", {"seqlen": 32}, tmp_path / "logs"), said) as tracking:
        tracking.layers([{"error": 0.5, "modules": [{"name": "in_proj", "error": 0.25}]}])
    assert len(said) == 1
    assert said[0].startswith("Logged to")
    assert any(path.is_file() for path in (tmp_path / "logs").rglob("*"))
