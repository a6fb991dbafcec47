"""What a run needs of memory, before it starts: whether it fits into a limit, and where hidden states then lie."""

from __future__ import annotations

from dataclasses import dataclass

from ssmc.compressor.distillation.steps import STEP
from ssmc.compressor.methods.channels.fisher import AT_ONCE
from ssmc.compressor.methods.method import Plan
from ssmc.compressor.methods.width.fit import AT_HAND
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import WIDTH
from ssmc.runtime.amounts import in_mib
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.residual import sites
from ssmc.runtime.models.checkpoints import Checkpoint
from ssmc.runtime.models.checkpoints.streamed import KEPT, least_resident
from ssmc.runtime.models.generation.session import LOGITS_AT_ONCE
from ssmc.runtime.ranks import ranks

ACTIVATIONS = 24  # numbers of each channel and token of one sample: what a mixer computes on the way
SQUARES = 4  # (D, D) matrices of float64 where second moments of channels are collected
COPIES, SEARCHED, TAUGHT = 2, 2, 5  # of the model in float32: in any run, more in a search, more where steps are taken
WALKED = 3  # hidden states of all samples: of the pruned model, of the dense one, and what a layer is fitted to
SEARCHING = 448 << 20  # bytes of a search beside its models: the text, which comes later, tables, kernels, samples
LOGITS = 4  # copies of the logits that are compared at once
OF_NORMS = 20  # (D, D) matrices of float32 of every norm of the stream: moments, maps, and what moves them
STREAMS = 3  # copies of the dense stream held at once


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs.

    Attributes:
        least: with hidden states on disk.
        hidden: of the hidden states of all samples, copies included.
    """

    least: int
    hidden: int

    def spills(self, limit: int | None) -> bool:
        """Whether hidden states lie on disk."""
        return limit is not None and self.least + self.hidden > limit

    def kept(self, limit: int | None) -> int:
        """Bytes of the model that may stay in memory while they are not used."""
        if limit is None:
            return KEPT
        return max(0, min(KEPT, limit - self.least - (0 if self.spills(limit) else self.hidden)))


def need(checkpoint: Checkpoint, plan: Plan, shape: tuple[int, int] | None) -> Need:
    """What a run that goes layer by layer needs.

    Args:
        checkpoint: the model, opened.
        plan: of the run.
        shape: (nsamples, seqlen) of the calibration text; None where there is none.
    """
    assert checkpoint.streamed is not None
    sizes = checkpoint.dimensions
    count, length = shape or (0, 0)
    least = least_resident(checkpoint.streamed)
    least += 4 * ACTIVATIONS * length * sizes.d_inner
    if plan.fits_out_proj or any(step.name in ("channels", "weights") for step in plan.steps):
        least += 8 * SQUARES * sizes.d_inner**2
    copies = 1 + plan.follows_dense + 3 * plan.follows_stream + plan.carries_out("weights")
    each = 4 if plan.config.hidden_dtype == "float32" else 2
    return Need(least, each * copies * count * length * sizes.d_model)


def check_limit(found: Need, limit: int | None) -> None:
    """Refuse a limit that cannot be kept.

    Raises:
        UsageError: saying what is the least.
    """
    if limit is not None and found.least > limit:
        raise UsageError(
            f"This run needs at least {in_mib(found.least)} of memory, more than --max-memory allows: the largest part "
            "of the model in float32, what is computed of one sample, and ssmc itself. Give --max-memory "
            f"{in_mib(found.least)}, or use a shorter --seqlen."
        )


def need_whole(checkpoint: Checkpoint, config: CompressConfig, searches: bool) -> int:
    """Bytes that a run needs that looks at the whole model at once.

    Args:
        checkpoint: the model, opened or read.
        config: of the run.
        searches: whether sizes are searched for, which keeps the dense model, the best so far, and a trial.
    """
    sizes = checkpoint.dimensions
    copies = COPIES + SEARCHED * searches + TAUGHT * bool(config.distill)
    hidden = WALKED * -(-config.nsamples // ranks()) * config.seqlen * sizes.d_model
    logits = min(LOGITS_AT_ONCE, config.seqlen * sizes.vocab_size)
    on_the_way = max(config.seqlen, AT_ONCE if WIDTH in config.parts else 0)  # tokens of a pass
    if config.distill:
        on_the_way = sizes.n_layer * STEP  # what a gradient needs of every layer
    activations = ACTIVATIONS * on_the_way * sizes.d_inner
    numbers = copies * checkpoint.parameters + hidden + activations + LOGITS * logits
    if WIDTH in config.parts:
        norms = len(sites(checkpoint.architecture, checkpoint.model))
        sample = norms * sizes.d_model * config.seqlen
        numbers += OF_NORMS * norms * sizes.d_model**2 + STREAMS * max(sample, min(AT_HAND, config.nsamples * sample))
    return least_resident(None) + 4 * numbers + 8 * SQUARES * sizes.d_inner**2 + SEARCHING * searches


def check_whole(checkpoint: Checkpoint, config: CompressConfig, limit: int | None, searches: bool = False) -> None:
    """Refuse a limit for a run that needs the whole model in memory, where it cannot be kept.

    Raises:
        UsageError: saying what is the least.
    """
    if limit is None or (least := need_whole(checkpoint, config, searches)) <= limit:
        return
    raise UsageError(
        "A run that looks at the whole model at once (a goal, --distill, --pattern layer, width or ssm-module) needs "
        f"at least {in_mib(least)} of memory, more than --max-memory allows. Give that, fewer --nsamples, or another "
        "--pattern."
    )
