"""Documents out of files: prose, JSON lines, JSON and parquet, compressed or not, told apart by their content."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text.content import (
    PARQUET,
    PEEK,
    check_is_text,
    decoded,
    is_json_array,
    is_json_lines,
    is_json_object,
    mended,
    opened,
    table_delimiter,
)

SUFFIXES = (".txt", ".jsonl", ".parquet")  # the usual names
_ALSO = (".json", ".md", ".text", ".ndjson", ".csv", ".tsv")
_LONGEST = 1 << 27  # letters of a field of a table
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


_KINDS = {list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
"""Values of JSON that are no text, for messages."""


def text_files(folder: Path) -> list[Path]:
    """The files of a folder that are named like text, also compressed, in the order of their names.

    Raises:
        CalibrationError: there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _named_like_text(path))
    if not files:
        raise CalibrationError(f"The folder {folder} holds no {', '.join(SUFFIXES)} file. Give one that does.")
    return files


def _named_like_text(path: Path) -> bool:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSED:
        return suffixes[-2:-1] != [".tar"]
    if path.suffix == ".json":  # a folder of text may hold settings as well
        with opened(path) as file:
            start = file.peek(PEEK)[:PEEK]
        return is_json_lines(start, False) or is_json_array(start)
    return path.suffix in (*SUFFIXES, *_ALSO)


def documents(path: Path, most: int | None = None) -> Iterator[str]:
    """The documents of one file or pipe, one after the other, without holding them all.

    Args:
        path: of the file.
        most: bytes of prose to read, from its beginning; None for all: a little compressed text may be a lot of it.

    Raises:
        CalibrationError: it cannot be read, is not text, or has no text in it.
    """
    with opened(path) as file:
        start = file.peek(PEEK)[:PEEK]
        if start.startswith(PARQUET):
            yield from _parquet(path)
            return
        check_is_text(start, path)
        lines = decoded(file, start, path)
        if is_json_lines(start, path.suffix in (".jsonl", ".ndjson")):
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield text_of(line, f"{path}, line {number},")
        elif is_json_array(start) or (path.suffix == ".json" and is_json_object(start)):
            yield from _whole_json("".join(lines), path)
        elif delimiter := table_delimiter(start):
            yield from _table(lines, delimiter, path)
        else:
            pieces = islice(iter(lambda: file.read(PEEK), b""), None if most is None else -(-most // PEEK))
            lines = decoded(pieces, start, path)
            yield mended("".join(lines).replace("\r\n", "\n").replace("\r", "\n"))


def _table(lines: Iterable[str], delimiter: str, path: Path) -> Iterator[str]:
    """The column "text" of a table."""
    csv.field_size_limit(_LONGEST)
    try:
        for row in csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True):
            yield mended(row["text"] or "")
    except csv.Error as error:
        raise CalibrationError(f"{path} is a table that cannot be read: {error}. Correct it.") from error


def text_of(line: str, where: str) -> str:
    """The text of one line of JSON lines.

    Args:
        line: one JSON object with a string "text", or a string.
        where: what to call the line in errors.

    Raises:
        CalibrationError: it is not such an object.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON: {getattr(error, 'msg', error)}. Correct the line.") from error
    except RecursionError as error:
        raise CalibrationError(
            f"{where} is not JSON that can be read: it is nested too deeply. Correct the line."
        ) from error
    return _field(row, where)


def _field(row: Any, where: str) -> str:
    if isinstance(row, str):
        return mended(row)
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return mended(row["text"])
    if isinstance(row, dict) and "text" in row:
        raise CalibrationError(f'{where} has no string "text": it is {_kind(row["text"])}.')
    has = f" It has {', '.join(map(repr, list(row)[:5]))}." if isinstance(row, dict) and row else ""
    has = has or f" It is {_kind(row)}."
    raise CalibrationError(f'{where} has no string "text".{has} Each needs one.')


def _kind(value: Any) -> str:
    """What a value of JSON is, where it is no text."""
    return _KINDS.get(type(value), "a number")


def _whole_json(text: str, path: Path) -> Iterator[str]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is not JSON: {getattr(error, 'msg', error)}. Correct it.") from error
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield _field(row, f"{path}, entry {number},")


def parquet_file(path: Path) -> Any:
    """A parquet file with a column "text", opened by pyarrow.

    Raises:
        CalibrationError: pyarrow is missing, or it is no such file.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(f"Reading {path} needs pyarrow: pip install 'ssmc[parquet]'.") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}.") from error
    if "text" not in file.schema_arrow.names:
        raise CalibrationError(f'{path} has no column "text", only {", ".join(file.schema_arrow.names)}. Rename one.')
    return file


def row_group(file: Any, number: int, path: Path) -> list[str]:
    """The texts of one row group."""
    import pyarrow

    try:
        column = file.read_row_group(number, columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is a damaged parquet file: {str(error).splitlines()[0]}.") from error
    return [mended(text) for text in column if isinstance(text, str)]


def _parquet(path: Path) -> Iterator[str]:
    file = parquet_file(path)
    for number in range(file.num_row_groups):
        yield from row_group(file, number, path)
