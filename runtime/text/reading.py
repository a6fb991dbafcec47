"""Whole texts: all documents of a source, in their order, as perplexity is measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text.datasets import NAMED_DATASETS, is_dataset, stream
from ssmc.runtime.text.files import SUFFIXES, documents, text_files

if TYPE_CHECKING:
    import torch

BETWEEN = "\n\n"  # documents of a stream: how the field joins WikiText's rows
MOST = 16 << 20  # characters of a data set of the hub that are read, in place of all of it


@dataclass(frozen=True)
class Texts:
    """Documents and where they came from."""

    documents: tuple[str, ...]
    source: str  # as the user named it
    sha256: str  # of the documents, so that a run can be repeated on the same text

    def joined(self) -> str:
        """All documents as one stream, two newlines between them: how the field joins WikiText's rows."""
        return BETWEEN.join(self.documents)


def read_texts(source: str | Path, split: str = "train") -> Texts:
    """Read documents.

    Args:
        source: a file of prose (one document), of JSON lines (one object with "text" a line), of JSON, or of parquet
            (column "text"), compressed or not, whatever its name; a pipe; a folder of such files; `wikitext2`, `c4` or
            `ptb`; or any data set `owner/name` of the Hugging Face hub, of which the first 16 Mi characters are read.
        split: of a data set on the hub; files have none.

    Raises:
        CalibrationError: nothing there, not readable, or no text in it.
    """
    found = tuple(each_document(source, split))
    if not any(document.strip() for document in found):
        raise no_text(source)
    return Texts(found, str(source), sha256_of(found))


def each_document(source: str | Path, split: str = "train", most: int | None = None) -> Iterator[str]:
    """The documents of a source one after the other, see `read_texts`; of a file of prose `most` bytes, None for all.

    Raises:
        CalibrationError: nothing there, or not readable.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return chain.from_iterable(documents(file, most) for file in text_files(path))
    if path.exists():  # pipes are no regular files
        return documents(path, most)
    if is_dataset(str(source)):
        return _up_to(MOST, stream(str(source), split))
    raise CalibrationError(
        f"There is no text at {str(source)!r}. Give a {', '.join(SUFFIXES)} file, a folder of them, "
        f"{', '.join(NAMED_DATASETS)}, or a data set of the hub as owner/name."
    )


def _up_to(characters: int, stream: Iterator[str]) -> Iterator[str]:
    for document in stream:
        yield document
        characters -= len(document)
        if characters < 0:
            return


def no_text(source: Any) -> CalibrationError:
    """What to raise where every document is empty."""
    return CalibrationError(f"{str(source)!r} holds no text: every document in it is empty. Give another source.")


def tokenize(texts: Texts, tokenizer: Any) -> torch.Tensor:
    """All documents as one stream of token ids, (T,) int64, without special tokens in between."""
    return token_ids(texts.joined(), tokenizer)


def token_ids(text: str, tokenizer: Any) -> torch.Tensor:
    """The tokens of a text, (T,) int64, without special tokens."""
    import torch

    # The stream is longer than any model's context on purpose; tokenizers would warn of it.
    # Nor is more asked for than the ids: the lists beside them take ten times the text's memory.
    alone = {"return_attention_mask": False, "return_token_type_ids": False}
    ids = tokenizer(text, add_special_tokens=False, verbose=False, **alone)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def sha256_of(documents: Iterable[str]) -> str:
    """The hash of documents and of where they end."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode())
        digest.update(b"\0")  # so that moving text between documents changes the hash
    return digest.hexdigest()
