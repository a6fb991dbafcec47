"""What the bench of methods compresses and judges: language models with their text, and a torch module."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.continuations import QUESTIONS, Continuations
from benchmarks.loss.digits import Split, judged, train
from ssmc import compress
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, LAYER, UNSTRUCTURED, WEIGHTS, WIDTH, scores_of
from ssmc.exporters import export
from ssmc.runtime.measure.losses import IGNORED, token_losses
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind, of_kind
from ssmc.runtime.models.checkpoints import load_checkpoint, parameter_counter
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize

SHARE = 0.85  # of the parameters, and of the time, that is left where they are equal
STEPS = 60  # of refinement and of distillation
STATES = 0.75
SPARSITY = 0.5  # of single weights

MODULES = {"module": "mamba", "module-mamba2": "mamba2"}
"""Torch modules and the kind of their mixers."""

HYBRID_CUTS: dict[str, dict[str, float]] = {
    "head+mlp+attention": {"head": 1 / 6, "mlp": 0.46, "attention": 1 / 3},
    WIDTH: {WIDTH: 0.125},
    LAYER: {LAYER: 0.25},
}
"""Of `tiny-hybrid`, by pattern: shares that leave about SHARE of its parameters (the table gives them)."""


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    group: str
    name: str
    options: dict[str, Any]
    once: bool = False  # one seed suffices: it takes long, or has no calibration to vary


def of_states() -> Iterator[Method]:
    """As many states, for every kind of model; what a family refuses is left out when it says so."""
    states = {"pattern": COLUMN, "sparsity": STATES}
    yield Method("states", "exact + repair", states)
    yield Method("states", "ghost", states | {"score": "ghost", "repair": False})
    yield Method("states", "ghost + repair", states | {"score": "ghost"})
    for score in scores_of(COLUMN):
        if score not in ("exact", "ghost"):
            yield Method("states", score, states | {"score": score, "repair": False})
    yield Method("states", "exact", states | {"score": "exact", "repair": False})
    yield Method("states", "exact + repair, no weight on recall", states | {"recall_weight": 0.0})
    yield Method("states", f"exact + repair + refine {STEPS}", states | {"refine": STEPS}, once=True)


def of_parameters(cuts: dict[str, dict[str, Any]], first: str) -> Iterator[Method]:
    """As many parameters: every score of every pattern, the first one with more behind it, and what a search takes.

    Args:
        cuts: by pattern, options that leave SHARE of the parameters.
        first: the pattern to try without repair and with distillation.
    """
    for pattern, options in cuts.items():
        for score in scores_of(pattern.partition("+")[0]):
            yield Method("parameters", f"{pattern}, {score}", options | {"pattern": pattern, "score": score})
    options = cuts[first] | {"pattern": first}
    yield Method("parameters", f"{first}, no repair", options | {"repair": False})
    yield Method("parameters", f"{first} + distill {STEPS}", options | {"distill": STEPS}, once=True)
    yield Method("parameters", "searched", {"target_params": SHARE}, once=True)


def of_time(patterns: tuple[str, ...]) -> Iterator[Method]:
    """As much time of a prefill."""
    timed = {"target_latency": SHARE, "length": 512}
    for pattern in patterns:
        yield Method("time", f"{pattern}, by time", timed | {"pattern": pattern}, once=True)
    yield Method("time", "searched, by time", timed, once=True)


def of_weights() -> Iterator[Method]:
    """As many single weights."""
    for score in scores_of(UNSTRUCTURED):
        options = {"pattern": UNSTRUCTURED, "sparsity": SPARSITY, "score": score}
        yield Method("weights", f"A_log, {score}", options)
    for score in scores_of(WEIGHTS):
        yield Method("weights", f"2:4, {score}", {"pattern": "2:4", "ffn_score": score})


class TextModel:
    """A language model, and the text and the questions it is judged on."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args = name, args
        dense = load_checkpoint(name, dtype=torch.float32)
        texts, tokenizer = read_texts(args.text), load_tokenizer(dense)
        tokens = tokenize(texts, tokenizer)[: args.windows * args.window]
        self.windows = tokens[: len(tokens) // args.window * args.window].view(-1, args.window)
        self.questions = Continuations.of([torch.tensor(tokenizer(text)["input_ids"]) for text in texts.documents])
        self.questions = self.questions.thinned(QUESTIONS)
        self.kinds, self.sizes = kinds_of(self.windows), dense.dimensions
        self.uniform = dense.architecture.capabilities.uniform
        self._count = parameter_counter(dense.config)
        self.losses, right, self.solved = self._scored(dense.model)
        self.dense = {"nats": float(self.losses.mean()), "accuracy": float(right.double().mean())}
        self.dense["task"] = float(self.solved.double().mean())

    @property
    def methods(self) -> Iterator[Method]:
        """What is compared."""
        yield from of_states()
        states = {"pattern": COLUMN, "sparsity": STATES}
        yield Method("states", f"exact + repair + distill {STEPS}", states | {"distill": STEPS}, once=True)
        if self.uniform:
            yield from of_parameters(self._cuts(), CHANNEL)
            yield from of_time((CHANNEL, LAYER, f"{COLUMN}+{CHANNEL}"))
        else:
            hybrid = {pattern: {"sparsity": cut} for pattern, cut in HYBRID_CUTS.items()}
            first = next(iter(hybrid))
            yield from of_parameters(hybrid, first)
            published = {"pattern": first, "score": "minitron", "repair": False}
            yield Method("parameters", f"{first}, minitron, no repair", hybrid[first] | published)
            yield from of_time(())
        yield from of_weights()

    def _cuts(self) -> dict[str, dict[str, Any]]:
        """Options that leave SHARE of the parameters, by channels or heads and by layers."""
        sizes = self.sizes
        step = 16 if sizes.heads is None else sizes.d_inner // sizes.heads * sizes.groups
        widths = [w for w in range(step, sizes.d_inner, step) if self._share(sizes.n_layer, w) <= SHARE]
        layers = [n for n in range(1, sizes.n_layer) if self._share(n, sizes.d_inner) <= SHARE]
        return {
            CHANNEL: {"widths": (max(widths, default=step),) * sizes.n_layer},
            LAYER: {"sparsity": 1 - max(layers, default=1) / sizes.n_layer},
        }

    def _share(self, n_layer: int, d_inner: int) -> float:
        """Of the parameters; infinite for sizes that transformers does not load."""
        sizes = self.sizes
        try:
            counted = self._count(n_layer, d_inner, sizes.d_state)
            return counted / self._count(sizes.n_layer, sizes.d_inner, sizes.d_state)
        except ValueError:
            return math.inf

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """Compress once, export, and judge the export."""
        options = {"nsamples": self.args.nsamples, "seqlen": self.args.seqlen, "seed": seed, **method.options}
        with TemporaryDirectory() as folder:
            start, busy = time.perf_counter(), time.process_time()
            result = compress(self.name, out=Path(folder) / "out", **options)
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
            done = export(result.directory, format="safetensors")
            losses, right, solved = self._scored(load_checkpoint(done.directory, dtype=torch.float32).model)
        by_kind = loss_by_kind(losses.numpy(), self.kinds, self.losses.numpy())
        far, every = of_kind(by_kind, "far"), of_kind(by_kind, "all")
        assert every is not None
        found = {"excess_nats": every.excess, "stderr": every.excess_stderr, "accuracy": float(right.double().mean())}
        if far is not None:
            found |= {"recall_excess_nats": far.excess, "recall_stderr": far.excess_stderr}
        change = solved.double() - self.solved.double()  # paired: the same questions
        error = float(change.std()) / math.sqrt(len(change))
        found |= {"task": float(solved.double().mean()), "task_stderr": error}
        before, after = done.parameters
        return found | spent | {"parameters_left": after / before}

    def _scored(self, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses and whether the likeliest token was right, (W, L - 1) each, and the questions answered rightly."""
        targets = torch.nn.functional.pad(self.windows[:, 1:], (0, 1), value=IGNORED)
        model, rows = use_fast_scan(model), zip(self.windows.split(1), targets.split(1), strict=True)
        losses, right = zip(*(token_losses(model, *row) for row in rows), strict=True)
        return torch.cat(losses)[:, :-1], torch.cat(right)[:, :-1], self.questions.right(model)


class DigitsModule:
    """A torch module that is no language model: `benchmarks.loss.digits`. It has no recall to lose."""

    def __init__(self, kind: str, args: argparse.Namespace):
        self.split = Split.drawn(0)
        self.model = train(self.split, 0, 4 if args.quick else 8, kind)
        self.dense, self.methods = judged(self.model, self.split), list(of_states())

    def run(self, method: Method, seed: int) -> dict[str, Any]:
        """Compress once and judge."""
        start, busy = time.perf_counter(), time.process_time()
        result = compress(self.model, self.split.calibration(), seed=seed, **method.options)
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
        got, images = judged(result.module, self.split), len(self.split.unseen)
        error = math.sqrt(got["accuracy"] * (1 - got["accuracy"]) / images)
        left = sum(p.numel() for p in result.module.parameters()) / sum(p.numel() for p in self.model.parameters())
        found = {"excess_nats": got["nats"] - self.dense["nats"], "stderr": None, "accuracy": got["accuracy"]}
        return found | spent | {"accuracy_stderr": error, "parameters_left": left}


Subject = TextModel | DigitsModule


def subject_of(name: str, args: argparse.Namespace) -> Subject:
    """A model that comes with ssmc, or one of MODULES."""
    return DigitsModule(MODULES[name], args) if name in MODULES else TextModel(name, args)
