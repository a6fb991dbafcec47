"""Perplexity of models beside each other: which text, which tokens of it, and what to say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ssmc.runtime.errors import CheckpointError, SsmcError
from ssmc.runtime.measure.perplexity import Perplexity, losses_of_tokens, split_windows
from ssmc.runtime.measure.sources import Subject, label
from ssmc.runtime.models.checkpoints import EMBEDDED as EMBEDDED_MODELS
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.generation import OnnxExport, load_onnx_export
from ssmc.runtime.models.tokenizers import load_tokenizer, tokenizer_directory
from ssmc.runtime.progress import NO_PROGRESS, Progress
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

EMBEDDED = "embedded held-out stories"


@dataclass(frozen=True)
class TextInfo:
    """The text perplexity was measured on."""

    source: str
    sha256: str
    tokens: int  # all of them; Perplexity.tokens says how many were scored
    embedded: bool  # the sample that comes with `tiny`


def read_tokens(
    checkpoints: Sequence[Checkpoint | OnnxExport],
    source: str | Path | None,
    tokenizer: str | None,
    windows: tuple[int, int | None],
) -> tuple[torch.Tensor | None, TextInfo | None, list[str]]:
    """The tokens perplexity is measured on, what they are, and what to say about them.

    Args:
        checkpoints: the models; the first that has a tokenizer reads the text.
        source: the text, as in `read_texts`; None: the held-out sample that comes with `tiny`.
        tokenizer: directory or hub id; None: what lies with the model.
        windows: of how many tokens, and how many at most; None: all.

    Returns:
        Tokens (T,) and their description, both None if the user named no text and the default cannot be read, and
        notes for the report.

    Raises:
        SsmcError: the text or the tokenizer the user named cannot be read.
    """
    dense, (window, most) = checkpoints[0], windows
    try:
        texts = read_texts(heldout_path() if source is None else source, split="test")
        owner = next((c for c in checkpoints if tokenizer_directory(c, tokenizer) is not None), dense)
        tokens = tokenize(texts, load_tokenizer(owner, tokenizer))
        split_windows(dense.model, tokens, window)  # see now, not after minutes, that it can be scored
    except SsmcError as error:
        if source is not None or tokenizer is not None:
            raise
        return None, None, [f"Perplexity was not measured: {error}"]
    info = TextInfo(
        EMBEDDED if source is None else label(source), texts.sha256, tokens.numel(), embedded=source is None
    )
    if most is not None:
        tokens = tokens[: most * window]
    notes = []
    if source is None and dense.source not in EMBEDDED_MODELS:
        notes.append(
            "Perplexity was measured on the embedded sample of simple stories, a fair text only for the embedded model "
            "`tiny`. For any other model name held-out text like what it will read."
        )
    return tokens, info, notes


def require_same_tokens(subjects: Sequence[Subject], tokenizer: str | None) -> None:
    """Make sure that plain smaller models read the same tokens as the dense one: only then do their losses compare.

    Raises:
        CheckpointError: one cuts text into other tokens.
    """
    smaller = [subject for subject in subjects if subject.source.smaller]
    if not smaller:
        return
    dense, texts = subjects[0].checkpoint, read_texts(heldout_path())
    for subject in smaller:
        if None in (tokenizer_directory(subject.checkpoint, None), tokenizer_directory(dense, tokenizer)):
            continue
        theirs, ours = (
            tokenize(texts, load_tokenizer(c, t)) for c, t in ((subject.checkpoint, None), (dense, tokenizer))
        )
        if not torch.equal(theirs, ours):
            raise CheckpointError(
                f"{subject.source.name} cuts text into other tokens than the dense model, so their losses per token "
                "do not compare. Name a smaller model with the same tokenizer."
            )


def score_tokens(
    subject: Subject, tokens: torch.Tensor, window: int, progress: Progress = NO_PROGRESS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows and the loss of every prediction of one model, see `losses_of_tokens`."""

    def report(_: str, done: int, total: int) -> None:
        progress(f"perplexity of {subject.source.name}", done, total)

    model = subject.checkpoint.model
    if subject.runtime == "onnx" and not model.graph.all_logits:  # timed without the logits that are not needed then
        model = load_onnx_export(subject.source.where, model.device.type, all_logits=True).model
    return losses_of_tokens(model, tokens, window, progress=report)


def shortened_note(score: Perplexity, window: int) -> list[str]:
    """What to say where the text was too short for the window asked for, or for a standard error."""
    if score.window < window:
        return [
            f"The text has only {score.window} tokens, so one window of that length was scored instead of {window}."
        ]
    if score.windows == 1:
        return ["The text fills a single window, so the perplexity has no standard error."]
    return []
