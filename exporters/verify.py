"""The proof that a written export computes what the masked model computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssmc.runtime.errors import VerificationError
from ssmc.runtime.models.architectures.residual import with_epsilons_of_width
from ssmc.runtime.models.checkpoints import Checkpoint, load_checkpoint
from ssmc.runtime.models.families import Architecture
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan

BATCH, LENGTH = 2, 96
NOISE_MARGIN = 10  # how often the model's own rounding noise two equal models may differ
FLOOR = 1e-5  # of the largest logit: what float32 cannot promise to resolve even if no noise shows


@dataclass(frozen=True)
class Comparison:
    """Masked against shrunk logits."""

    max_difference: float
    tolerance: float
    scale: float  # largest logit
    tokens: int
    real_text: bool  # False: no tokenizer, so the tokens were drawn at random
    # what the epsilon of norms over fewer numbers moves a logit by, not in `max_difference`; None: there are none
    epsilon_difference: float | None = None


@dataclass(frozen=True)
class Way:
    """One way of running an export, and how far its logits are from the model's."""

    name: str  # "prefill"
    max_difference: float


def sample_tokens(stream: torch.Tensor | None, vocab_size: int) -> torch.Tensor:
    """(BATCH, LENGTH) token ids from the start of a text's stream, or random ones when there is none."""
    if stream is not None and len(stream) >= BATCH * LENGTH:
        return stream[: BATCH * LENGTH].view(BATCH, LENGTH)
    return torch.randint(vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def cut_epsilons(masked: Checkpoint, config: Any, tokens: torch.Tensor) -> float | None:
    """Give the masked model's norms the epsilon that cutting channels, states or directions of the stream out of them
    left, in effect, in the shrunk one.

    Args:
        masked: changed in place.
        config: of the shrunk model.
        tokens: (B, L) to measure on.

    Returns:
        How far a logit moves by it; None where there is no such norm.
    """
    if not has_other_epsilons(masked.architecture, masked.config, config):
        return None
    before = use_fast_scan(masked.model)(tokens).logits
    with_epsilons_of(masked.architecture, masked.model, config)
    return float((masked.model(tokens).logits - before).abs().max())


def has_other_epsilons(architecture: Architecture, masked: Any, config: Any) -> bool:
    """Whether norms of a masked model lost channels, states or directions of the stream on the way to a shrunk one.

    Args:
        architecture: of both.
        masked: configuration of the masked model.
        config: of the shrunk one.
    """
    left, whole, able = architecture.dimensions(config), architecture.dimensions(masked), architecture.capabilities
    gated = able.heads and left.d_inner != whole.d_inner
    return gated or (able.normed_readers and left.d_state != whole.d_state) or left.d_model != whole.d_model


def with_epsilons_of(architecture: Architecture, model: Any, config: Any) -> None:
    """Give all norms of a masked model, in place, the epsilons that they have, in effect, in a shrunk one."""
    left, whole = architecture.dimensions(config).d_model, architecture.dimensions(model.config).d_model
    if architecture.capabilities.heads or architecture.capabilities.normed_readers:
        architecture.with_epsilons_of(model, config)
    if left != whole:
        with_epsilons_of_width(architecture, model, left)


@torch.no_grad()
def expected(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits (B, L, V) that an export must give, and how far it may be off; see `compare`."""
    stock = use_stock_scan(model)(tokens).logits
    reference = use_fast_scan(model)(tokens).logits
    noise = float((stock - reference).abs().max())
    return reference, max(NOISE_MARGIN * noise, FLOOR * float(reference.abs().max()))


@torch.no_grad()
def compare(masked: Any, shrunk: Any, tokens: torch.Tensor, real_text: bool) -> Comparison:
    """Run both models on the same tokens.

    The tolerance comes from the masked model itself: how far its logits move when the same sums are taken in another
    order (our scan against transformers' own). Deep random models amplify rounding a hundredfold, trained ones do not.

    Args:
        masked: the model of the original shape, float32.
        shrunk: the smaller one, as read back from the files, float32.
        tokens: (B, L).
        real_text: whether the tokens are text.

    Raises:
        VerificationError: the logits differ by more than rounding.
    """
    reference, tolerance = expected(masked, tokens)
    result = use_fast_scan(shrunk)(tokens).logits
    scale = float(reference.abs().max())
    difference = float((result - reference).abs().max())
    if not difference <= tolerance:  # also when it is NaN
        raise VerificationError(
            f"The shrunk model's logits differ from the masked model's by {difference:.3g} (allowed {tolerance:.3g}), "
            "so nothing was written. This is a bug in ssmc; please report it with the manifest."
        )
    return Comparison(difference, tolerance, scale, tokens.numel(), real_text)


def compare_checkpoint(masked: Checkpoint, folder: Path, tokens: torch.Tensor, real_text: bool) -> Comparison:
    """Read a checkpoint back from its files and run it beside the masked model; arguments as for `compare`.

    Raises:
        VerificationError: the logits differ by more than rounding.
    """
    shrunk = load_checkpoint(folder, dtype=torch.float32, lazy=True)
    moved = cut_epsilons(masked, shrunk.config, tokens)
    return replace(compare(masked.model, shrunk.model, tokens, real_text), epsilon_difference=moved)
