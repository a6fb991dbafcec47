"""lm-eval's own tasks by name, on the data sets they name or on local documents."""

from __future__ import annotations

import difflib
import itertools
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.evaluation.documents import LocalDocuments, read_documents, require_files
from ssmc.runtime.progress import NO_PROGRESS, Progress

EXTRA = "pip install 'ssmc[eval]'"

# Reading all of lm-eval's 14,000 definitions takes it 10 s and more, finding the line that names one takes 0.6 s.
_NAME_LINE = re.compile(r"""^["']?(task|group)["']?:[ \t]*["']?([^"'\s#\[]+)["']?[ \t]*(?:\#.*)?\r?$""", re.MULTILINE)


@dataclass(frozen=True)
class LoadedTask:
    """A task of lm-eval with its documents."""

    name: str
    task: Any  # lm_eval.api.task.Task
    documents: int  # all of them
    local: Path | None  # the file they come from; None: the data set the task names


def require_lm_eval() -> None:
    """See whether tasks can be run at all, before anything else is done.

    Raises:
        UsageError: lm-eval is missing or too old.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"Tasks are run by lm-eval, which cannot be imported ({error}): {EXTRA}.") from error
    if not hasattr(TaskManager, "load"):
        raise UsageError(f"The installed lm-eval is too old for ssmc: {EXTRA} --upgrade.")


def load_tasks(
    names: Sequence[str], data: str | Path | None = None, limit: int | None = None, progress: Progress = NO_PROGRESS
) -> tuple[LoadedTask, ...]:
    """Load tasks and their documents.

    Args:
        names: lm-eval's names of single tasks.
        data: a folder with TASK.jsonl, tasks/TASK.jsonl or TASK/test.jsonl for every task; None takes the data set the
            task names, from the hub or its cache.
        limit: how many local documents of each task, from the start, are checked; None: all.
        progress: told about every task.

    Raises:
        UsageError: no such task, or none that can be run here.
        CalibrationError: its documents cannot be read.
    """
    require_lm_eval()
    definitions = find_definitions(names)
    files = {} if data is None else require_files(data, names)
    local = {name: read_documents(path, name) for name, path in files.items()}
    loaded = []
    for done, (name, definition) in enumerate(definitions.items()):
        progress(f"documents of {name}", done, len(names))
        task = _from_hub(name, definition) if data is None else _from_file(name, definition, local[name])
        if data is not None:
            _check_documents(name, task, local[name], limit)
        loaded.append(LoadedTask(name, task, len(task.eval_docs), files.get(name)))
    return tuple(loaded)


def find_definitions(names: Sequence[str]) -> dict[str, Path]:
    """lm-eval's YAML file of each task.

    Raises:
        UsageError: there is no such task, or the name stands for a group of them.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    found: dict[str, Path] = {}
    for name in names:
        # mostly it lies in a folder whose name starts as its own does
        known = _defined(root, re.match(r"[A-Za-z0-9]*", name)[0] + "*/**/*.yaml")  # type: ignore[index]
        if ("task", name) not in known:
            known = _defined(root, "**/*.yaml")
        if ("task", name) not in known:
            raise _unknown(name, known)
        found[name] = known["task", name]
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars of lm-eval and datasets to themselves: the work reports through `progress`."""
    import datasets
    import lm_eval.api.task as module

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    shown = getattr(module, "tqdm", None)
    if shown is not None:
        module.tqdm = lambda iterable, *args, **kwargs: iterable
    try:
        yield
    finally:
        if shown is not None:
            module.tqdm = shown
        if bars:
            datasets.enable_progress_bars()


def _defined(root: Path, pattern: str) -> dict[tuple[str, str], Path]:
    """("task" or "group", name) -> file, of all definitions that match."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(root.glob(pattern)):
        for kind, name in _NAME_LINE.findall(path.read_text(encoding="utf-8", errors="replace")):
            found.setdefault((kind, name), path)
    return found


def _unknown(name: str, known: dict[tuple[str, str], Path]) -> UsageError:
    if ("group", name) in known:
        return UsageError(f"{name} is a group of lm-eval's tasks. Name the single tasks in it.")
    tasks = [task for kind, task in known if kind == "task"]
    near = [task for task in tasks if name.startswith(task)] or difflib.get_close_matches(name, tasks, n=3)
    hint = f"Did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them."
    return UsageError(f"lm-eval has no task {name!r}. {hint}")


def _from_hub(name: str, definition: Path) -> Any:
    try:
        return _load(name, definition)
    except Exception as error:  # datasets', requests', huggingface_hub's and lm-eval's own
        raise CalibrationError(
            f"The documents of {name} could not be loaded ({_reason(error)}). "
            f"Without a network, give a folder that holds {name}.jsonl with --data."
        ) from error


def _from_file(name: str, definition: Path, documents: LocalDocuments) -> Any:
    """The same task on local documents: a definition of our own that includes lm-eval's and overrides its data set."""
    if re.search(r"^class:", definition.read_text(encoding="utf-8"), re.MULTILINE):
        raise UsageError(f"{name} is written in Python and reads its documents itself: it cannot use --data.")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = Path(folder, "documents.jsonl")
        rows.write_text("".join(json.dumps(row) + "\n" for row in documents.rows), encoding="utf-8")
        overrides = {
            "include": str(definition),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": folder, "keep_in_memory": True},
            "custom_dataset": None,
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": None,
        }
        own = Path(folder, "task.yaml")
        own.write_text(json.dumps(overrides), encoding="utf-8")  # JSON is YAML
        try:
            task = _load(name, own)
        except UsageError:
            raise
        except Exception as error:  # whatever lm-eval, jinja or datasets make of foreign fields
            raise CalibrationError(
                f"{documents.path} does not fit lm-eval's task {name} ({_reason(error)}). "
                "Its documents need the fields of the task's data set on the hub."
            ) from error
    return task


def _check_documents(name: str, task: Any, documents: LocalDocuments, limit: int | None) -> None:
    """Build the documents' texts now, so that a faulty one is named by its line."""
    found = task.eval_docs
    for index, document in enumerate(itertools.islice(found, limit)):
        try:
            text, target = task.doc_to_text(document), task.doc_to_target(document)
            if task.OUTPUT_TYPE == "multiple_choice":
                _check_choices(text, target, task.doc_to_choice(document))
        except Exception as error:
            # a task may drop documents; then lines cannot be told any more
            where = f", line {documents.lines[index]}," if len(found) == len(documents.lines) else ""
            raise CalibrationError(
                f"{documents.path}{where} does not fit lm-eval's task {name} ({_reason(error)}). Correct the document."
            ) from error


def _check_choices(text: Any, target: Any, choices: list[str]) -> None:
    for index in (text, target):
        if isinstance(index, int) and not 0 <= index < len(choices):
            raise ValueError(f"it has {len(choices)} choices, the answer is number {index}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("it has an empty choice")


def _load(name: str, definition: Path) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        tasks = TaskManager(include_defaults=False).load([str(definition)])["tasks"]
    task = tasks[name]
    if getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        what = "reads images or sound" if getattr(task, "MULTIMODAL", False) else "runs code that the model writes"
        raise UsageError(f"{name} {what}, which ssmc does not do. Leave the task out.")
    return task


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    return text if len(text) > 20 else f"{type(error).__name__}: {text}"
