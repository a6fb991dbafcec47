"""Damaged files of every kind, a few of each: the long run is `make fuzz`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssmc.runtime.errors import CheckpointError, UsageError
from tests.fuzz.engine import fuzz, kept, try_one
from tests.fuzz.guard import Violation, check, check_message
from tests.fuzz.targets import NAMES, SEEDS, target

ROOT = Path(__file__).parents[2]

EXAMPLES = 25


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_in_a_sentence_or_read(base, name):
    outcome = fuzz(target(name, base), EXAMPLES, number=20261127)
    assert outcome.tried == EXAMPLES
    assert not outcome.failures


def test_what_was_once_read_wrongly_is_not_any_more(base):
    names = [folder.name for folder in SEEDS.iterdir()]
    assert names
    for name in names:
        one = target(name, base)
        assert kept(one)
        for seed, path in kept(one):
            try_one(one, seed, path.read_bytes())


def boom():
    raise KeyError("no sentence")


def wait():
    time.sleep(30)


def spin():
    while True:
        pass


def refuse_badly():
    raise UsageError("no end")


@pytest.mark.parametrize(
    ("do", "kind"),
    [
        (boom, "traceback"),
        (refuse_badly, "message"),
        (lambda: Path("/tmp/ssmc-outside").mkdir(), "touched"),
        (lambda: os.rename("/tmp/ssmc-not-there", "/tmp/ssmc-outside"), "touched|traceback"),
        (lambda: subprocess.run(["true"], check=True), "touched"),
    ],
)
def test_a_reader_that_does_wrong_is_noticed(tmp_path, do, kind):
    with pytest.raises(Violation, match=kind):
        check(do, tmp_path, size=100)
    Path("/tmp/ssmc-outside").is_dir() and Path("/tmp/ssmc-outside").rmdir()


def test_a_reader_that_takes_much_memory_is_noticed(tmp_path):
    """In a process of its own: one that has had more before does not grow by it."""
    program = (
        "import sys; from pathlib import Path; from tests.fuzz.guard import Violation, check\n"
        "try: check(lambda: bytearray(300 << 20).replace(b'x', b'y'), Path(sys.argv[1]), size=100)\n"
        "except Violation as violation: print(violation.kind)"
    )
    arguments = [sys.executable, "-c", program, tmp_path]
    ran = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "memory\n"


@pytest.mark.parametrize(("do", "limit"), [(wait, "WALL"), (spin, "SECONDS")])
def test_a_reader_that_hangs_is_noticed(tmp_path, monkeypatch, do, limit):
    monkeypatch.setattr(f"tests.fuzz.guard.{limit}", 0.1)
    with pytest.raises(Violation, match="hang"):
        check(do, tmp_path, size=100)


def test_messages_are_one_printable_line():
    message = str(CheckpointError("two\nlines, \x1b[31mcolour, \ud800 and " + "much " * 1000 + "more."))
    check_message(message)
    assert message.startswith("two lines, \\x1b[31mcolour, \\ud800 and much")
    assert message.endswith("more.")
