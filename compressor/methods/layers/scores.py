"""The built-in scores of layers, registered when this is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ssmc.compressor.methods.layers.score import LayerScore, Removal
from ssmc.compressor.methods.method import Survey
from ssmc.compressor.methods.registry import register_score
from ssmc.compressor.options.patterns import LAYER

if TYPE_CHECKING:
    from torch import nn


@register_score
class MambaShedder(LayerScore):
    """Mamba-Shedder (NAACL 2025): the removal that leaves the lowest perplexity, one after the other."""

    name = "mamba-shedder"
    help = "removes one layer after the other, each time the one without which the perplexity is lowest"

    def choose(self, survey: Survey, count: int, remove: Callable[[nn.Module], None]) -> list[Removal]:
        """In the order of the search."""
        from ssmc.compressor.methods.layers.choose import least_loss_removals

        return least_loss_removals(survey, count, remove)


@register_score
class Similarity(LayerScore):
    """Block Influence (ShortGPT, 2024)."""

    name = "similarity"
    help = "removes the layers that change least what they read"
    decides = (LAYER,)

    def choose(self, survey: Survey, count: int, remove: Callable[[nn.Module], None]) -> list[Removal]:
        """The least influence first."""
        from ssmc.compressor.methods.layers.choose import block_influences, first_removable

        influences = block_influences(survey)
        order = sorted(range(len(influences)), key=lambda layer: (influences[layer], layer))
        return [Removal(layer, influence=influences[layer]) for layer in first_removable(survey, order, count)]


@register_score
class RandomLayers(LayerScore):
    """A draw that follows the seed."""

    name = "random"
    help = "draws what is removed, to compare with"
    needs_text = False

    def choose(self, survey: Survey, count: int, remove: Callable[[nn.Module], None]) -> list[Removal]:
        """In the order of the draw."""
        import torch

        from ssmc.compressor.methods.layers.choose import first_removable

        layers = len(survey.plan.architecture.blocks(survey.model))
        generator = torch.Generator().manual_seed(survey.plan.config.seed)
        order = torch.randperm(layers, generator=generator).tolist()
        return [Removal(layer) for layer in first_removable(survey, order, count)]
