"""Documents of tasks in local files: one JSON object a line, with the fields the task's data set has on the hub."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text.content import PEEK, decoded, mended, opened
from ssmc.runtime.text.files import COMPRESSED


@dataclass(frozen=True)
class LocalDocuments:
    """The documents of one file, and the line each stands on."""

    path: Path
    rows: tuple[dict[str, Any], ...]
    lines: tuple[int, ...]


def find_file(folder: Path, name: str) -> Path | None:
    """The file of a task or of a text in a folder of local data, None where it has none."""
    candidates = (folder / f"{name}.jsonl", folder / "tasks" / f"{name}.jsonl", folder / name / "test.jsonl")
    packed = [path.with_name(path.name + suffix) for suffix in COMPRESSED for path in candidates]
    return next((path for path in (*candidates, *packed) if path.is_file()), None)


def require_files(folder: str | Path, tasks: Sequence[str]) -> dict[str, Path]:
    """The file of every task.

    Raises:
        CalibrationError: there is no such folder, or it has no file for a task.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CalibrationError(f"The data folder {folder} does not exist. Name one that holds TASK.jsonl files.")
    found = {task: find_file(folder, task) for task in tasks}
    if missing := [task for task, path in found.items() if path is None]:
        raise CalibrationError(
            f"{folder} has no documents for {', '.join(missing)}: there is no {missing[0]}.jsonl in it. "
            "Put one there, or leave the task out."
        )
    return {task: path for task, path in found.items() if path is not None}


def read_documents(path: Path, task: str) -> LocalDocuments:
    """Read the documents of a task; ARC's choices may be a plain list with a numeric label.

    Raises:
        CalibrationError: the file cannot be read, is not JSON lines, or its documents have different fields.
    """
    rows, lines = [], []
    with opened(path) as file:
        for number, line in enumerate(decoded(file, file.peek(PEEK)[:PEEK], path), 1):
            if line.strip():
                rows.append(_row(path, number, line, _ADAPTERS.get(task)))
                lines.append(number)
    if not rows:
        raise CalibrationError(f"{path} holds no document. Each line needs a JSON object.")
    for row, number in zip(rows, lines, strict=True):
        if row.keys() != rows[0].keys():  # the data set's columns; a missing one would silently read as "None"
            raise CalibrationError(
                f"{path}, line {number}, has the fields {', '.join(row)}, line {lines[0]} has {', '.join(rows[0])}. "
                "Every document needs the same ones."
            )
    return LocalDocuments(path, tuple(rows), tuple(lines))


def _row(path: Path, number: int, line: str, adapt: Callable[[dict[str, Any]], dict[str, Any]] | None) -> dict:
    try:
        row = _mended(json.loads(line))
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {number}, is not JSON: {error.msg}. Correct the line.") from error
    except RecursionError as error:
        raise CalibrationError(f"{path}, line {number}, is nested too deeply. Correct the line.") from error
    if not isinstance(row, dict) or not row:
        raise CalibrationError(f"{path}, line {number}, is not a JSON object with fields. Correct the line.")
    try:
        return row if adapt is None else adapt(row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CalibrationError(
            f'{path}, line {number}, has "choices" as a list but no "label" that is the number of one of them. '
            "Correct the line."
        ) from error


def _mended(value: Any) -> Any:
    """A value of JSON without lone surrogates in its strings, which no tokenizer takes."""
    if isinstance(value, dict):
        return {_mended(key): _mended(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mended(inner) for inner in value]
    return mended(value) if isinstance(value, str) else value


def _arc_from_list(row: dict[str, Any]) -> dict[str, Any]:
    """{"choices": [...], "label": 2} as the hub has it: choices with letters, and the letter of the answer."""
    choices = row.get("choices")
    if not isinstance(choices, list):
        return row
    letters = list(string.ascii_uppercase[: len(choices)])
    answer = row["label"]
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(letters):
        raise ValueError(answer)
    rest = {key: value for key, value in row.items() if key not in ("choices", "label")}
    return {**rest, "choices": {"text": choices, "label": letters}, "answerKey": letters[answer]}


_ADAPTERS = {"arc_easy": _arc_from_list, "arc_challenge": _arc_from_list}
