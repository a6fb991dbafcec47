"""A task that small models of stories can do: which of four passages continues a story.

Tasks such as PIQA or LAMBADA say nothing of models of some million parameters trained on stories: dense, they guess.
As in those, the answer with the largest likelihood counts (HellaSwag, arXiv 1905.07830, has the same form); wrong
answers are continuations of other stories, so one that keeps to what was told, names above all, is the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ssmc.runtime.measure.losses import IGNORED, token_losses

CONTEXT, ANSWER, ANSWERS = 96, 12, 4  # tokens, tokens, passages to choose from
QUESTIONS = 180  # at most, in the bench of methods


@dataclass(frozen=True)
class Continuations:
    """Questions, made once for a tokenizer.

    Attributes:
        inputs: (Q, ANSWERS, CONTEXT + ANSWER) token ids; the first answer is the right one.
    """

    inputs: torch.Tensor

    @classmethod
    def of(cls, stories: Sequence[torch.Tensor]) -> Continuations:
        """Questions from stories.

        Args:
            stories: token ids, (L,) each. Passages of CONTEXT + ANSWER tokens follow one another; a passage's wrong
                answers end passages that stand a third, a half and two thirds of all further on.
        """
        size = CONTEXT + ANSWER
        passages = torch.cat([story[: len(story) // size * size].view(-1, size) for story in stories])
        answers = passages[:, CONTEXT:]
        others = [answers.roll(-(len(answers) * part // 6), 0) for part in (0, 2, 3, 4)]
        context = passages[:, None, :CONTEXT].expand(-1, ANSWERS, -1)
        return cls(torch.cat([context, torch.stack(others, 1)], -1))

    def thinned(self, most: int) -> Continuations:
        """At most so many of the questions, evenly from all stories."""
        return Continuations(self.inputs[:: -(-len(self.inputs) // most)])

    def right(self, model: torch.nn.Module) -> torch.Tensor:
        """(Q,) bool: where the right answer is the likeliest under the model."""
        targets = torch.full_like(self.inputs, IGNORED)
        targets[:, :, CONTEXT - 1 : -1] = self.inputs[:, :, CONTEXT:]
        losses = [token_losses(model, *pair)[0].sum(-1) for pair in zip(self.inputs, targets, strict=True)]
        return torch.stack(losses).argmin(-1) == 0
