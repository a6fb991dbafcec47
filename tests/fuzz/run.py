"""The long run: `python -m tests.fuzz.run`, each target in a process of its own, so that a crash is one finding.

Writes build/fuzz/fuzz.json, fuzz.log and every input that failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.targets import NAMES

BEYOND = 4 << 30  # address space that one target may take beyond what it has after its set-up


def main() -> int:
    """Run all targets, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(NAMES))
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=40, help="inputs for each target that go through a command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return _inside(arguments)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(out / "fuzz.log")],
    )
    file = out / "fuzz.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.targets:
        results[name] = _outside(name, arguments)
        file.write_text(json.dumps(results, indent=1) + "\n")
        found = results[name]
        logging.info(
            "%-18s %6d inputs, %5d read, %d failures, %.0f s",
            name,
            found["tried"],
            found["read"],
            len(found["failures"]),
            found["seconds"],
        )
        for what in found["failures"]:
            logging.info("    %s", what)
    return int(any(results[name]["failures"] for name in arguments.targets))


def _outside(name: str, arguments: argparse.Namespace) -> dict:
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--inside", "--examples", str(arguments.examples)]
    command += ["--seed", str(arguments.seed), "--commands", str(arguments.commands)]
    command += ["--out", str(arguments.out)]
    with (arguments.out / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        place = arguments.out / f"{name}-current"
        found = {
            "tried": 0,
            "read": 0,
            "failures": [f"the process ended with {done.returncode}, see {name}.log, {place}"],
        }
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _inside(arguments: argparse.Namespace) -> int:
    from tests.fuzz.commands import fuzz_commands
    from tests.fuzz.engine import fuzz
    from tests.fuzz.targets import target

    name, number, out = arguments.targets[0], arguments.seed, arguments.out
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as base:
        sys.dont_write_bytecode = True
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = base  # which torch makes when lm-eval imports it
        one = target(name, Path(base))
        _limit_memory()
        outcome = fuzz(one, arguments.examples, number, stuck=True, current=out / f"{name}-current")
        through = fuzz_commands(one, arguments.commands, number, Path(base))
    failures = {**outcome.failures, **{f"command {key}": value for key, value in through.failures.items()}}
    for index, (what, seed_name, content) in enumerate(failures.values()):
        (out / f"{name}-{index}-{seed_name}.bin").write_bytes(content)
        (out / f"{name}-{index}-{seed_name}.txt").write_text(what + "\n", errors="backslashreplace")
    record = {k: v for k, v in asdict(outcome).items() if k != "failures"} | {"commands": through.tried}
    record["failures"] = [f"{key}: {what}"[:300] for key, (what, *_) in failures.items()]
    print()
    print(json.dumps(record))
    return 0


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BEYOND, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
