"""The paper's tables on a real model: prune a copy in memory, measure its perplexity on held-out text, drop it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.pruning import pruned
from ssmc.compressor import Weighting, configure, make_plan
from ssmc.compressor.options.patterns import COLUMN, LAYER, SSM_MODULE, UNSTRUCTURED, scores_of
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, perplexity
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.progress import NO_PROGRESS, Progress

HALF = 0.5
ALPHAS = (0.0, 0.02, 0.04, 0.08, 0.16)
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
RANDOM_SEEDS = (0, 1, 2)
GROUPS = ("2:4", "4:8")

ENTRY_SCORES = scores_of(UNSTRUCTURED)
STATE_SCORES = scores_of(COLUMN)

# d_model and n_layer of the models the paper reports; Mamba2-370M has those of 370M and another architecture.
SIZES = {(768, 24): "130M", (1024, 48): "370M", (1536, 48): "790M", (2048, 48): "1.4B", (2560, 64): "2.8B"}

DENSE, ENTRIES, FORGETFUL, WHOLE = "dense", "entries", "entries, no memory", "whole model"
NO_MEMORY = 15.0  # A_log whose decay exp(-dt e^15) is zero for every dt that a model computes
OURS = "SparseSSM (version not stated)"

# Perplexity on WikiText-2: (model, table, row) -> value. SparseSSM's v1 is `sparsessm-vote`, its v2 `sparsessm`.
PAPER: dict[tuple[str, str, str], float] = {
    (model, DENSE if method == DENSE else "unstructured 50 %", method): value
    for model, values in {
        "130M": (20.60, 740.3, 2.4e7, 27.70, 21.26),
        "370M": (14.32, 291.2, 2696.0, 19.27, 15.04),
        "790M": (11.96, 179.0, 110.5, 14.87, 12.47),
        "1.4B": (10.75, 100.7, 49.8, 14.68, 11.89),
        "2.8B": (9.45, 61.1, 56.8, None, 10.63),
        "Mamba2-370M": (14.17, 15.28, 15.42, None, 14.89),
    }.items()
    for method, value in zip((DENSE, "magnitude", "sparsegpt", "sparsessm-vote", "sparsessm"), values, strict=True)
    if value is not None
} | {
    ("370M", "column 25 %", "magnitude"): 35.27,
    ("370M", "column 50 %", "magnitude"): 117.0,
    ("370M", "column 25 %", OURS): 15.22,
    ("370M", "column 50 %", OURS): 18.13,
    ("370M", "2:4", OURS): 17.07,
    ("130M", f"{WHOLE} 50 %", OURS): 59.17,
    ("370M", f"{WHOLE} 50 %", OURS): 36.89,
    ("790M", f"{WHOLE} 50 %", OURS): 22.76,
    ("1.4B", f"{WHOLE} 50 %", OURS): 19.65,
}


@dataclass(frozen=True)
class Subject:
    """A dense model and the text that everything is measured with."""

    checkpoint: Checkpoint  # float32, with the fast scan in use
    pool: torch.Tensor  # (samples, seqlen) calibration samples; a study takes the first so many
    text: torch.Tensor  # (T,) held-out tokens
    window: int
    dense: Perplexity
    nsamples: int
    seed: int

    @property
    def size(self) -> str | None:
        """Which of the paper's models has these dimensions; None if none has."""
        d = self.checkpoint.dimensions
        return SIZES.get((d.d_model, d.n_layer))


@dataclass(frozen=True)
class Cell:
    """One figure of a table: where it stands and how it is made."""

    table: str
    row: str
    column: str
    options: dict[str, Any] = field(default_factory=dict)  # of `configure`
    nsamples: int | None = None  # None: the subject's
    seeds: tuple[int, ...] | None = None  # several: the mean loss is reported; None: the subject's


def per_cent(part: float) -> str:
    return f"{100 * part:g} %"


def methods_cells(sparsities: Iterable[float]) -> list[Cell]:
    """Every pattern by every score that judges it, the whole model at 50 %, and whole layers or SSMs removed."""
    cells = []
    patterns = [(f"{UNSTRUCTURED} {per_cent(s)}", {"pattern": UNSTRUCTURED, "sparsity": s}) for s in sparsities]
    patterns += [(group, {"pattern": group, "scope": "ssm"}) for group in GROUPS]
    for score in ENTRY_SCORES:
        seeds = RANDOM_SEEDS if score == "random" else None
        cells += [Cell(ENTRIES, score, name, {**o, "score": score}, seeds=seeds) for name, o in patterns]
    for score, repair in [*((s, False) for s in STATE_SCORES), ("exact", True)]:
        seeds = RANDOM_SEEDS if score == "random" else None
        row = score + (" + repair" if repair else "")
        for s in sparsities:
            options = {"pattern": COLUMN, "sparsity": s, "score": score, "repair": repair}
            cells.append(Cell("columns", row, f"{COLUMN} {per_cent(s)}", options, seeds=seeds))
    for pattern in (LAYER, SSM_MODULE):
        for s in sparsities:
            options = {"pattern": pattern, "sparsity": s, "repair": False}  # the baseline fits nothing
            cells.append(Cell("shedder", pattern, per_cent(s), options))
    return cells + _whole_cells()


def _whole_cells() -> list[Cell]:
    """A_log and all weights at 50 %: the first row is the baseline, the last the paper's recipe on our states."""
    rows = [
        (UNSTRUCTURED, a_log, weights) for a_log, weights in (("magnitude", "magnitude"), ("sparsegpt", "sparsegpt"))
    ]
    rows += [(UNSTRUCTURED, "sparsessm", weights) for weights in ("magnitude", "wanda", "sparsegpt")]
    rows.append((UNSTRUCTURED, "ghost", "sparsegpt"))
    rows.append((COLUMN, "exact", "sparsegpt"))
    return [
        Cell(
            WHOLE,
            f"{pattern}, A_log: {a_log}, weights: {weights}",
            "uniform" if alpha == 0 else f"Eq. 7, alpha {alpha:g}",
            {"pattern": pattern, "scope": "all", "score": a_log, "ffn_score": weights, "alpha": alpha},
        )
        for pattern, a_log, weights in rows
        for alpha in (0.0, 0.04)
    ]


def aggregation_cells() -> list[Cell]:
    """SparseSSM's three ways to go from time steps to one number, each weighting apart."""
    ways = [("vote", {"score": "sparsessm-vote"})]
    ways += [(f"time-weighted: {w.value}", {"score": "sparsessm", "weighting": w}) for w in Weighting]
    ways.append(("l2", {"score": "sparsessm-l2"}))
    return [
        Cell("aggregation", way, f"{pattern} 50 %", {"pattern": pattern, "repair": False, **options})
        for pattern in (UNSTRUCTURED, COLUMN)
        for way, options in ways
    ]


def samples_cells(available: int) -> list[Cell]:
    """Column pruning at 50 % from few and many samples."""
    methods = {
        "sparsessm-vote": {"score": "sparsessm-vote", "repair": False},
        "exact + repair": {"score": "exact", "repair": True},
    }
    return [
        Cell("samples", name, str(n), options, nsamples=n)
        for n in SAMPLES
        if n <= available
        for name, options in methods.items()
    ]


def alpha_cells() -> list[Cell]:
    """Eq. 7's ramp from none to wide, SparseGPT on the weights."""
    targets = {"ffn": {"scope": "ffn"}, WHOLE: {"scope": "all", "score": "sparsessm"}}
    return [
        Cell("alpha", name, f"{alpha:g}", {"pattern": UNSTRUCTURED, "alpha": alpha, **options})
        for name, options in targets.items()
        for alpha in ALPHAS
    ]


def measure(subject: Subject, cell: Cell, progress: Progress = NO_PROGRESS) -> list[dict]:
    """Make and score the models of one cell. A model that computes no number is a result: its `failed` says why.

    Returns:
        The cell's row, and for entries of A_log a second one, of the table FORGETFUL.
    """
    row: dict[str, Any] = {"table": cell.table, "row": cell.row, "column": cell.column}
    row["options"] = {name: getattr(value, "value", value) for name, value in cell.options.items()}
    row["nsamples"] = cell.nsamples or subject.nsamples
    row["seeds"] = list(cell.seeds or (subject.seed,))
    try:
        results = [_prune_and_score(subject, cell, row["nsamples"], seed, progress) for seed in row["seeds"]]
    except SsmcError as error:
        return [row | {"failed": str(error)}]
    tables = (cell.table, FORGETFUL)
    return [row | {"table": t} | _figures(subject, r) for t, r in zip(tables, zip(*results, strict=True), strict=False)]


def _figures(subject: Subject, results: Sequence[Perplexity]) -> dict[str, Any]:
    """Loss of a model, or the mean loss of several."""
    nll = math.fsum(r.nll_per_token for r in results) / len(results)
    excess = [excess_loss(r, subject.dense) for r in results]
    return {
        "perplexity": math.exp(nll) if nll < 700 else None,
        "nll": nll,
        "excess_nats": math.fsum(e.nats for e in excess) / len(excess),
        "excess_stderr": excess[0].stderr if len(excess) == 1 else None,
        "window_nll": list(results[0].window_nll) if len(results) == 1 else None,
    }


def _prune_and_score(
    subject: Subject, cell: Cell, nsamples: int, seed: int, progress: Progress
) -> tuple[Perplexity, ...]:
    checkpoint = subject.checkpoint
    config = configure(model="study", seed=seed, **cell.options)
    # Eq. 7 ranks layers by their inputs even where the weights themselves go by magnitude
    needs_text = make_plan(config, checkpoint.architecture, checkpoint.dimensions).needs_text
    tokens = subject.pool[:nsamples] if needs_text or config.modules else None
    model = copy.deepcopy(checkpoint.model)
    pruned(model, checkpoint.architecture, tokens, config, checkpoint.dtypes, progress)
    results = [perplexity(model, subject.text, subject.window, progress=progress)]
    if cell.table == ENTRIES:
        forget_pruned(checkpoint, model)
        results.append(perplexity(model, subject.text, subject.window, progress=progress))
    return tuple(results)


@torch.no_grad()
def forget_pruned(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Give entries of A_log that are zero a decay of zero in place of exp(-dt), as the published evaluation does."""
    for block in checkpoint.architecture.blocks(model):
        A_log = checkpoint.architecture.mixer(block).A_log
        A_log[A_log == 0] = NO_MEMORY
