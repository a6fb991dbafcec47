"""From the JSON of the bench of methods to docs/methods.md and its plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.continuations import ANSWER, CONTEXT, QUESTIONS

TITLES = {
    "tiny": "A Mamba-1: `tiny`",
    "tiny-mamba2": "A Mamba-2: `tiny-mamba2`",
    "tiny-hybrid": "A hybrid: `tiny-hybrid`",
    "module": "A torch module of Mamba-1 mixers: digits",
    "module-mamba2": "A torch module of Mamba-2 mixers: digits",
}
SAME = {
    "states": "as many states",
    "parameters": "as many parameters",
    "time": "as much time",
    "weights": "as many weights",
}
COSTS = {  # what is equal in a group, with the settings of the run
    "states": "as many states ({left:.0%} of them left)",
    "parameters": "as many parameters (at most {share:.0%} left, to the next channel, head or layer)",
    "time": "as much time of a prefill ({share:.0%} left)",
    "weights": "as many single weights ({sparsity:.0%} gone, which makes nothing smaller)",
}
PAGE = """# Methods side by side

<!-- written by `python -m benchmarks.methods`; `--tables` writes it again from the JSON -->

Methods of ssmc on models that come with it, at equal cost: {costs}. The least loss stands first.

*Excess* is the loss above the dense model's, in nats a token, on {text} tokens of held-out text; *where recalled*, on
tokens that the text had more than 100 tokens before; *right*, how often the likeliest token was the next one; *task*,
how often the next {answer} tokens of a story were found likelier than those of three others, after {context} tokens
({questions} questions at most, chance 25%; tasks such as PIQA say nothing of models this small: dense, they guess).
Parameters are those of the export, which is what is judged. Calibration: {nsamples} samples of {seqlen} tokens of the
embedded stories, {seeds} draws of them; what takes long was run on one. Errors are standard errors, over windows of
text or questions (paired with the dense model) and over draws, added in squares. Seconds are those of one core to
compress.

`python -m benchmarks.methods`, `benchmarks/results/methods.json`; `--jobs 16` shares the runs among processes.

![excess loss over seconds](figures/methods.svg)"""


def sorted_groups(found: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Groups of a model with their rows, the least loss first."""
    rows = [row for row in found["rows"] if "refused" not in row]
    for group in dict.fromkeys(row["group"] for row in rows):
        yield group, sorted((row for row in rows if row["group"] == group), key=lambda row: row["excess_nats"])


def page(report: dict[str, Any]) -> str:
    """docs/methods.md: what is compared, a table for each model, what was refused."""
    settings = report["settings"]
    text = f"{settings['windows'] * settings['window']:,}"
    figures = {"seeds": len(settings["seeds"]), "text": text, "left": 1 - settings["states"]}
    figures |= {"context": CONTEXT, "answer": ANSWER, "questions": QUESTIONS}
    told = settings | figures
    run = {row["group"] for found in report["models"].values() for row in found["rows"]}
    costs = "; ".join(words.format(**told) for group, words in COSTS.items() if group in run)
    parts = [PAGE.format(costs=costs, **told)]
    absent = [words for group, words in SAME.items() if group not in run]
    absent += [title for name, title in TITLES.items() if name not in report["models"]]
    if absent:
        parts.append(f"Not in these tables, for lack of time: {'; '.join(absent)}.")
    for name, found in report["models"].items():
        dense = found["dense"]
        task = f", {dense['task']:.1%} of the task" if "task" in dense else ""
        parts.append(f"## {TITLES[name]}\n\nDense: {dense['nats']:.4f} nats, {dense['accuracy']:.1%} right{task}.")
        lines = [
            "| | method | parameters left | excess | excess where recalled | task | right | CPU seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for group, rows in sorted_groups(found):
            for i, row in enumerate(rows):
                line = (SAME[group] if i == 0 else "", row["name"], *cells(row))
                lines.append(f"| {' | '.join(line)} |")
        parts.append("\n".join(lines))
        ended = {row["name"]: row["refused"].startswith("failed") for row in found["rows"] if "refused" in row}
        for failed, words in ((False, "Not for this model"), (True, "Ended in an error")):
            if names := sorted(name for name in ended if ended[name] == failed):
                parts.append(f"{words}: {'; '.join(names)}.")
        left = [name for name in found["planned"] if name not in {row["name"] for row in found["rows"]}]
        if left:
            parts.append(f"Not run here, for lack of time: {'; '.join(left)}.")
    now = report["conditions"]
    parts.append(
        f"Conditions: {now['cpu']}, float32, one thread, torch {now['versions']['torch']}, {now['date'][:10]}."
    )
    return "\n\n".join(parts) + "\n"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Figures of a method, in the order of the tables."""
    losses = (_figure(row, "excess_nats", "stderr"), _figure(row, "recall_excess_nats", "recall_stderr"))
    task = f"{row['task']:.1%} ± {row['task_stderr'] or 0:.1%}" if "task" in row else ""
    return f"{row['parameters_left']:.3f}", *losses, task, f"{row['accuracy']:.1%}", f"{row['cpu_seconds']:.1f}"


def _figure(row: dict[str, Any], name: str, error: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{row[name]:+.4f}" + ("" if row.get(error) is None else f" ± {row[error]:.4f}")


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss over seconds, a panel for each model and a colour for each group, with error bars."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "ssmc"
    models = report["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 4.2), squeeze=False)
    for axis, (name, found) in zip(axes[0], models.items(), strict=True):
        for i, group in enumerate(SAME):
            rows = [row for row in found["rows"] if row["group"] == group and "refused" not in row]
            heights = [max(row["excess_nats"], 1e-4) for row in rows]
            errors = [min(row["stderr"] or 0.0, 0.99 * height) for row, height in zip(rows, heights, strict=True)]
            seconds = [row["cpu_seconds"] for row in rows]
            axis.errorbar(seconds, heights, errors, fmt="o", ms=4, color=f"C{i}", label=group)
            for row, x, y in zip(rows, seconds, heights, strict=True):
                axis.annotate(row["name"], (x, y), fontsize=4, xytext=(3, 1), textcoords="offset points")
        axis.set(xscale="log", yscale="log", title=name, xlabel="seconds of processor time")
    axes[0][0].set_ylabel("excess loss (nats a token)")
    axes[0][0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
