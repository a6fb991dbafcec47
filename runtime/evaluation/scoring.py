"""Run lm-eval's tasks on one model: every document's value of every metric, and lm-eval's score of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ssmc.runtime.evaluation.statistics import RESAMPLES, SLOW_RESAMPLES, Aggregate
from ssmc.runtime.evaluation.tasks import LoadedTask, quiet
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.generation import OnnxExport
from ssmc.runtime.progress import NO_PROGRESS, Progress

_CORPUS_METRICS = ("bleu", "chrf", "chrf++", "ter")


@dataclass(frozen=True)
class Measured:
    """One metric of one task on one model.

    Attributes:
        task, metric: lm-eval's names.
        filter: lm-eval's name of how answers were picked from generated text; "none" for most tasks.
        value: lm-eval's score.
        higher_is_better: which direction is good; None where lm-eval does not say.
        values: of every document in order.
        aggregate: makes the score of the values; None is the mean.
        resamples: how many bootstrap samples its standard error is worth.
        documents: hash of the documents the values belong to.
    """

    task: str
    metric: str
    filter: str
    value: float
    higher_is_better: bool | None
    values: tuple[Any, ...]
    aggregate: Aggregate | None
    resamples: int
    documents: str


def run_tasks(
    tasks: Sequence[LoadedTask],
    checkpoint: Checkpoint | OnnxExport,
    tokenizer: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    name: str = "model",
    progress: Progress = NO_PROGRESS,
) -> list[Measured]:
    """Score a model on tasks with lm-eval's evaluator.

    Args:
        tasks: from `load_tasks`.
        checkpoint: the model, already on its device and with the scan it is to use.
        tokenizer: turns texts into tokens.
        limit: documents of each task, from the start; None: all.
        batch_size: sequences at once.
        name: what progress calls the model.
        progress: told after every batch.

    Returns:
        All metrics in the order of the tasks and of their definitions.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from ssmc.runtime.evaluation.lm import RecurrentLM

    lm = RecurrentLM(checkpoint.model, tokenizer, batch_size, name, progress)
    with quiet(), _seeded():
        for loaded in tasks:  # as lm-eval's simple_evaluate does, which also spends seconds describing the machine
            if loaded.task.get_config("num_fewshot") is None:
                loaded.task.set_config(key="num_fewshot", value=0)
            loaded.task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        results = evaluate(
            lm,
            {"tasks": {loaded.name: loaded.task for loaded in tasks}},
            limit=limit,
            bootstrap_iters=0,  # its bootstrap forks this process and prints; `statistics` has one
        )
    return [measured for loaded in tasks for measured in _measured(loaded, results)]


def _measured(loaded: LoadedTask, results: dict[str, Any]) -> Iterator[Measured]:
    from lm_eval.api.metrics import mean

    samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in results["samples"][loaded.name]:
        for metric in sample["metrics"]:
            samples.setdefault((metric, sample["filter"]), []).append(sample)
    for (metric, picked), found in samples.items():
        aggregate = loaded.task.aggregation().get(metric, mean)
        yield Measured(
            task=loaded.name,
            metric=metric,
            filter=picked,
            value=float(results["results"][loaded.name][f"{metric},{picked}"]),
            higher_is_better=loaded.task.higher_is_better().get(metric),
            values=tuple(sample[metric] for sample in found),
            aggregate=None if aggregate is mean else aggregate,
            resamples=SLOW_RESAMPLES if metric in _CORPUS_METRICS else RESAMPLES,
            documents=hashlib.sha256("".join(sample["doc_hash"] for sample in found).encode()).hexdigest(),
        )


@contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's seeds for every model, so that all get the same examples; the caller's generators stay as they were."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    before, before_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(before_numpy)
