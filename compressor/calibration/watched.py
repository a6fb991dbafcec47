"""What modules inside a block read while the block runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, put, samples, settle
from ssmc.runtime.models.architectures.units import find_module
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Architecture


def watched(
    architecture: Architecture, block: nn.Module, hidden: torch.Tensor, names: Iterable[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Run a block and see what modules in it read.

    Args:
        architecture: of the model.
        block: that runs.
        hidden: (1, L, d_model) what it reads.
        names: of modules within it.

    Returns:
        What the block puts out, and by name what the modules read, (1, L, in).
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = inputs[0].detach()

        return hook

    hooks = []
    for name in names:
        module = find_module(block, name)
        if module is None:
            raise ValueError(f"there is no {name} in this block")
        hooks.append(module.register_forward_pre_hook(keep(name)))
    try:
        output = architecture.run(block, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    return output, found


def stages_of(
    architecture: Architecture,
    block: nn.Module,
    stream: torch.Tensor,
    progress: Progress = NO_PROGRESS,
    label: str = "outputs",
) -> list[torch.Tensor]:
    """Replace a stream by what a block makes of it, and keep what it was between the stages of the block.

    Args:
        architecture: of the model.
        block: that runs.
        stream: (nsamples, L, d_model), changed in place.
        progress: told about the samples.
        label: what to call them.

    Returns:
        The stream behind each stage, (nsamples, L, d_model) each; the last is `stream` itself.
    """
    device, middle = device_of(block), architecture.middle
    middle = middle if middle and find_module(block, middle) is not None else ""
    between = torch.empty_like(stream) if middle else None
    for i, sample in samples(stream, device):
        progress(label, i, len(stream))
        output, read = watched(architecture, block, sample, [middle] if middle else [])
        if between is not None:
            put(between, i, read[middle])
        put(stream, i, output)
    settle(stream, device)
    progress(label, len(stream), len(stream))
    return [stream] if between is None else [between, stream]
