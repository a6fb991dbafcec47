"""The result of an evaluation: frozen dataclasses and their JSON.

`eval.json` is `EvalReport.to_json()`. It carries no date, duration or machine name: the same run gives the same file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import OutputError
from ssmc.runtime.evaluation.constructed import Constructed
from ssmc.runtime.evaluation.settings import EvalSettings
from ssmc.runtime.evaluation.statistics import Difference
from ssmc.runtime.files import finite, write_text
from ssmc.runtime.measure.perplexity import ExcessLoss, Perplexity
from ssmc.runtime.measure.quality import TextInfo
from ssmc.runtime.measure.recall import KindLoss

SCHEMA = "ssmc-eval/1"
JSON_NAME = "eval.json"


@dataclass(frozen=True)
class TaskInfo:
    """A task as it was run."""

    name: str
    version: str  # of lm-eval's definition
    num_fewshot: int
    documents: int  # scored
    available: int  # in the data set
    source: str  # "the task's own data set", or the local file's name
    sha256: str  # of the scored documents, so that two reports can be told to be on the same ones


@dataclass(frozen=True)
class Score:
    """One metric of one model.

    Attributes:
        task: lm-eval's name, or what the text of the perplexity is called.
        metric: lm-eval's name; "perplexity" of the text.
        filter: lm-eval's way of picking the answer from generated text; "none" for most tasks.
        value: lm-eval's score, or the perplexity.
        stderr: its standard error; None for a single document or window.
        higher_is_better: None where lm-eval does not say.
        difference: to the reference on the same documents; None for the reference itself.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    difference: Difference | None

    @property
    def verdict(self) -> str:
        """ "better" or "worse" than the reference by more than two standard errors, else ""."""
        if self.difference is None or self.higher_is_better is None or not self.difference.stderr:
            return ""
        if abs(self.difference.value) <= 2 * self.difference.stderr:
            return ""
        return "better" if (self.difference.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class ModelResult:
    """One model."""

    name: str
    dense: bool  # the reference of all differences
    recipe: dict[str, Any] | None  # how it was compressed, where a manifest says
    parameters: int  # tied embedding once
    perplexity: Perplexity | None
    excess: ExcessLoss | None  # of the perplexity, in nats per token above the reference
    scores: tuple[Score, ...]  # the text's perplexity first, then every metric of every task
    recall: tuple[KindLoss, ...] = ()  # the loss by kind of token, where perplexity was measured
    constructed: tuple[Constructed, ...] = ()  # answers to constructed questions, where they were asked for


@dataclass(frozen=True)
class EvalReport:
    """A whole evaluation."""

    settings: EvalSettings
    versions: dict[str, str]
    device: str
    dtype: str
    text: TextInfo | None
    tasks: tuple[TaskInfo, ...]
    models: tuple[ModelResult, ...]  # the reference first
    notes: tuple[str, ...]  # what was left out, and why a figure may mislead

    @property
    def dense(self) -> ModelResult:
        """What the others are compared with."""
        return self.models[0]

    def rows(self) -> Iterator[tuple[Score, ...]]:
        """The same metric of every model, one metric after the other."""
        return zip(*(model.scores for model in self.models), strict=True)

    def to_json(self) -> dict[str, Any]:
        """Everything in types JSON has; a number beyond float64 is null."""
        return finite({"schema": SCHEMA, **asdict(self)})

    def write(self, path: str | Path) -> Path:
        """Write the report as JSON, replacing an earlier one.

        Raises:
            OutputError: see `check_output`.
        """
        path = check_output(path)
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return path


def output_path(models: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Where a report goes: to `out`, else beside the artefact if that is what is evaluated, else the current folder.

    Args:
        models: as for `evaluate_models`.
        out: a file, or a folder for eval.json.
    """
    if out is not None:
        out = Path(out).expanduser()
        return out / JSON_NAME if out.is_dir() else out
    from ssmc.runtime.evaluation.models import artefact_directory

    directory = artefact_directory(models)
    return (directory if directory is not None and directory.is_dir() else Path()) / JSON_NAME


def check_output(path: str | Path) -> Path:
    """See, before minutes of work, that a report can be written.

    Raises:
        OutputError: the folder does not exist, or `path` is a file that no evaluation wrote.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise OutputError(
            f"{path.parent} is not a folder, so {path.name} cannot be written there. Name one that exists."
        )
    try:
        foreign = path.exists() and SCHEMA.partition("/")[0] not in path.read_text(encoding="utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        foreign = True
    if foreign:
        raise OutputError(f"{path} was not written by ssmc eval and is left alone. Name another file with --out.")
    return path
