"""Calibration from a large text: how much memory and time it takes beside what the same run takes with a small one.

    python -m benchmarks.memory.text --gigabytes 2 --out benchmarks/results/large_text.json
    python -m benchmarks.memory.text --model MODEL --calib stories.jsonl --out benchmarks/results/calibration_text.json

The first: plain text, JSON lines, and JSON lines in gzip, made of the embedded stories again and again, with few tokens
and little work, so that the text is what counts. The second: 24 x 512 tokens of a text of yours, all of it and its
first sixteenth, with the repair, as `ssmc compress` is run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.memory.larger import run
from benchmarks.reporting import print_conditions
from ssmc.runtime.tiny import calibration_path


def texts(folder: Path, size: int) -> Iterator[tuple[str, Path]]:
    """The files, made one after the other."""
    lines = calibration_path().read_bytes()
    prose = "\n\n".join(json.loads(line)["text"] for line in lines.splitlines() if line.strip()).encode()
    for name, piece, opened in (
        ("prose.txt", prose + b"\n\n", open),
        ("lines.jsonl", lines, open),
        ("lines.jsonl.gz", lines, gzip.open),
    ):
        with opened(folder / name, "wb", **({"compresslevel": 1} if opened is gzip.open else {})) as file:
            for _ in range(size // len(piece) + 1):
                file.write(piece)
        yield name, folder / name
        (folder / name).unlink()


def part(path: Path, folder: Path) -> Path:
    """The first sixteenth of the lines of a text."""
    lines = path.read_bytes().splitlines(keepends=True)
    out = folder / f"part-{path.name}"
    out.write_bytes(b"".join(lines[: len(lines) // 16]))
    return out


def compare(model: str, calib: Path, work: Path) -> dict[str, dict[str, float]]:
    """Compress with a text and with a part of it."""
    options = ("--nsamples", "24", "--seqlen", "512", "--sparsity", "0.5", "--force", "--out", str(work / "out"))
    found = {}
    for path in (part(calib, work), calib):
        name = f"{path.stat().st_size / 1e6:.1f} MB"
        found[name] = run("compress", model, "--calib", str(path), *options)
        said = f"{found[name]['processor_seconds']:6.1f} s of processor time ({found[name]['seconds']:.1f} s)"
        print(f"  {name:<16} {said}, {found[name]['resident_mb']:.0f} MB", flush=True)
    return found


def main() -> None:
    """Make the texts, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--work", type=Path, default=Path("large-text"))
    parser.add_argument("--model", default="tiny", help="with --calib")
    parser.add_argument("--calib", type=Path, help="a text of yours, in place of those that are made")
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args()
    now = print_conditions(torch.float32)
    asked.work.mkdir()
    options = ("--nsamples", "8", "--seqlen", "256", "--score", "energy", "--no-repair", "--force")
    options += ("--out", str(asked.work / "out"))
    if asked.calib is not None:
        found, size = compare(asked.model, asked.calib, asked.work), asked.calib.stat().st_size / 1e9
    else:
        found, size = {"the embedded stories": run("compress", "tiny", *options)}, asked.gigabytes
        for name, path in texts(asked.work, round(size * 1e9)):
            found[name] = run("compress", "tiny", "--calib", str(path), *options)
            more = found[name]["resident_mb"] - found["the embedded stories"]["resident_mb"]
            print(f"  {name:<16} {found[name]['seconds']:6.1f} s, {more:+.0f} MB", flush=True)
    shutil.rmtree(asked.work)
    if asked.out is not None:
        record = {"conditions": asdict(now), "gigabytes": size, "results": found}
        asked.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
