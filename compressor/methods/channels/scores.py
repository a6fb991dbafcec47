"""The built-in scores of channels and heads, registered when this is imported."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ssmc.compressor.methods.channels.score import ChannelScore, ScoredChannels
from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.options.patterns import ATTENTION, CHANNEL, EXPERT_WIDTH, HEAD, HEAD_DIM, MLP

if TYPE_CHECKING:
    import torch


def _norms(layer: ScoredChannels) -> torch.Tensor:
    """||W[:, j]||^2 of every column of out_proj, (D,)."""
    return layer.weight.double().square().sum(0).cpu()


@register_score
class Obs(ChannelScore):
    """Structured Optimal Brain Surgeon: what out_proj loses after its other columns have made up for it."""

    name = "obs"
    help = "removes the channels that out_proj can do without best, once its other columns are refitted"

    def choose(self, layer: ScoredChannels, keep: int) -> list[int]:
        """By backward elimination, of channels or of heads."""
        if layer.heads is None:
            from ssmc.compressor.methods.channels.obs import eliminate_channels

            return eliminate_channels(layer.weight, layer.outputs, keep)
        from ssmc.compressor.methods.channels.heads import channels_of, eliminate_heads

        head_dim = layer.weight.shape[1] // layer.heads
        stay = eliminate_heads(layer.weight, layer.outputs, keep // head_dim, layer.heads, layer.groups)
        return channels_of(stay, head_dim)


@register_score
class Fisher(Obs):
    """`obs`, with the error of the residual stream in the metric of the predictions (see `fisher`)."""

    name = "fisher"
    help = (
        "as obs, with errors weighed by what they cost the predictions of the whole model; takes gradients of the "
        "dense model, and so more time and memory"
    )
    decides = (CHANNEL,)
    needs_root = True

    def choose(self, layer: ScoredChannels, keep: int) -> list[int]:
        """By backward elimination, of channels or of heads."""
        if layer.root is None:
            raise ValueError("this score looks at the whole model")
        root = layer.root.to(layer.weight.device)
        return super().choose(replace(layer, weight=root @ layer.weight.double()), keep)


@register_score
class Activation(ChannelScore):
    """E[y_j^2] ||W[:, j]||^2."""

    name = "activation"
    help = "removes the channels that add least to the output of out_proj"

    def importance(self, layer: ScoredChannels) -> torch.Tensor:
        """(D,)."""
        return _norms(layer) * layer.outputs.diagonal().cpu()


@register_score
class Minitron(ChannelScore):
    """Minitron (2407.14679) and Minitron-SSM (2504.11409): the norm over samples of the mean |y_j| over tokens.

    Of a head the norm over its channels. Of a mixer's heads y is what in_proj makes of them, as Minitron-SSM has it; of
    other units what the map that follows reads. With `--no-repair` it is what these papers start their training from.
    """

    name = "minitron"
    help = "removes what is least active, whatever is read from it"
    decides = (HEAD, HEAD_DIM, MLP, ATTENTION, EXPERT_WIDTH)
    needs_means = True

    def importance(self, layer: ScoredChannels) -> torch.Tensor:
        """(D,): squares, which add up over the channels of a head."""
        if layer.means is None:
            raise ValueError("this score needs the mean activations")
        return layer.means.square().cpu()


@register_score
class ColumnMagnitude(ChannelScore):
    """||W[:, j]||^2."""

    name = "magnitude"
    help = "goes by the size of the columns of out_proj and looks at no text"
    needs_text = False

    def importance(self, layer: ScoredChannels) -> torch.Tensor:
        """(D,)."""
        return _norms(layer)


@register_score
class RandomChannels(ChannelScore):
    """A draw that follows the seed and differs between layers."""

    name = "random"
    help = "draws what is removed, to compare with"
    needs_text = False

    def importance(self, layer: ScoredChannels) -> torch.Tensor:
        """(D,)."""
        return _draw(layer.weight.shape[1], layer.seed)

    def of_heads(self, layer: ScoredChannels, heads: int) -> torch.Tensor:
        """(H,)."""
        return _draw(heads, layer.seed)


def _draw(count: int, seed: int) -> torch.Tensor:
    import torch

    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
