"""Data sets of the hub, by the field's short names or by their own, read as streams."""

from __future__ import annotations

from collections.abc import Iterator

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text.content import mended
from ssmc.runtime.text.files import SUFFIXES

# name -> (hub id, configuration, text column)
NAMED_DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "sentence"),
}


def is_dataset(source: str) -> bool:
    """Whether this names a data set: by a short name, or as owner/name."""
    named = source.count("/") == 1 and not source.startswith(("/", ".", "~")) and not source.endswith(SUFFIXES)
    return source in NAMED_DATASETS or named


def stream(source: str, split: str) -> Iterator[str]:
    """The documents of a data set one after the other; nothing is fetched beyond what is asked for.

    Raises:
        CalibrationError: there is none, or no network, or no text in it.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"Data sets by name ({source}) need: pip install 'ssmc[datasets]'.") from error
    name, configuration, column = NAMED_DATASETS.get(source, (source, None, "text"))
    try:
        for row in datasets.load_dataset(name, configuration, split=split, streaming=True):
            yield mended(row[column])
    except KeyError as error:
        raise CalibrationError(f"The data set {name} has no column {error}; save its text as .jsonl.") from error
    except Exception as error:  # the library raises its own, requests', fsspec's and huggingface_hub's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"The data set {name} could not be loaded ({reason}). "
            "Without a network, give a local file or folder instead."
        ) from error
