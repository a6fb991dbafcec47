"""`--format safetensors`: transformers' own layout, which most other software reads too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ssmc.exporters.format import Format, Job, Proof
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.exporters.runtimes import Runtime

TRANSFORMERS = "transformers"


class Safetensors(Format):
    """A checkpoint that `ssmc.runtime.models.checkpoints` writes and reads; other layouts derive from it."""

    name = "safetensors"
    help = "what transformers, vLLM, mlx-lm and llama.cpp's converter read"
    layout: ClassVar[str] = TRANSFORMERS  # as `write_checkpoint` calls it

    def prepare(self, job: Job) -> Job:
        """Refuse sizes that no configuration of this layout can say.

        Raises:
            UsageError: heads that only llama.cpp takes.
        """
        from ssmc.runtime.models.consumers import misfit

        architecture = job.source.checkpoint.architecture
        sizes = architecture.dimensions(job.shrunk.config)
        if sizes.heads is not None and (reason := misfit("transformers", sizes)):
            raise UsageError(f"There is no export to {self.name} for this model: {reason}. Use --format gguf.")
        return job

    def space(self, job: Job) -> int:
        """The tensors."""
        from ssmc.runtime.models.checkpoints import tensor_bytes

        return tensor_bytes(job.shrunk.tensors)

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write config.json and weights."""
        from ssmc.runtime.models.checkpoints import write_checkpoint
        from ssmc.runtime.models.checkpoints.stored_config import in_new_words, said_in_full

        checkpoint, config = job.source.checkpoint, job.shrunk.config
        if self.layout == TRANSFORMERS:
            said = checkpoint.stored_config or in_new_words(checkpoint.config)
            checkpoint = replace(checkpoint, stored_config=said_in_full(said, checkpoint.config))
        config.ssmc = job.source.provenance  # transformers keeps keys it does not know
        sizes = checkpoint.architecture.dimensions(config)
        if sizes.heads is not None and checkpoint.architecture.capabilities.uniform:
            config.intermediate_size = sizes.d_inner  # mlx-lm and llama.cpp read it; transformers computes it
        return write_checkpoint(folder, job.shrunk.tensors, config, format=self.layout_of(job), like=checkpoint)

    def layout_of(self, job: Job) -> str:
        """The checkpoint format to write."""
        return self.layout

    def weight_bytes(self, job: Job, folder: Path) -> int:
        """Of the tensors."""
        return self.space(job)

    def verify(self, job: Job, folder: Path) -> Proof:
        """Read the checkpoint back from its files and run it beside the masked model."""
        from ssmc.exporters.verify import compare_checkpoint

        return Proof(compare_checkpoint(job.source.checkpoint, folder, job.tokens.sample, job.tokens.real))

    def runs_where(self, job: Job) -> Sequence[Runtime]:
        """What takes a checkpoint of these sizes."""
        from ssmc.exporters.runtimes import runs_where

        architecture = job.source.checkpoint.architecture
        sizes = architecture.dimensions(job.shrunk.config)
        epsilon = getattr(job.shrunk.config, "layer_norm_epsilon", None)
        otherwise = architecture.otherwise(job.shrunk.config)
        return runs_where(sizes, job.source.dense_d_state, architecture.model_type, epsilon, otherwise)


SAFETENSORS = Safetensors()
