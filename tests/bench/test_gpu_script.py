"""The script for a GPU machine: every section ends in time and leaves a row, whatever becomes of it."""

import json
import subprocess
import sys
import time

import pytest

from benchmarks import gpu

SCAN = next(section.seconds for section in gpu.SECTIONS if section.name == "scan")
LOG = """\
tests/a.py::test_one[x y-{'a': 1}] PASSED                                   [ 25%]
tests/a.py::test_two FAILED                                                 [ 50%]
tests/a.py::test_three[2] ERROR                                             [ 75%]
tests/a.py::test_four SKIPPED (needs a GPU)                                 [100%]
FAILED tests/a.py::test_two - AssertionError: 1 - 2
ERROR tests/a.py::test_three[2] - KeyError: 'x'
"""


def test_tests_are_counted_and_those_that_failed_are_named():
    assert gpu.test_rows(LOG) == [
        {"what": "1 error, 1 failed, 1 passed, 1 skipped"},
        {"what": "tests/a.py::test_two", "note": "FAILED AssertionError: 1 - 2"},
        {"what": "tests/a.py::test_three[2]", "note": "ERROR KeyError: 'x'"},
    ]
    assert gpu.test_rows("") == [{"what": "no tests ran"}]


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(gpu, "LAST_WORDS", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    scripts = ["pass", "raise SystemExit(3)", stubborn]
    started = [
        subprocess.Popen([sys.executable, "-c", s], stdout=subprocess.PIPE, start_new_session=True) for s in scripts
    ]
    started[2].stdout.readline()  # it ignores the signal from now on
    begin = time.perf_counter()
    assert gpu.wait(started, begin + 1) == "exit code 3, stopped at its time limit"
    assert all(process.poll() is not None for process in started)


def test_sections_are_chosen_by_name_with_limits_of_their_own():
    assert [(s.name, s.seconds) for s in gpu.chosen("scan, tests=7")] == [
        ("scan", SCAN),
        ("tests", 7),
    ]
    with pytest.raises(SystemExit, match="no section 'scans'"):
        gpu.chosen("scans")
    with pytest.raises(SystemExit, match="no section 'scan=x'"):
        gpu.chosen("scan=x")


def test_a_section_that_fails_has_a_row_that_says_why(tmp_path, capsys):
    records = {
        "gone": gpu.run(gpu.Section("gone", 5, "nowhere"), 5, tmp_path, True),
        "wrong": gpu.run(gpu.Section("wrong", 60), 60, tmp_path, True),
    }
    assert records["gone"]["failed"] == "there is no benchmarks/nowhere.py"
    assert records["wrong"]["failed"].startswith("exit code 2: ")
    gpu.save(tmp_path / "out", records, tmp_path)
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()).keys() == records.keys()
    gpu.show(records, True)
    assert "there is no benchmarks/nowhere.py" in " ".join(capsys.readouterr().out.split())
