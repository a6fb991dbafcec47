"""Text for calibration and for perplexity: from files, folders, data sets known by name, or the embedded sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import CalibrationError

SUFFIXES = (".txt", ".jsonl", ".parquet")

# name -> (hub id, configuration, text column, how many rows are plenty for calibration; None: all)
NAMED_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "c4": ("allenai/c4", "en", "text", 4000),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence", None),
}


@dataclass(frozen=True)
class Texts:
    """Documents and where they came from."""

    documents: tuple[str, ...]
    source: str  # as the user named it
    sha256: str  # of the documents, so that a run can be repeated on the same text

    def joined(self) -> str:
        """All documents as one stream, two newlines between them: how the field joins WikiText's rows."""
        return "\n\n".join(self.documents)


def read_texts(source: str | Path, split: str = "train") -> Texts:
    """Read documents.

    Args:
        source: a .txt file (one document), .jsonl (one object with "text" a line) or .parquet file (column "text"), a
            folder of such files, `wikitext2`, `c4` or `ptb`, or any data set `owner/name` of the Hugging Face hub.
        split: of a data set on the hub; files have none.

    Raises:
        CalibrationError: nothing there, not readable, or no text in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        documents = [document for file in _text_files(path) for document in _read_file(file)]
    elif path.is_file():
        documents = list(_read_file(path))
    elif str(source) in NAMED_DATASETS or _looks_like_hub_id(str(source)):
        documents = _read_hub_dataset(str(source), split)
    else:
        raise CalibrationError(
            f"There is no text at {str(source)!r}. Give a {', '.join(SUFFIXES)} file, a folder of them, "
            f"{', '.join(NAMED_DATASETS)}, or a data set of the hub as owner/name."
        )
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{str(source)!r} holds no text: every document in it is empty. Give another source.")
    return Texts(tuple(documents), str(source), _sha256(documents))


def tokenize(texts: Texts, tokenizer: Any) -> torch.Tensor:
    """All documents as one stream of token ids, (T,) int64, without special tokens in between."""
    # The stream is longer than any model's context on purpose; tokenizers would warn of it.
    ids = tokenizer(texts.joined(), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _text_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise CalibrationError(f"The folder {folder} holds no {', '.join(SUFFIXES)} file. Give one that does.")
    return files


def _read_file(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        else:
            yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path}, line {number}, is not JSON: {error.msg}. Mend the line.") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise CalibrationError(f'{path}, line {number}, has no string "text". Each line needs one.')
            yield row["text"]


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"Reading {path} needs pyarrow: pip install 'ssmc[parquet]'.") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}.") from error
    if "text" not in table.column_names:
        raise CalibrationError(f'{path} has no column "text", only {", ".join(table.column_names)}. Rename one.')
    yield from (text for text in table.column("text").to_pylist() if text is not None)


def _looks_like_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith(("/", ".", "~")) and not source.endswith(SUFFIXES)


def _read_hub_dataset(source: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"Data sets by name ({source}) need: pip install 'ssmc[datasets]'.") from error
    name, configuration, column, rows = NAMED_DATASETS.get(source, (source, None, "text", None))
    try:
        data = datasets.load_dataset(name, configuration, split=split, streaming=rows is not None)
        picked = data.take(rows) if rows is not None else data
        return [row[column] for row in picked]
    except KeyError as error:
        raise CalibrationError(f"The data set {name} has no column {error}; save its text as .jsonl.") from error
    except Exception as error:  # the library raises its own, requests', fsspec's and huggingface_hub's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"The data set {name} could not be loaded ({reason}). "
            "Without a network, give a local file or folder instead."
        ) from error


def _sha256(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode())
        digest.update(b"\0")  # so that moving text between documents changes the hash
    return digest.hexdigest()
