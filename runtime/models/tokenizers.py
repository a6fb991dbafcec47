"""Find, load and copy a model's tokenizer; nothing in its files is ever executed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import Checkpoint, unpadded_vocab_size
from ssmc.runtime.models.checkpoints.reading import read_json
from ssmc.runtime.models.checkpoints.sources import EMBEDDED, TINY, download_tokenizer, is_hub_id
from ssmc.runtime.tiny import TINY_DIRECTORY

if TYPE_CHECKING:
    from ssmc.runtime.models.generation import OnnxExport

TOKENIZER_JSON = "tokenizer.json"

# Any one of these makes a tokenizer; the others only describe it.
_VOCABULARIES = (TOKENIZER_JSON, "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_DESCRIPTIONS: tuple[str, ...] = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_DESCRIPTIONS += ("chat_template.jinja",)
FILES = (*_VOCABULARIES, *_DESCRIPTIONS)

# The published checkpoints in mamba_ssm's layout come without a tokenizer and mean this one. 50277 is the length of its
# vocabulary, 50280 that of the padded embedding.
GPT_NEOX = "EleutherAI/gpt-neox-20b"
_NEOX_SIZES = range(50277, 50281)


def load_tokenizer(
    model: Checkpoint | OnnxExport | str | Path, override: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        model: the model; a directory is enough, but then nothing is known of its vocabulary.
        override: another tokenizer: a directory, a tokenizer.json file, a hub id, or "tiny".

    Raises:
        CheckpointError: there is none, it cannot be read, or it has more tokens than the model.
    """
    source = tokenizer_directory(model, override)
    where = str(override or _name(model))
    if source is None:
        raise CheckpointError(
            f"{where} comes without a tokenizer. Name one with --tokenizer: a folder, a tokenizer.json file or a "
            "hub id."
        )
    tokenizer = _load(source, where)
    if not isinstance(model, str | Path):
        check_fits(tokenizer, model.dimensions.vocab_size, where, model.source)
    return tokenizer


def check_fits(tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str, model: str) -> None:
    """See whether a model has an embedding for every token.

    Args:
        tokenizer: of `where`.
        vocab_size: rows of the embedding of `model`.
        where, model: what to call both in the error.

    Raises:
        CheckpointError: it has not.
    """
    needed = 1 + max(tokenizer.get_vocab().values(), default=0)  # not its length: ids may have gaps
    if needed > vocab_size:
        raise CheckpointError(
            f"The tokenizer of {where} has token ids up to {needed - 1}, the embedding of {model} only {vocab_size} "
            "rows, so they do not belong together. Name the right one with --tokenizer."
        )


def tokenizer_directory(model: Checkpoint | OnnxExport | str | Path, override: str | Path | None = None) -> Path | None:
    """Where the files of a model's tokenizer are, downloaded first if they are on the hub.

    Returns:
        A directory, or a tokenizer.json file on its own; None when the model has no tokenizer that could be found.

    Raises:
        CheckpointError: there is nothing at `override`.
    """
    if override is not None:
        return _find(override)
    directory = Path(model) if isinstance(model, str | Path) else model.directory
    if directory in EMBEDDED.values():
        return TINY_DIRECTORY
    if has_tokenizer(directory):
        return directory
    if isinstance(model, Checkpoint) and unpadded_vocab_size(model.config) in _NEOX_SIZES:
        try:
            return download_tokenizer(GPT_NEOX)
        except CheckpointError:  # it was only a guess; who needs a tokenizer says what to do
            return None
    return None


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer lies in a directory."""
    return any((directory / name).is_file() for name in _VOCABULARIES)


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy a tokenizer.

    Without a tokenizer_config.json transformers takes the class from the model's family, and that class builds a
    tokenizer of its own instead of reading tokenizer.json; so one is added that says to read it.

    Args:
        source: a directory, or a tokenizer.json file on its own.
        target: an existing directory.

    Returns:
        The files written.
    """
    if source.is_file():
        written = [Path(shutil.copyfile(source, target / TOKENIZER_JSON))]
    else:
        found = [name for name in FILES if (source / name).is_file()]
        written = [Path(shutil.copyfile(source / name, target / name)) for name in found]
    config = target / "tokenizer_config.json"
    if target / TOKENIZER_JSON in written and config not in written:
        content = {"tokenizer_class": PreTrainedTokenizerFast.__name__}
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")
        written.append(config)
    return written


def _find(override: str | Path) -> Path:
    """The directory or file a user means by `--tokenizer`."""
    if override == TINY:
        return TINY_DIRECTORY
    try:
        path = Path(override).expanduser()
    except RuntimeError:  # the home of a user who is not there
        path = Path(override)
    if path.is_file() or (path.is_dir() and has_tokenizer(path)):
        return path
    if path.is_dir():
        raise CheckpointError(f"There is no tokenizer in {override}: none of {', '.join(_VOCABULARIES)} is in it.")
    if isinstance(override, str) and is_hub_id(override):
        return download_tokenizer(override)
    raise CheckpointError(
        f"There is no tokenizer at {str(override)!r}. Name a folder, a tokenizer.json file or a hub id (owner/name)."
    )


def _load(source: Path, where: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = _read(source)
        tokenizer("a", add_special_tokens=False)  # some settings are only looked at now
        return tokenizer
    except CheckpointError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # bare Exception, OSError, ValueError, ImportError; and panics of Rust, which are none
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(
            f"The tokenizer of {where} cannot be read ({reason}). Name another with --tokenizer."
        ) from error


def _read(source: Path) -> PreTrainedTokenizerBase:
    if source.is_file():
        read_json(source)  # a better message than the tokenizer library's
        return PreTrainedTokenizerFast(tokenizer_file=str(source))
    if (source / TOKENIZER_JSON).is_file():
        read_json(source / TOKENIZER_JSON)
        # not AutoTokenizer: for model_type mamba it rebuilds GPT-NeoX's tokenizer around the vocabulary and adds
        # tokens to it, instead of reading what tokenizer.json says
        return PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _name(model: Checkpoint | OnnxExport | str | Path) -> str:
    return str(model) if isinstance(model, str | Path) else model.source
