"""`evaluate_models`: perplexity and tasks of several models, with paired differences to the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.collectives import joined
from ssmc.runtime.device import choose_device, choose_dtype
from ssmc.runtime.errors import CalibrationError, SsmcError, UsageError
from ssmc.runtime.evaluation.constructed import answer, constructed_questions, nothing_to_lose
from ssmc.runtime.evaluation.documents import find_file
from ssmc.runtime.evaluation.models import choose_sources
from ssmc.runtime.evaluation.report import EvalReport, ModelResult, Score, TaskInfo
from ssmc.runtime.evaluation.scoring import Measured, run_tasks
from ssmc.runtime.evaluation.settings import EvalSettings, task_names
from ssmc.runtime.evaluation.statistics import RESAMPLES, exp_mean, paired_difference, standard_error
from ssmc.runtime.evaluation.tasks import LoadedTask, load_tasks
from ssmc.runtime.manifest import RUNTIMES
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, split_windows, summarise
from ssmc.runtime.measure.quality import TextInfo, score_tokens, shortened_note
from ssmc.runtime.measure.recall import recall_of
from ssmc.runtime.measure.sources import Subject, compute_dtype, label, load_subjects, runnable
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import OnnxExport
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.text import NAMED_DATASETS, read_texts, tokenize
from ssmc.runtime.versions import versions

DEFAULT_TEXT = "wikitext2"


def evaluate_models(
    models: Sequence[str | Path] = (),
    tasks: str | Sequence[str] = (),
    *,
    dense: str | Path | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    text: str | Path | None = None,
    perplexity: bool = True,
    recall: bool = False,
    window: int = 2048,
    max_windows: int | None = None,
    batch_size: int = 8,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    state_dtype: str = "float32",
    runtimes: Sequence[str] = RUNTIMES,
    progress: Progress = NO_PROGRESS,
) -> EvalReport:
    """Score models by perplexity on a text and by lm-eval's tasks, and compare them with the first.

    Processes that torchrun started share windows and documents; all of them have the report.

    Args:
        models: see `choose_sources`: models with the reference first, or one artefact, or nothing for ssmc-out.
        tasks: lm-eval's names, as a sequence or with commas between.
        dense: the reference, if it is not the first model or the one an artefact was made from.
        limit: documents of each task, from the start; None: all.
        data: a folder with local documents, see `load_tasks`; its wikitext2.jsonl or wikitext2/test.jsonl is the text.
        text: for perplexity, as in `read_texts`; by default WikiText-2's test split.
        perplexity: measure it.
        recall: ask constructed questions too, see `constructed`; needs the perplexity, with which the loss by kind of
            token is always measured.
        window: tokens per window of perplexity; windows do not overlap, and each starts from a fresh state.
        max_windows: windows scored at most, from the start of the text; None: all.
        batch_size: sequences at once in tasks; changes the speed, not the scores.
        tokenizer: directory or hub id, where the reference carries none.
        device: "cpu", "cuda" or "auto".
        dtype: of weights and activations; by default float32 on a CPU and the stored one on a GPU.
        backend: of the selective scan, see `use_fast_scan`.
        state_dtype: how torch's models but the first keep SSM states between tokens, "float32", "float16" or "int8";
            they are rounded after every token, as if each had been written.
        runtimes: of "torch", "onnx" and "llama.cpp", those whose exports are taken of an artefact.
        progress: told what is being done.

    Raises:
        SsmcError: with one sentence on what is wrong and what to do.
    """
    if recall and not perplexity:
        raise UsageError("recall is measured on the text of the perplexity: leave perplexity on, or recall out.")
    settings = EvalSettings(task_names(tasks), limit, window, max_windows, batch_size, state_dtype)
    where = choose_device(device)
    sources, left_out = runnable(choose_sources(models, dense, runtimes), where)
    loaded = load_tasks(settings.tasks, data, limit, progress) if settings.tasks else ()
    subjects = load_subjects(sources, choose_dtype(dtype, where), progress, device, all_logits=True)
    reference = subjects[0].checkpoint
    reader = load_tokenizer(reference, tokenizer)
    tokens, text_info, notes = _read_text(reference, reader, text, data, settings) if perplexity else (None, None, [])
    measured, losses, constructed = [], [], []
    questions = None
    with joined(where):
        for subject in subjects:
            if subject.runtime == "torch":
                kept = "float32" if subject is subjects[0] else state_dtype
                use_fast_scan(subject.checkpoint.model.to(where), backend, kept, each_token=True)
            losses.append(None if tokens is None else score_tokens(subject, tokens, window, progress))
            if recall and questions is None and losses[0] is not None:
                questions = constructed_questions(losses[0][0])
            constructed.append(() if questions is None else answer(subject.checkpoint.model, questions, batch_size))
            measured.append(_run(loaded, subject, reader, settings, progress))
            if subject.runtime == "torch":
                subject.checkpoint.model.to("cpu")  # one model at a time on a GPU
    perplexities = [None if found is None else summarise(*found) for found in losses]
    results = [
        _result(subject, (score, perplexities[0]), (values, measured[0]), text_info)
        for subject, score, values in zip(subjects, perplexities, measured, strict=True)
    ]
    kinds = recall_of([found for found in losses if found is not None], [result.dense for result in results])
    results = [
        replace(result, recall=by_kind, constructed=answers)
        for result, by_kind, answers in zip(results, kinds or [()] * len(results), constructed, strict=True)
    ]
    if perplexities[0] is not None:
        notes += shortened_note(perplexities[0], window) + nothing_to_lose(constructed[0])
    return EvalReport(
        settings=settings,
        versions=versions() | ({"lm_eval": version("lm_eval")} if loaded else {}),
        device=where.type,
        dtype=compute_dtype(subjects[0]),
        text=text_info,
        tasks=tuple(_task_info(task, measured[0]) for task in loaded),
        models=tuple(results),
        notes=(*left_out, *notes, *_twin_notes(subjects), *_limit_note(loaded, limit)),
    )


def _read_text(
    reference: Checkpoint | OnnxExport,
    tokenizer: Any,
    source: str | Path | None,
    data: str | Path | None,
    settings: EvalSettings,
) -> tuple[torch.Tensor | None, TextInfo | None, list[str]]:
    """The tokens (T,) of the perplexity, what they are, and notes.

    Both are None where the user named no text, the default cannot be had, and there are tasks to be run instead.
    """
    name = DEFAULT_TEXT if source is None else str(source)
    try:
        texts = read_texts(_local_text(name, data) or name, split="test")
        tokens = tokenize(texts, tokenizer)
        split_windows(reference.model, tokens, settings.window)  # see now, not after minutes, that it can be scored
    except SsmcError as error:
        if source is not None or not settings.tasks:
            raise
        return None, None, [f"Perplexity was not measured: {error}"]
    info = TextInfo(label(name), texts.sha256, tokens.numel(), embedded=False)
    if settings.max_windows is not None:
        tokens = tokens[: settings.max_windows * settings.window]
    return tokens, info, []


def _local_text(name: str, data: str | Path | None) -> Path | None:
    """The local file of a data set known by name, where there is a folder of local data."""
    if data is None or name not in NAMED_DATASETS:
        return None
    path = find_file(Path(data).expanduser(), name)
    if path is None:
        raise CalibrationError(
            f'{data} holds no {name}.jsonl. Put one there (an object with "text" a line), or name a text with --text.'
        )
    return path


def _run(
    tasks: Sequence[LoadedTask], subject: Subject, tokenizer: Any, settings: EvalSettings, progress: Progress
) -> list[Measured]:
    if not tasks:
        return []
    return run_tasks(
        tasks,
        subject.checkpoint,
        tokenizer,
        limit=settings.limit,
        batch_size=settings.batch_size,
        name=subject.source.name,
        progress=progress,
    )


def _result(
    subject: Subject,
    perplexities: tuple[Perplexity | None, Perplexity | None],
    measured: tuple[list[Measured], list[Measured]],
    text: TextInfo | None,
) -> ModelResult:
    """The result of one model; of each pair, the second belongs to the reference."""
    ours, theirs = perplexities
    dense = subject.source.dense
    scores = [_score(one, None if dense else other) for one, other in zip(*measured, strict=True)]
    if ours is not None and theirs is not None and text is not None:
        pair = [_as_measured(score, text) for score in (ours, theirs)]
        scores.insert(0, _score(pair[0], None if dense else pair[1]))
    return ModelResult(
        name=subject.source.name,
        dense=dense,
        recipe=subject.source.recipe,
        parameters=subject.checkpoint.parameters,
        perplexity=ours,
        excess=None if dense or ours is None or theirs is None else excess_loss(ours, theirs),
        scores=tuple(scores),
    )


def _as_measured(perplexity: Perplexity, text: TextInfo) -> Measured:
    """A text's perplexity as a metric whose documents are its windows."""
    return Measured(
        task=text.source,
        metric="perplexity",
        filter="none",
        value=perplexity.ppl,
        higher_is_better=False,
        values=perplexity.window_nll,
        aggregate=exp_mean,
        resamples=RESAMPLES,
        documents=text.sha256,
    )


def _score(ours: Measured, theirs: Measured | None) -> Score:
    if theirs is not None and ours.documents != theirs.documents:
        raise RuntimeError(f"{ours.task} gave two models different documents")
    return Score(
        task=ours.task,
        metric=ours.metric,
        filter=ours.filter,
        value=ours.value,
        stderr=standard_error(ours.values, ours.aggregate, ours.resamples),
        higher_is_better=ours.higher_is_better,
        difference=None
        if theirs is None
        else paired_difference(ours.values, theirs.values, ours.aggregate, ours.resamples),
    )


def _task_info(loaded: LoadedTask, measured: list[Measured]) -> TaskInfo:
    first = next(one for one in measured if one.task == loaded.name)
    return TaskInfo(
        name=loaded.name,
        version=str(loaded.task.VERSION),
        num_fewshot=loaded.task.get_config("num_fewshot"),
        documents=len(first.values),
        available=loaded.documents,
        source="the task's own data set" if loaded.local is None else loaded.local.name,
        sha256=first.documents,
    )


def _twin_notes(subjects: Sequence[Subject]) -> list[str]:
    return [
        f"{twin.name} holds the same tensors as {subject.source.name}, so it was not evaluated again."
        for subject in subjects
        for twin, _ in subject.twins
    ]


def _limit_note(tasks: Sequence[LoadedTask], limit: int | None) -> list[str]:
    if limit is None or all(task.documents <= limit for task in tasks):
        return []
    return [f"Only the first {limit} documents of each task were scored: not figures to compare with published ones."]
