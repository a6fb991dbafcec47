"""What was found, as it is kept in benchmarks/results/consumers.json, and the tables that the documentation shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "consumers.json"
TOLERANCE = 1e-4
"""Largest difference of a logit or log probability."""

RAN, DIFFERS, WRONG, FAILED, REFUSED = "ran", "differs", "wrong", "failed", "no export"
BY_HAND = (
    ("mamba_ssm, GPU", "mamba-ssm", "", "by source; by hand: consumers/run.py --consumer mamba-ssm", "", ""),
    ("vLLM, GPU", "vllm", "", "by source; by hand with consumers/by_hand/run_vllm.py", "", ""),
)
"""Consumers that need a GPU or gigabytes: title, page, version, how it is known, what ran, largest difference."""


@dataclass(frozen=True)
class Row:
    """One export and one consumer.

    Attributes:
        consumer: as people call it.
        page: of docs/deploy.
        model: a name.
        cut: how it was pruned; "dense".
        format: of the export.
        outcome: "ran" (within the tolerance), "differs", "wrong" (by a fault of the consumer's own that ssmc
            names), "failed" (to load or run) or "no export" (ssmc refuses).
        date: of the run.
        version: of the consumer; empty where its environment could not be made.
        whole: largest difference over whole prompts; None where nothing ran.
        stepped: the same token by token.
        values: "logits" or "log probabilities".
        reason: why not; of one that ran, what it does in its own way and the model was compared without.
    """

    consumer: str
    page: str
    model: str
    cut: str
    format: str
    outcome: str
    date: str
    version: str = ""
    whole: float | None = None
    stepped: float | None = None
    values: str | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later run replaces."""
        return self.consumer, self.model, self.cut


def read_rows(path: Path = RESULTS) -> list[Row]:
    """The rows of earlier runs; none where there are none."""
    if not path.is_file():
        return []
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write_rows(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Write rows."""
    content = {"tolerance": TOLERANCE, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows with those in them replaced that were run again, new ones behind."""
    rows = {row.key: row for row in old}
    return list((rows | {row.key: row for row in new}).values())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(rows: Sequence[Row]) -> str:
    """What the documentation shows: who was asked and when, what ran, and why the rest did not."""
    if not rows:
        return "Nothing was run yet: `make consumers`."
    return "\n\n".join([_consumers(rows), _models(rows), _reasons(rows)])


def _consumers(rows: Sequence[Row]) -> str:
    lines, asked = [], list(dict.fromkeys(row.consumer for row in rows))
    for consumer in asked:
        own = [row for row in rows if row.consumer == consumer]
        ran = [row for row in own if row.outcome == RAN]
        versions = ", ".join(sorted({row.version for row in own if row.version}))
        dates = sorted({row.date for row in own})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        worst = f"{max(max(row.whole, row.stepped) for row in ran):.1e}" if ran else ""
        known = f"ran, {when}" if ran else f"did not run, {when}"
        lines.append((f"[{consumer}]({own[0].page}.md)", versions, known, f"{len(ran)} of {len(own)}", worst))
    lines += [(f"[{title}]({page}.md)", *others) for title, page, *others in BY_HAND if title not in asked]
    return table(("consumer", "version", "known", "models that ran", "largest difference"), lines)


def _models(rows: Sequence[Row]) -> str:
    consumers = list(dict.fromkeys(row.consumer for row in rows))
    found = {row.key: row for row in rows}
    lines = []
    models = list(dict.fromkeys(row.model for row in rows))
    cuts = dict.fromkeys((row.model, row.cut) for row in rows)
    for model, cut in sorted(cuts, key=lambda each: models.index(each[0])):
        cells = [_cell(found.get((consumer, model, cut))) for consumer in consumers]
        lines.append((model, cut, *cells))
    return table(("model", "kept", *consumers), lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.outcome == RAN:
        return f"{max(row.whole, row.stepped):.0e}" + "*" * bool(row.reason)
    if row.outcome in (DIFFERS, WRONG):
        return f"**{row.outcome}**, {max(row.whole or 0, row.stepped or 0):.0e}"
    return "no" if row.outcome == FAILED else "-"


def _reasons(rows: Sequence[Row]) -> str:
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            grouped.setdefault((row.consumer, row.reason), []).append(f"{row.model} ({row.cut})")
    lines = [(consumer, ", ".join(models), reason.replace("|", "/")) for (consumer, reason), models in grouped.items()]
    return table(("consumer", "models", "why not, or what it does in its own way"), lines) if lines else ""
