"""Short distillations: what candidates of a search become when they are taught a little.

How much gradient steps regain depends on what was removed, so where steps follow, a search that looks only at what is
left at once may go for the wrong candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ssmc.compressor.distillation.narrowed import Left
from ssmc.compressor.distillation.steps import WINDOW, Course, Pair, teach
from ssmc.compressor.methods.method import LayerResult
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

STEPS = 8


@dataclass
class Teaching:
    """A teacher and its text.

    Attributes:
        architecture: adapter of both models.
        teacher: the dense model, with the fast scan in use, on the device.
        samples: (n, seqlen) text that no loss is measured on.
        seed: of the order of sequences: all candidates see the same.
    """

    architecture: Architecture
    teacher: nn.Module
    samples: torch.Tensor
    seed: int
    _remembered: dict[int, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, model: nn.Module, layers: Sequence[LayerResult], lost: float, progress: Progress = NO_PROGRESS
    ) -> None:
        """Take a few steps on a pruned model, in place; it ends on the teacher's device.

        Args:
            model: masked.
            layers: what happened to it.
            lost: nats a token above the dense model.
            progress: told about steps.
        """
        device = self.teacher.get_output_embeddings().weight.device
        pair = Pair(self.architecture, use_fast_scan(model).to(device), self.teacher)
        left = [Left(layer.states_kept, layer.channels_kept) for layer in layers]
        length = min(WINDOW, self.samples.shape[1])
        whole = self.samples[:, : self.samples.shape[1] // length * length]
        teach(pair, whole.reshape(-1, length), Course(STEPS, self.seed, left, lost), progress, self._remembered)
