"""What an export starts from: a compressed model, or a dense one, and the tokens it is compared on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmc.exporters.cutting import Shrunk, shrink
from ssmc.exporters.verify import sample_tokens
from ssmc.runtime.errors import UsageError
from ssmc.runtime.manifest import MANIFEST, MaskedManifest, Origin, read_compressed
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.tokenizers import has_tokenizer, load_tokenizer, tokenizer_directory
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from ssmc.runtime.versions import versions

RANDOM = 4096  # tokens that stand for text where there is no tokenizer
EMBEDDED_TEXT, RANDOM_TEXT = "the embedded stories", "random tokens"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        checkpoint: the masked model, or the dense one; float32 in memory, a part at a time, see `Streamed`.
        manifest: of the artefact; None for a dense model.
        tokenizer: where the tokenizer's files are; None where there is none.
    """

    checkpoint: Checkpoint
    manifest: MaskedManifest | None
    tokenizer: Path | None

    @property
    def origin(self) -> Origin:
        """The dense model."""
        if self.manifest is not None:
            return self.manifest.source
        return Origin(self.checkpoint.source, self.checkpoint.format, None)

    @property
    def dense_d_state(self) -> int:
        """States before pruning."""
        before = None if self.manifest is None else self.manifest.dimensions.get("d_state")
        return before or self.checkpoint.dimensions.d_state

    @property
    def provenance(self) -> dict[str, Any]:
        """How the model was made, for its configuration."""
        if self.manifest is None:
            return {"version": versions()["ssmc"]}
        run = {key: self.manifest.config.get(key) for key in ("pattern", "sparsity", "score", "repair")}
        return {"version": self.manifest.versions["ssmc"], **run}

    def shrunk(self, uneven: bool) -> Shrunk:
        """The model without what is silent; a dense one as it is. `uneven` as for `shrink`."""
        if self.manifest is None:
            return Shrunk(self.checkpoint.tensors(), self.checkpoint.config, [])
        return shrink(self.checkpoint, self.manifest, uneven=uneven)


@dataclass(frozen=True)
class Tokens:
    """What a model and its export are run on.

    Attributes:
        sample: (B, L), for logits.
        stream: (T,), for perplexity.
        source: where they come from.
        real: whether they are text.
    """

    sample: torch.Tensor
    stream: torch.Tensor
    source: str
    real: bool


def find_manifest(directory: str | Path, dense: bool) -> MaskedManifest | None:
    """The manifest of what `compress` wrote; None where `directory` is no artefact and a dense model will do.

    Raises:
        UsageError: it is an export, or no artefact although one is wanted.
    """
    path = Path(directory).expanduser()
    return None if dense and not (path / MANIFEST).is_file() else read_compressed(path)


def read_source(directory: str | Path, manifest: MaskedManifest | None) -> Source:
    """Read the model of an artefact, or a dense one.

    Raises:
        SsmcError: there is none.
    """
    if manifest is None:
        checkpoint = load_checkpoint(str(directory), dtype=torch.float32, lazy=True)
        return Source(checkpoint, None, tokenizer_directory(checkpoint))
    path = Path(directory).expanduser()
    checkpoint = load_checkpoint(path, dtype=torch.float32, lazy=True)
    return Source(checkpoint, manifest, path if has_tokenizer(path) else None)


def read_tokens(source: Source, text: str | None = None) -> Tokens:
    """Text, where the model has a tokenizer; otherwise random tokens.

    Args:
        source: the model.
        text: as `read_texts` takes it; None: the embedded stories.

    Raises:
        UsageError: there is a text and no tokenizer.
    """
    checkpoint = source.checkpoint
    vocab_size = checkpoint.dimensions.vocab_size
    if source.tokenizer is None:
        if text is not None:
            raise UsageError(f"{checkpoint.source} comes without a tokenizer, so {text} cannot be read.")
        stream = torch.randint(vocab_size, (RANDOM,), generator=torch.Generator().manual_seed(0))
        return Tokens(sample_tokens(None, vocab_size), stream, RANDOM_TEXT, False)
    stream = tokenize(read_texts(heldout_path() if text is None else text), load_tokenizer(checkpoint))
    return Tokens(sample_tokens(stream, vocab_size), stream, EMBEDDED_TEXT if text is None else str(text), True)
