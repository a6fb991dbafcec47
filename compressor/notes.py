"""What a user should know about a run besides its result: one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from ssmc.compressor.calibration.draw import Calibration
from ssmc.compressor.counts import Kept, default_multiple
from ssmc.compressor.options.config import FFN, SSM, CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, SSM_MODULE
from ssmc.runtime.models.checkpoints import EMBEDDED
from ssmc.runtime.models.families import Architecture, Dimensions

FIT_TOKENS_PER_CHANNEL = 8
"""Calibration tokens below which a fit is worth a warning: half of the channels of `tiny` gone, its perplexity is 57
without and 835 with repair at one token a kept channel, 41 and 37 at four, 40 and 30 at eight."""

_OTHERS = (
    "The linear maps of attention and MLP were pruned in the same way. Experts of a mixture are one tensor for all of "
    "them, and routers decide between them: these stay dense."
)
_SHARED = "The transformer blocks that layers share, and the maps behind them, stay dense: a layer at a time is pruned."


def notes_for(
    config: CompressConfig,
    calibration: Calibration | None,
    sizes: Dimensions,
    counts: Kept,
    architecture: Architecture | None = None,
    spreads: Sequence[float] = (),
) -> list[str]:
    """Sentences about a run.

    Args:
        config: the run.
        calibration: what it was calibrated on, None if it looked at no text.
        sizes: of the dense model.
        counts: what stays.
        architecture: adapter of the model.
        spreads: how far the factor of these norms varies from token to token, layer by layer.
    """
    notes = []
    if calibration and calibration.shortfall:
        notes.append(calibration.shortfall)
    if calibration and config.fits_out_proj(sizes.heads is None):
        tokens, channels = calibration.tokens.numel(), max(counts.channels)
        if tokens < FIT_TOKENS_PER_CHANNEL * channels:
            notes.append(
                f"out_proj was fitted on {tokens} tokens of text, few for {channels} channels: it may know that text "
                "by heart and lose on any other. Give more with --nsamples or --seqlen, or use --no-repair."
            )
    if calibration and config.calib is None and config.model not in EMBEDDED:
        notes.append(
            "Calibrated on the embedded sample of simple stories. For a model of real text give text like what it "
            "will read: --calib wikitext2 or a file."
        )
    states = max(counts.states)
    if COLUMN in config.parts and states < sizes.d_state and states & (states - 1):
        notes.append(_padding(sizes.d_state, states))
    if architecture and architecture.capabilities.normed_readers and COLUMN in config.parts and SSM in config.targets:
        notes.append(_norms(sizes.d_state, states, spreads, config.repair))
    if CHANNEL in config.parts:
        notes.append(_width(config, sizes, counts))
    if len(set(counts.channels)) > 1 or len(set(counts.states)) > 1:
        notes.append(
            "Layers keep numbers of their own. Stock loaders have one for all, so `ssmc export` fills the narrower "
            "ones up with zeros to the widest: nothing is gained there. `--format onnx` takes each layer as it is."
        )
    if COLUMN not in config.parts and SSM in config.targets:
        notes.append(
            "Entries of A_log that are 0 stand for A = -1: the state still decays and costs the same, so this makes "
            "nothing smaller or faster. It is there to compare with; --pattern column removes states for real."
        )
    if config.pattern == SSM_MODULE:
        notes.append(
            "The SSM of the removed layers is silent but still computed: stock loaders have no layer without one, so "
            "this makes nothing smaller or faster. It is there to compare with."
        )
    if architecture and not architecture.capabilities.uniform and set(config.modules) == set(FFN):
        notes.append(_SHARED if architecture.capabilities.shared_blocks else _OTHERS)
    if config.modules and config.nm is None:
        notes.append(
            "Zeros spread over the projections make nothing smaller or faster by themselves: dense formats store them "
            "and dense products multiply by them."
        )
    if config.modules and config.nm:
        notes.append(
            f"The file stays as large: {config.nm} zeros are stored. GPUs with sparse tensor cores can use 2:4 "
            "(ssmc export --format sparse24); on a CPU nothing gets faster."
        )
    return notes


def _width(config: CompressConfig, sizes: Dimensions, counts: Kept) -> str:
    width = max(counts.channels)
    if sizes.heads is not None:
        return (
            f"{width // sizes.head_dim} of {sizes.heads} heads stay in each layer. In the export the gated norm's "
            "weight makes up for its mean over fewer channels, in float32 even where the model is in half precision."
        )
    if config.widths is not None:
        return f"At most {width} of {sizes.d_inner} channels stay, as --widths says."
    multiple = config.round_channels or default_multiple(sizes.d_inner)
    return (
        f"{width} of {sizes.d_inner} channels stay: the multiple of {multiple} nearest to sparsity "
        f"{config.sparsity_of(CHANNEL):g}. Hardware likes such widths; --round-channels takes another multiple."
    )


def _norms(dense_states: int, keep: int, spreads: Sequence[float], repaired: bool) -> str:
    """What the norms of B and C make of it."""
    note = "B and C pass norms over the states, which are others when states are gone. "
    if spreads:
        folded = "its mean is folded into the weights" if repaired else "nothing is folded without repair"
        note += (
            f"What is read out is off by a factor that varies by {sum(spreads) / len(spreads):.1%} from token to token "
            f"(standard deviation, mean of the layers; most in a layer: {max(spreads):.1%}); {folded}, the errors have "
            "the rest in them. "
        )
    note += "The export computes what the masked model does."
    if dense_states % keep or (dense_states // keep) & (dense_states // keep - 1):
        note += (
            f" The factor {dense_states}/{keep} this takes is not exact in half precision: if the model is stored so, "
            "the tensors that take it are stored in float32. --round-to power-of-two avoids it."
        )
    return note


def _padding(dense_states: int, keep: int) -> str:
    padded = 1 << keep.bit_length()
    gain = "gains nothing there" if padded >= dense_states else f"costs as much as {padded} there"
    return (
        f"{keep} states is not a power of two: the Triton decode kernels of mamba_ssm and vLLM pad it to {padded}, "
        f"so it {gain}; transformers, our CPU scan and mamba_ssm's prefill do gain. "
        "--round-to power-of-two avoids it."
    )
