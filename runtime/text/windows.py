"""Windows of a text, drawn by a seed; of a large text only what is drawn is read and tokenised.

A small text is taken as one stream, which is cut into windows. Of a large one places are drawn, and each window is what
stands there: memory and time depend on what was asked for, not on the size of the source. Text that cannot be read at
any place (compressed, from a pipe, from the hub) is read from its beginning, up to as much as leaves a choice.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.text.content import (
    PARQUET,
    PEEK,
    encoding_of,
    is_compressed,
    is_json_array,
    is_json_lines,
    mended,
    table_delimiter,
)
from ssmc.runtime.text.files import parquet_file, row_group, text_files, text_of
from ssmc.runtime.text.reading import BETWEEN, each_document, no_text, sha256_of, token_ids

SMALL = 2 << 20  # bytes of a text that is always taken whole
BYTES = (12, 48, 192)  # a token at most, tried in this order; English has 3 to 5, a row of dashes more
CHOICE = 2  # a text is large that holds this many times what is asked for
SPARE = 2  # places drawn for every window: some fall too near to another one, or to the end


@dataclass(frozen=True)
class Drawn:
    """Windows and what they were cut from."""

    tokens: torch.Tensor  # (n, length) int64; fewer than asked for where the text has fewer
    source: str
    sha256: str  # of the documents, or of the pieces of a large text, that the windows were cut from
    available: int  # tokens the text was found to have, where it has not enough for one window


def draw_windows(source: str | Path, tokenizer: Any, count: int, length: int, seed: int) -> Drawn:
    """Draw windows that do not overlap, without replacement.

    Args:
        source: as in `read_texts`.
        tokenizer: the model's.
        count: how many windows; fewer are returned where the text has fewer.
        length: tokens of a window.
        seed: of the draw.

    Returns:
        The windows; none where the text does not fill one.

    Raises:
        CalibrationError: there is no text, or it cannot be read.
    """
    most = max(SMALL, CHOICE * count * length * BYTES[0])
    path = Path(source).expanduser()
    if (parts := _seekable(path)) and sum(part.size for part in parts) > most:
        return _from_places(str(source), parts, tokenizer, (count, length), seed)
    found, size = [], 0
    for document in each_document(source, most=4 * most):
        found.append(document)
        size += len(document)
        if parts is None and size > most:  # it would never end, or take as long as the whole of it
            break
    if not any(document.strip() for document in found):
        raise no_text(source)
    if size > 2 * most:  # of one document that cannot be read in parts
        found = [_cut(BETWEEN.join(found), most, seed)]
    tokens = token_ids(BETWEEN.join(found), tokenizer)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return Drawn(windows[order[:count]], str(source), sha256_of(found), len(tokens))


def _cut(text: str, most: int, seed: int) -> str:
    start = random.Random(seed).randrange(len(text) - most)
    return text[start : start + most]


@dataclass(frozen=True)
class _Part:
    """A piece of a source that can be read from any place."""

    size: int  # bytes
    read: Callable[[int], Iterator[str]]  # place -> the text from there on, piece by piece
    between: str = BETWEEN  # these pieces: documents, unless it is one


def _seekable(path: Path) -> list[_Part] | None:
    """The parts of a file or folder; None for what can only be read from its beginning."""
    if path.is_dir():
        parts = [_seekable(file) for file in text_files(path)]
        return None if None in parts else [part for found in parts for part in found]
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            start = file.read(PEEK)
        if start.startswith(PARQUET):
            return _row_groups(path)
        if is_compressed(path) or encoding_of(start) != "utf-8" or is_json_array(start) or b"\0" in start:
            return None
        if table_delimiter(start):
            return None
    except OSError:
        return None  # whoever reads it says why
    size = path.stat().st_size
    if is_json_lines(start, path.suffix in (".jsonl", ".ndjson")):
        return [_Part(size, lambda place: _lines_from(path, place))]
    return [_Part(size, lambda place: _prose_from(path, place), between="")]


def _row_groups(path: Path) -> list[_Part]:
    file = parquet_file(path)
    column = file.schema_arrow.names.index("text")
    parts = []
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        size = group.column(column).total_uncompressed_size if group.num_columns > column else group.total_byte_size
        parts.append(_Part(size, lambda place, number=number: _rows_from(file, number, place, path)))
    return parts


def _rows_from(file: Any, number: int, place: int, path: Path) -> Iterator[str]:
    for document in row_group(file, number, path):
        length = len(document.encode())
        if place < length:
            yield _rest(document, place / length)
        place = max(0, place - length)


def _lines_from(path: Path, place: int) -> Iterator[str]:
    """Documents of JSON lines from the one around `place` on, the first from about there."""
    with path.open("rb") as file:
        start = _line_start(file, place)
        file.seek(start)
        first = True
        for line in file:
            if line.strip():
                document = text_of(line.decode("utf-8", errors="replace"), f"{path}, the line at byte {start},")
                yield _rest(document, (place - start) / len(line)) if first else document
            start, first = start + len(line), False


def _line_start(file: Any, place: int) -> int:
    """Where the line around `place` begins."""
    end = place
    while end:
        begin = max(0, end - PEEK)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def _prose_from(path: Path, place: int) -> Iterator[str]:
    """Prose from about `place` on, in pieces; the first begins behind a space."""
    with path.open("rb") as file:
        file.seek(place)
        rest = b""
        first = place > 0
        while piece := file.read(PEEK):
            piece = rest + piece
            cut = piece.rfind(b" ") + 1 or len(piece)  # no piece ends inside a word or a character
            piece, rest = piece[:cut], piece[cut:]
            text = mended(piece.decode("utf-8", errors="ignore"))
            yield text.partition(" ")[2] if first else text
            first = False
        yield rest.decode("utf-8", errors="ignore")


def _rest(document: str, share: float) -> str:
    """What follows the first space behind a share of a document; all of it from its beginning."""
    start = int(share * len(document))
    return document if start == 0 else document[start:].partition(" ")[2]


def _from_places(source: str, parts: Sequence[_Part], tokenizer: Any, shape: tuple[int, int], seed: int) -> Drawn:
    """Windows at places drawn by the seed, in the order of the draw."""
    count, length = shape
    for size in BYTES:
        windows, texts = [], []
        for text in _blocks(parts, size * length, count, seed):
            tokens = token_ids(text, tokenizer)[:length]
            if len(tokens) == length:  # else the source ends there, or its tokens are long
                windows.append(tokens)
                texts.append(text)
            if len(windows) == count:
                break
        if len(windows) == count:
            break
    tokens = torch.stack(windows) if windows else torch.empty(0, length, dtype=torch.long)
    return Drawn(tokens, source, sha256_of(texts), tokens.numel())


def _blocks(parts: Sequence[_Part], size: int, count: int, seed: int) -> Iterator[str]:
    """Pieces of `size` bytes at places drawn by the seed, that do not overlap, more of them than `count`."""
    ends = list(accumulate(part.size for part in parts))
    blocks = range(ends[-1] // size)
    for block in random.Random(seed).sample(blocks, min(len(blocks), SPARE * count)):
        number = bisect_right(ends, block * size)
        part = parts[number]
        pieces = part.read(block * size - ends[number] + part.size)
        yield _enough(pieces, size, part.between)


def _enough(pieces: Iterator[str], size: int, between: str) -> str:
    """The text of a block: what follows belongs to the next one."""
    found, have = [], 0
    for piece in pieces:
        found.append(piece)
        have += len(piece.encode()) + len(between)
        if have >= size:
            break
    return between.join(found).encode()[:size].decode("utf-8", errors="ignore")
