"""What a file of text holds, read from its first bytes: how it is compressed, encoded and laid out."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ssmc.runtime.errors import CalibrationError

PEEK = 1 << 16  # bytes that are looked at; a first line of JSON may be long
PARQUET = b"PAR1"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
# Files that people take for text, and what to do with them.
_FOREIGN = {
    b"%PDF": "a PDF; save its text as .txt",
    b"PK\x03\x04": "a zip archive or an Office document; unpack it, or save its text as .txt",
    b"\xd0\xcf\x11\xe0": "an Office document; save its text as .txt",
    b"{\\rtf": "an RTF document; save its text as .txt",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it, or compress it by gzip or zstd",
    b"\x1f\x9d": "compressed by compress; unpack it, or compress it by gzip or zstd",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x93NUMPY": "an array of numpy; save its text as .jsonl",
    b"\x89HDF": "an HDF5 file; save its text as .jsonl",
    b"SQLite format 3": "an SQLite database; save its text as .jsonl",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"\x80\x02": "a pickle; save its text as .jsonl",
    b"\x80\x03": "a pickle; save its text as .jsonl",
    b"\x80\x04": "a pickle; save its text as .jsonl",
    b"\x80\x05": "a pickle; save its text as .jsonl",
}
_SURROGATES = re.compile("[\ud800-\udfff]")
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_ENCODINGS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # behind: UTF-32's begins like it
_TAR, _TAR_AT = b"ustar", 257
_NESTED = 2  # times that text may be compressed
_FIELD = re.compile(r"[\w .-]{1,40}")


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file or pipe, decompressed; reading starts at the first one.

    Raises:
        CalibrationError: it cannot be read, or not be decompressed.
    """
    try:
        with path.open("rb") as raw:
            buffered = _peekable(raw)
            for _ in range(_NESTED):
                start = buffered.peek(8)[:8]
                kind = next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)
                buffered = buffered if kind is None else _peekable(_decompressed(buffered, kind, path))
            yield buffered
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise CalibrationError(f"{path} is compressed text that breaks off or is damaged. Get it again.") from error
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise CalibrationError(f"{path} cannot be read: {reason}. Check the file and its permissions.") from error


def is_compressed(path: Path) -> bool:
    """Whether a regular file starts like compressed data."""
    with path.open("rb") as raw:
        start = raw.read(8)
    return any(start.startswith(magic) for magic in _COMPRESSED)


def _peekable(raw: Any) -> io.BufferedReader:
    return io.BufferedReader(raw, buffer_size=PEEK)


def _decompressed(raw: BinaryIO, kind: str, path: Path) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    try:
        import pyarrow
    except ImportError as error:
        raise CalibrationError(f"Reading {path}, which is zstd, needs pyarrow: pip install 'ssmc[parquet]'.") from error
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def check_is_text(start: bytes, name: Any) -> None:
    """Refuse what is not text by what it is.

    Raises:
        CalibrationError: with what it is.
    """
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise CalibrationError(f"{name} is not text but {what}, or give another source.")
    if start[_TAR_AT:].startswith(_TAR):
        raise CalibrationError(f"{name} is not text but a tar archive; unpack it, or give another source.")
    if b"\0" in start and encoding_of(start) not in ("utf-16", "utf-32"):
        if not start[::2].strip(b"\0") or not start[1::2].strip(b"\0"):
            raise CalibrationError(f"{name} is UTF-16 without a byte order mark, it seems. Convert it to UTF-8.")
        raise CalibrationError(f"{name} is not text: it holds zero bytes. Give a text file.")


def encoding_of(start: bytes) -> str:
    """The encoding a byte order mark names; UTF-8 without one."""
    return next((name for mark, name in _ENCODINGS.items() if start.startswith(mark)), "utf-8")


def is_json_lines(start: bytes, named_so: bool) -> bool:
    """Whether text is JSON lines: by its first line, or by its name where that line is broken.

    Args:
        start: the first bytes of the file.
        named_so: whether its name ends in .jsonl: then a broken first line is a mistake to report, not prose.
    """
    lines = start.decode(encoding_of(start), errors="ignore").lstrip().split("\n", 1)
    if not lines[0].startswith("{"):
        return named_so and bool(lines[0]) and not is_json_array(start)
    try:
        return isinstance(json.loads(lines[0]), dict)
    except RecursionError:
        return True  # whoever reads it says that it is nested too deeply
    except ValueError:
        # a first line longer than what was read is cut off; prose that starts with a brace has no quoted key next
        return named_so or (len(lines) == 1 and lines[0][1:].lstrip().startswith('"'))


def is_json_array(start: bytes) -> bool:
    """Whether text is one JSON array of objects or strings, as `json.dump` of a list writes it."""
    text = start.decode(encoding_of(start), errors="ignore").strip()
    if text[:1] != "[":
        return False
    line, _, more = text.partition("\n")
    inside = text[1:].lstrip()
    if more and _is_json(line):  # an array on every line
        return False
    if inside[:1] != '"':
        return inside[:1] == "{"
    try:
        end = json.JSONDecoder().raw_decode(inside)[1]
    except ValueError:
        return len(start) == PEEK  # a first string longer than what was read
    return inside[end:].lstrip()[:1] in ("", ",", "]")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def table_delimiter(start: bytes) -> str | None:
    """What separates the columns of a table whose first line names them, "text" among them; None for other text."""
    line = start.decode(encoding_of(start), errors="ignore").split("\n", 1)[0].strip()
    for delimiter in (",", "\t", ";"):
        names = [name.strip().strip('"') for name in line.split(delimiter)]
        if len(names) > 1 and "text" in names and all(_FIELD.fullmatch(name) for name in names if name):
            return delimiter
    return None


def is_json_object(start: bytes) -> bool:
    """Whether text may be one JSON object over several lines, as `json.dump(..., indent=2)` writes it."""
    return "".join(start[:4096].decode(encoding_of(start), errors="ignore").split())[:2] == '{"'


def decoded(lines: Iterable[bytes], start: bytes, name: Any) -> Iterator[str]:
    """Lines of text from lines of bytes.

    Raises:
        CalibrationError: they are not in the encoding that their byte order mark names, or UTF-8.
    """
    encoding = encoding_of(start)
    decoder = codecs.getincrementaldecoder(encoding)()
    at = 0
    try:
        for line in lines:
            yield decoder.decode(line)
            at += len(line)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        kind = encoding.removesuffix("-sig").upper()
        raise CalibrationError(f"{name} is not {kind} text (byte {at + error.start}). Convert it to UTF-8.") from error


def mended(text: str) -> str:
    """Text with lone surrogates replaced by U+FFFD: JSON may escape them, no tokenizer and no hash can take them."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)
