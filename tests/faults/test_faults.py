"""Runs that are killed at some of their steps; `make faults` tries all of them, and full disks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmc.runtime.errors import UsageError
from ssmc.runtime.resumable import _lines, resumable

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_runs_go_on_to_the_same_bytes_and_changed_models_are_seen_and_processes_share_a_run():
    command = [sys.executable, "-m", "tests.faults.run", "--few", "3", "--cases", "kill", "overwritten", "processes"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert len(found) == 5
    assert all(case["tried"] for case in found.values())
    assert not any(case["wrong"] for case in found.values()), found


def begun(path, run=None, resume=False):
    return resumable(path, run or {"options": {"a": [1]}}, {"command": "x"}, force=False, marker="m", resume=resume)


def cut_off(path, steps, **how):
    """A run that ends in the middle, as one on a full disk does."""

    def run():
        with begun(path, **how) as work:
            for step in steps:
                work.finished(step, {"n": step})
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        run()


def test_a_journal_that_was_cut_in_a_line_counts_up_to_there(tmp_path):
    cut_off(tmp_path / "out", [0, 1, 2])
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    with begun(tmp_path / "out", resume=True) as work:
        assert work.steps == {0: {"n": 0}, 1: {"n": 1}}
        assert work.about == {"command": "x"}
        (work.folder / "m").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_after_a_power_cut_only_what_was_forced_to_the_disk_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("ssmc.runtime.resumable.SYNC", 0.0)
    cut_off(tmp_path / "out", [0, 1])
    monkeypatch.setattr("ssmc.runtime.resumable.SYNC", 1e9)
    cut_off(tmp_path / "out", [2], resume=True)
    assert len(_lines(tmp_path / ".out.partial" / "journal.jsonl")) == 4
    monkeypatch.setattr("ssmc.runtime.resumable._boot", lambda: "another start of the machine")
    with begun(tmp_path / "out", resume=True) as work:
        assert list(work.steps) == [0, 1]


def test_another_run_is_not_resumed_and_a_new_one_says_what_it_removed(tmp_path):
    cut_off(tmp_path / "out", [0])
    with (
        pytest.raises(UsageError, match=r"begun with another options"),
        begun(tmp_path / "out", {"options": {"a": [2]}}, resume=True),
    ):
        pass
    with begun(tmp_path / "out") as work:
        assert not work.steps
        assert work.notes == ["Removed .out.partial, which a run that was cut off had left beside out."]


def test_a_run_that_goes_on_removes_what_others_left(tmp_path):
    cut_off(tmp_path / "out", [0])
    (tmp_path / ".out.tmp-1").mkdir()  # of one that died while it looked whether the disk can be written
    with begun(tmp_path / "out", resume=True) as work:
        assert list(work.steps) == [0]
        assert ".out.tmp-1" in work.notes[0]
        (work.folder / "m").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_user_who_ends_a_short_run_finds_nothing(tmp_path):
    def run():
        with begun(tmp_path / "a" / "out") as work:
            work.finished(0, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not list(tmp_path.iterdir())
