"""Whether an export keeps to a limit of memory, before it starts."""

from __future__ import annotations

from ssmc.exporters.format import Format
from ssmc.exporters.verify import BATCH, LENGTH
from ssmc.runtime.amounts import in_mib
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.checkpoints.streamed import KEPT, least_resident

LOGITS = 6  # copies of the logits that are compared


def keep_to(limit: int | None, checkpoint: Checkpoint, format: Format) -> None:
    """Let a model that is streamed keep no more parts in memory than a limit allows.

    Args:
        limit: bytes that the process may have resident; None: none.
        checkpoint: the model, changed in place.
        format: what is written.

    Raises:
        UsageError: the limit cannot be kept; it says what is the least.
    """
    if limit is None:
        return
    sizes, at_once = checkpoint.dimensions, format.at_once
    if checkpoint.streamed is None:
        at_once = max(at_once, 12)
    least = least_resident(checkpoint.streamed) + LOGITS * 4 * BATCH * LENGTH * sizes.vocab_size
    least += at_once * checkpoint.parameters
    if least > limit:
        raise UsageError(
            f"This export to {format.name} needs at least {in_mib(least)} of memory, more than --max-memory allows. "
            "Give that, or another --format."
        )
    if checkpoint.streamed is not None:
        checkpoint.streamed.kept = min(KEPT, limit - least)
