"""What a score of channels, of heads and of other units is. Nothing here imports torch, see `methods.method`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssmc.compressor.options.patterns import ATTENTION, CHANNEL, EXPERT_WIDTH, HEAD, HEAD_DIM, MLP

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredChannels:
    """What a score may look at: out_proj of a layer, or another map that reads all units, and what it reads.

    Attributes:
        weight: (d_model, D).
        moment: (D, D) sum of y y' over the calibration tokens; None for scores that look at no text.
        seed: of this layer.
        heads: H, each of D / H neighbouring channels; None where channels go one by one.
        groups: of heads that share B and C, or keys and values; as many heads stay in each.
        means: (D,) norm over the samples of the mean |y| over their tokens, where the score looks at text; None where
            that was not collected.
        root: (d_model, d_model) what an error of the residual stream costs is the square of this times the error; None
            for scores that do not ask, see `fisher`.
    """

    weight: torch.Tensor
    moment: torch.Tensor | None = None
    seed: int = 0
    heads: int | None = None
    groups: int = 1
    means: torch.Tensor | None = None
    root: torch.Tensor | None = None

    @property
    def outputs(self) -> torch.Tensor:
        """The moment, where there must be one."""
        if self.moment is None:
            raise ValueError("this score looks at text")
        return self.moment


class ChannelScore:
    """How important channels are. Subclass it and decorate it with `register_score`.

    A score must have a name, a help text and `importance`.

    Attributes:
        name: as `--score` has it.
        help: what it goes by, a phrase.
        needs_text: whether it looks at `ScoredChannels.moment`.
        needs_root: whether it looks at `ScoredChannels.root`, which takes gradients of the dense model.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    decides: ClassVar[tuple[str, ...]] = (CHANNEL, HEAD, HEAD_DIM, MLP, ATTENTION, EXPERT_WIDTH)
    needs_text: ClassVar[bool] = True
    needs_means: ClassVar[bool] = False  # whether it asks for `ScoredChannels.means`
    needs_root: ClassVar[bool] = False

    def importance(self, layer: ScoredChannels) -> torch.Tensor:
        """Of every channel, (D,); what is least important is removed."""
        raise NotImplementedError

    def of_heads(self, layer: ScoredChannels, heads: int) -> torch.Tensor:
        """Of every head, (H,): the sum over its channels, unless the score has a rule of its own."""
        return self.importance(layer).unflatten(0, (heads, -1)).sum(1)

    def choose(self, layer: ScoredChannels, keep: int) -> list[int]:
        """The channels that stay, ascending, `keep` of them."""
        if layer.heads is None:
            # stable, so that equal importances are decided by position and not by the sorting routine
            return sorted(self.importance(layer).argsort(descending=True, stable=True)[:keep].tolist())
        from ssmc.compressor.methods.channels.heads import channels_of, highest_of_each_group

        head_dim = layer.weight.shape[1] // layer.heads
        importance = self.of_heads(layer, layer.heads)
        return channels_of(highest_of_each_group(importance, keep // head_dim, layer.groups), head_dim)
