"""Everything a GPU machine can show, in one call: the tests of what runs there, then one section after the other.

    python benchmarks/gpu.py --out gpu-results               # on a machine with a CUDA GPU: all sections, one table
    python benchmarks/gpu.py --out gpu-results --minutes 5   # what fits, in order of worth
    python benchmarks/gpu.py --only scan,tests=120           # these, the tests for at most 120 seconds
    python benchmarks/gpu.py --dry-run                       # toy sizes, also on a CPU: figures mean nothing

Every section is a process of its own with a time limit, so that one that crashes the GPU or hangs takes nothing with
it. Its rows are written while it runs; `gpu.json` and `logs.tar.gz` in --out are written anew after each. A section
that fails keeps the rows it had and gets one more that says why.

Sections, most worth first:

- `tests`: pytest of every test file that runs kernels, by name, one process for files that compile the same kernels.
- `tune`: every way to run the Mamba-1 scan; the best are kept.   - `scan`: against its bytes and mamba-ssm, by what
  tune chose.   - `gradients`: forward and backward (all three: gpu_scan.py).   - `ssd`: the Mamba-2 scan (gpu_ssd.py).
- `decode`: a token of a 22 M Mamba, launched from Python, from a CUDA graph, as `ssmc generate` runs it, by mamba-ssm;
  with states in half precision and int8.
- `compress`: 130M shapes, 64 x 2048 tokens, as a command.   - `start-up`: imports, and a compress of next to nothing.
- `commands`: every command on the embedded models, beside mamba_ssm and causal_conv1d where they are installed.
- `2:4`: modules on sparse tensor cores.   - `2:4 model`: a model of them.   - `refine`: steps a second.
- `bench`: the report of `ssmc bench` of 16 and of 8 states.

Weights are random. Nothing of the GPU's settings is changed; power limit and clocks are read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
ROOT = HERE.parent
LAST_WORDS = 8.0  # seconds that a section gets to end by itself when its time is up
LEAST = 0.3  # of its seconds, that a section needs to show anything
TESTS = (  # every file of the first kind is a process of its own: kernels of different files are different ones
    "tests/scan/test_triton*.py",
    (
        "tests/bench/test_bench_gpu.py",
        "tests/pipeline/test_placement.py",
        "tests/exporters/test_sparse24*.py",
        "tests/families/test_stock_kernels.py",
        "tests/cli/test_recorded_steps.py",
        "tests/scan/test_fast.py",
    ),
)


OUTCOME = re.compile(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


@dataclass(frozen=True)
class Section:
    """One part of the measurement."""

    name: str
    seconds: float  # it takes at most
    script: str = "gpu_sections"
    arguments: tuple[str, ...] = ()


SECTIONS = (
    Section("tests", 180),
    Section("tune", 110, "gpu_scan", ("--section", "tune")),
    Section("scan", 60, "gpu_scan", ("--section", "scan")),
    Section("gradients", 30, "gpu_scan", ("--section", "gradients")),
    Section("ssd", 90, "gpu_ssd"),
    Section("decode", 45),
    Section("compress", 75),
    Section("start-up", 60),
    Section("commands", 90),
    Section("2:4", 30),
    Section("2:4 model", 30),
    Section("refine", 40),
    Section("bench", 90),
)


def commands(section: Section, seconds: float, result: Path, dry_run: bool) -> list[list[str]]:
    """What to run for a section, all at once."""
    if section.name == "tests":
        groups = [[str(file.relative_to(ROOT))] for file in sorted(ROOT.glob(TESTS[0]))]
        groups.append(sorted({str(file.relative_to(ROOT)) for pattern in TESTS[1] for file in ROOT.glob(pattern)}))
        options = ["-v", "--tb=short", "--durations=15", "-p", "no:cacheprovider", "-o", "addopts="]
        return [
            [sys.executable, "-m", "pytest", *options, *(["--collect-only", "-q"] if dry_run else []), *files]
            for files in groups
        ]
    own = ["--section", section.name] if section.script == "gpu_sections" else list(section.arguments)
    limits = ["--json", str(result), "--seconds", f"{seconds:.0f}"]
    return [[sys.executable, "-m", f"benchmarks.{section.script}", *own, *limits, *(["--dry-run"] if dry_run else [])]]


def run(section: Section, seconds: float, folder: Path, dry_run: bool) -> dict[str, Any]:
    """Run one section to its end or its limit; what it found, and why it ended."""
    slug = section.name.replace(":", "").replace(" ", "-")
    result = folder / f"{slug}.json"
    if not (HERE / f"{section.script}.py").is_file():
        return {"rows": [], "seconds": 0.0, "failed": f"there is no benchmarks/{section.script}.py"}
    logs = [folder / f"{slug}-{i}.log" for i in range(len(commands(section, seconds, result, dry_run)))]
    begin = time.perf_counter()
    started = []
    for log, command in zip(logs, commands(section, seconds - LAST_WORDS - 2, result, dry_run), strict=True):
        with log.open("wb") as file:
            environment = {"OMP_NUM_THREADS": "4", **os.environ, "PYTHONUNBUFFERED": "1", **bytecode(folder)}
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )  # fmt: skip
    failed = wait(started, begin + seconds)
    found: dict[str, Any] = {"seconds": time.perf_counter() - begin, "failed": failed}
    if section.name == "tests":
        return {**found, "rows": [row for log in logs for row in test_rows(log.read_text(errors="replace"))]}
    try:
        record = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {"rows": []}
    if failed is not None:
        found["failed"] = f"{failed}: {last_line(logs[0])}"
    return {**record, **found}


def bytecode(folder: Path) -> dict[str, str]:
    """Where Python keeps what it compiles, if it has nowhere: else every process compiles torch anew."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None or Path(cache_from_source(torch.origin)).is_file():
        return {}
    return {"PYTHONPYCACHEPREFIX": str(folder.parent / "ssmc-bytecode"), "PYTHONDONTWRITEBYTECODE": ""}


def wait(started: list[subprocess.Popen], end: float) -> str | None:
    """Wait for all, end those that take too long; why not all ended well, or None."""
    late = [process for process in started if not ended(process, end - LAST_WORDS)]
    for process in late:
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
    for process in late:
        if not ended(process, end):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    codes = [process.returncode for process in started if process not in late and process.returncode]
    reasons = [f"exit code {code}" for code in codes] + ["stopped at its time limit" for _ in late]
    return ", ".join(dict.fromkeys(reasons)) or None


def ended(process: subprocess.Popen, end: float) -> bool:
    """Whether it ends in time."""
    try:
        process.wait(max(0.1, end - time.perf_counter()))
    except subprocess.TimeoutExpired:
        return False
    return True


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def test_rows(log: str) -> list[dict[str, str]]:
    """How many tests passed, and a row for each that did not."""
    outcomes: dict[str, str] = {}
    for line in log.splitlines():
        if found := OUTCOME.match(line):  # ids may have spaces
            outcomes[found[1]] = found[2]
    reasons = {}
    for line in log.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            name, _, why = line.partition(" ")[2].partition(" - ")
            reasons[name] = why
    counts = {o: sum(v == o for v in outcomes.values()) for o in sorted(set(outcomes.values()))}
    rows = [{"what": ", ".join(f"{count} {outcome.lower()}" for outcome, count in counts.items()) or "no tests ran"}]
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    return rows + [{"what": name, "note": f"{outcomes[name]} {reasons.get(name, '')}".strip()[:400]} for name in bad]


COLUMNS = ("what", "before", "after", "ratio", "note")


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(name: str, record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A section's rows as the table shows them."""
    for row in record.get("rows", []):
        what, note = str(row.get("what", "")), [str(row["note"])] if row.get("note") else []
        if "ours" in row:  # gpu_scan.py counts in seconds
            ours, floor = row.get("ours"), row.get("floor")
            after = "" if ours is None else f"{1e6 * ours:.1f} us"
            share = "" if not ours or not floor else f"{ours / floor:.1f} x the bytes' time"
            yield name, what, "", after, "", "; ".join(str(p) for p in (row.get("against"), share, *note) if p)
            continue
        others = [f"{key} {short(value)}" for key, value in row.items() if key not in (*COLUMNS, "section") and value]
        yield name, what, *(str(row.get(key, "")) for key in COLUMNS[1:4]), "; ".join([*others, *note])
    if record.get("failed"):
        yield name, "not all measured", "", "", "", record["failed"]


def show(records: dict[str, dict[str, Any]], dry_run: bool) -> None:
    title = "Dry run, toy sizes: these figures mean nothing" if dry_run else describe(records)
    table = Table(title=title, title_justify="left")
    for column in ("", "what", "dense or other", "sparse, pruned or ours", "ratio", "note"):
        table.add_column(column, overflow="fold")
    for name, record in records.items():
        for row in rows_of(name, record):
            table.add_row(*row)
    Console(width=150).print(table)


def describe(records: dict[str, dict[str, Any]]) -> str:
    """On what it ran, as the first section that knows says."""
    now = next((r["conditions"] for r in records.values() if r.get("conditions")), None)
    if now is None:
        return "no section could say on what it ran"
    gpu, software = now.get("gpu") or {}, ", ".join(f"{n} {v}" for n, v in now.get("versions", {}).items())
    return f"{gpu.get('name')}, power limit {gpu.get('power_limit_w')} W, {now.get('date')}, {software}"


def save(out: Path | None, records: dict[str, dict[str, Any]], folder: Path) -> None:
    """gpu.json and the logs, as far as there are any."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)


def chosen(only: str | None) -> list[Section]:
    """The sections asked for, each with the limit given for it, or all."""
    if only is None:
        return list(SECTIONS)
    known = {section.name: section for section in SECTIONS}
    found = []
    for part in only.split(","):
        name, _, seconds = part.strip().partition("=")
        if name not in known or not (seconds or "1").isdecimal():
            raise SystemExit(
                f"There is no section {part!r}; there are {', '.join(known)}, each with =SECONDS if need be."
            )
        found.append(replace(known[name], seconds=float(seconds)) if seconds else known[name])
    return found


def has_cuda() -> bool:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"], check=False
    )
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu.json and logs.tar.gz; made if need be")
    parser.add_argument("--minutes", type=float, help="for all of it; sections that do not fit are left out")
    parser.add_argument("--only", metavar="SECTION,...", help="only these, in this order; SECTION=SECONDS limits one")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU if there is no GPU")
    args = parser.parse_args()
    sections = chosen(args.only)
    if not args.dry_run and not has_cuda():
        raise SystemExit(
            "There is no CUDA device here, which everything in this benchmark measures. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or with --dry-run to see that it runs."
        )
    end = None if args.minutes is None else time.perf_counter() + 60 * args.minutes
    records: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for section in sections:
            left = math.inf if end is None else end - time.perf_counter() - 3
            if left < LEAST * section.seconds:
                records[section.name] = {"rows": [], "failed": "left out: no time left for it"}
                continue
            print(f"{section.name} ...", file=sys.stderr, flush=True)
            limit = min(section.seconds * (4 if args.dry_run else 1), left)  # a CPU may be busy
            records[section.name] = run(section, limit, folder, args.dry_run)
            save(args.out, records, folder)
        save(args.out, records, folder)
    show(records, args.dry_run)


if __name__ == "__main__":
    main()
