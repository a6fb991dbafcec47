"""The methods of this folder, as the rest of ssmc sees them: channels or heads, and the fit of out_proj after them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ssmc.compressor.methods.channels import scores as scores  # registers them
from ssmc.compressor.methods.channels.counts import channels_of_layers, head_dim_to_keep
from ssmc.compressor.methods.channels.score import ChannelScore
from ssmc.compressor.methods.counts import default_multiple
from ssmc.compressor.methods.method import Job, Method, Outcome, Plan, Survey, Table
from ssmc.compressor.methods.registry import register_method, score
from ssmc.compressor.methods.tables import error_text
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, EXPERT, HEAD, HEAD_DIM, LAYER, Pattern, looks_at_text
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.dimensions import Mamba2Dimensions

FIT_TOKENS_PER_CHANNEL = 8
"""Calibration tokens below which a fit is worth a warning: half of the channels of `tiny` gone, its perplexity is 57
without and 835 with repair at one token a kept channel, 41 and 37 at four, 40 and 30 at eight."""


class Channels(Method):
    """Channels of d_inner of a Mamba-1, heads of a Mamba-2, with x_proj refitted on those that stay."""

    name = "channels"
    leaves = ("channels",)
    place = 10
    pattern: ClassVar[Pattern] = Pattern(CHANNEL, "channels", "`channel` (channels of d_inner)", "obs", combines=3)

    def needs_text(self, plan: Plan) -> bool:
        """For the repair, and for most scores."""
        part = self.pattern.name
        return plan.config.repair or looks_at_text(part, plan.config.score_of(part))

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up; gradients of the whole model are taken in one process."""
        return not self.looks_at_whole(plan)

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """Numbers of channels."""
        return {"channels": channels_of_layers(plan)}

    def looks_at_whole(self, plan: Plan) -> bool:
        """Where the score asks what errors cost the predictions."""
        part = self.pattern.name
        return cast(ChannelScore, score(part, plan.config.score_of(part))).needs_root

    def prepare(self, survey: Survey) -> Any:
        """What errors behind each layer cost the predictions, for a score that asks."""
        if not self.looks_at_whole(survey.plan):
            return None
        from ssmc.compressor.methods.channels.fisher import stream_roots

        return stream_roots(survey)

    def prune(self, job: Job) -> None:
        """A layer that keeps all of its channels is left out."""
        from ssmc.compressor.methods.channels.prune import prune_channels

        if job.plan.keep.channels[job.index] < job.plan.sizes.d_inner:
            prune_channels(job, self.pattern.name)

    def finish(self, job: Job) -> None:
        """Write the smaller block back to its places in the layer, with what else was changed in it."""
        if job.channels_kept is None or job.work is job.block:
            return
        from ssmc.runtime.models import families
        from ssmc.runtime.models.architectures.experts import Experts

        job.architecture.widen(job.block, job.work, families.CHANNEL, job.channels_kept)
        if experts := job.units_kept.get(EXPERT):  # they are gone from the smaller block, not silent
            for part, _ in job.architecture.mixtures_in(job.block):
                assert isinstance(part, Experts)
                part.remove(part.inside(job.block), experts)
        own = {id(parameter) for parameter in job.mixer.parameters()}
        for name, parameter in job.work.named_parameters():
            if id(parameter) not in own:
                job.block.get_parameter(name).detach().copy_(parameter)

    def notes(self, outcome: Outcome) -> list[str]:
        """On the width."""
        plan, width = outcome.plan, max(outcome.plan.keep.channels)
        config, sizes = plan.config, plan.sizes
        if sizes.heads is not None:
            return [
                f"{sizes.heads * width // sizes.d_inner} of {sizes.heads} heads stay in each layer. In the export the "
                "gated norm's weight makes up for its mean over fewer channels, in float32 even where the model is in "
                "half precision."
            ]
        if config.widths is not None:
            return [f"At most {width} of {sizes.d_inner} channels stay, as --widths says."]
        multiple = config.round_channels or default_multiple(sizes.d_inner)
        return [
            f"{width} of {sizes.d_inner} channels stay: the multiple of {multiple} nearest to sparsity "
            f"{config.sparsity_of(CHANNEL):g}. Hardware likes such widths; --round-channels takes another multiple."
        ]

    def tables(self, outcome: Outcome) -> list[Table]:
        """How many stay in each layer."""
        dense, gone = outcome.plan.sizes.d_inner, {removal.layer for removal in outcome.removed}
        rows = []
        for index, layer in enumerate(outcome.layers):
            kept = dense if layer.channels_kept is None else len(layer.channels_kept)
            rows.append((str(index), "removed" if index in gone else str(kept)))
        return [Table("Channels", ("layer", f"kept of {dense}"), tuple(rows))] if rows else []


class Heads(Channels):
    """Whole heads of mixers that have some, as many of every group."""

    name = "heads"
    pattern = Pattern(HEAD, "heads", "`head` (heads of a Mamba-2, also in hybrids)", "obs", combines=6)

    def check(self, plan: Plan) -> None:
        """Channels of a Mamba-2 are heads."""
        if CHANNEL in plan.config.parts:
            raise UsageError("The channels of this model form heads: give --pattern head or channel, not both.")

    def notes(self, outcome: Outcome) -> list[str]:
        """On the norm."""
        plan = outcome.plan
        sizes = plan.sizes
        heads = (sizes.heads or 0) * plan.keep.channels[0] // sizes.d_inner
        return [f"{heads} of {sizes.heads} heads stay in each mixer. {_NORM}"]


class HeadDims(Channels):
    """Channels of heads: as many of every head, whichever they are in each."""

    name = "head-dims"
    place = 11
    pattern = Pattern(HEAD_DIM, "channels of heads", "`head-dim` (channels of every head)", "obs", combines=7)

    def check(self, plan: Plan) -> None:
        """The number must be one that loaders take."""
        if CHANNEL in plan.config.parts:
            raise UsageError("head-dim goes with --pattern head, not with channel. Use head in its place.")

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """What of every head stays is asked for when it is needed; that it can be, at once."""
        channels = channels_of_layers(plan) if HEAD in plan.config.parts else plan.keep.channels
        head_dim_to_keep(replace(plan, keep=replace(plan.keep, channels=channels)))
        return {}

    def prune(self, job: Job) -> None:
        """Every mixer."""
        from ssmc.compressor.methods.channels.prune import prune_head_dims

        prune_head_dims(job, head_dim_to_keep(job.plan))

    def finish(self, job: Job) -> None:
        """Heads write the block back where both are removed."""
        if not job.plan.carries_out("heads"):
            super().finish(job)

    def notes(self, outcome: Outcome) -> list[str]:
        """On kernels that want certain sizes, and on the norm."""
        left, sizes = head_dim_to_keep(outcome.plan), cast("Mamba2Dimensions", outcome.plan.sizes)
        note = f"{left} of {sizes.head_dim} channels stay in each head. {_NORM}"
        if left & (left - 1):
            note += " Kernels for a GPU pad heads to a power of two of channels."
        return [note]

    def tables(self, outcome: Outcome) -> list[Table]:
        """The table of heads has the channels where both are removed."""
        return [] if outcome.plan.carries_out("heads") else super().tables(outcome)


class OutProj(Method):
    """out_proj fitted to the dense model's residual stream, to make up for what was lost here and before.

    Channels and layers always leave it something to make up for; states do where their repair does not fold into their
    C rows: in a Mamba-2, and where norms stand between.
    """

    name = "out_proj"
    leaves = ("out_proj",)
    place = 30
    follows_dense = True

    def asked_for(self, plan: Plan) -> bool:
        """With the repair."""
        parts = plan.config.parts
        if plan.fits_stream:
            return False
        whole = any(part in parts for part in (CHANNEL, HEAD, HEAD_DIM, LAYER))
        return plan.config.repair and (whole or (COLUMN in parts and not plan.mixes_c_rows))

    def shares_samples(self, plan: Plan) -> bool:
        """Second moments add up."""
        return True

    def prune(self, job: Job) -> None:
        """Every layer that stays."""
        from ssmc.compressor.methods.channels.out_proj import fit_out_proj

        job.note(fit_out_proj(job))

    def notes(self, outcome: Outcome) -> list[str]:
        """Whether there was enough text."""
        if outcome.calibration is None:
            return []
        tokens, channels = outcome.calibration.tokens.numel(), max(outcome.plan.keep.channels)
        if tokens >= FIT_TOKENS_PER_CHANNEL * channels:
            return []
        return [
            f"out_proj was fitted on {tokens} tokens of text, few for {channels} channels: it may know that text "
            "by heart and lose on any other. Give more with --nsamples or --seqlen, or use --no-repair."
        ]

    def tables(self, outcome: Outcome) -> list[Table]:
        """The errors with and without the fit."""
        rows = tuple(
            (str(index), error_text(record.error), error_text(record.error_unrepaired))
            for index, layer in enumerate(outcome.layers)
            if (record := layer.out_proj) is not None
        )
        legend = (
            "error: squared difference of what the layer adds to the dense model's residual stream, relative to it."
        )
        columns = ("layer", "error", "error before the fit")
        return [Table("out_proj, fitted to the dense model", columns, rows, legend)] if rows else []


_NORM = (
    "In the export the gated norm's weight makes up for its mean over fewer channels, in float32 even where the model "
    "is in half precision."
)

register_method(Channels())
register_method(Heads())
register_method(HeadDims())
register_method(OutProj())
