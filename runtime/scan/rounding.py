"""The SSM state in fewer bits: int8 codes with a scale for each state of a head, or float16, rounded after every call.

A scale is shared by the channels of a head (of a Mamba-1, by a block of neighbouring channels) and belongs to one of
the N states: states differ in size by orders of magnitude, channels of a head do not. It is the largest value over 127,
so nothing is clipped, and follows the state from token to token.

What is rounded is rounded again after the next token, and a state that decays slowly changes by less than half a code
between two tokens: rounded to the nearest code it would never decay, and what a token adds would be lost. So codes are
rounded up or down with the odds of their distance, which is right on average (stochastic rounding, Gupta et al. 2015).
The random number is made of the low digits of the value itself: the same input gives the same bytes. It differs from
token to token because decay and drive do; a state that nothing drives and that always decays alike could stand still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ssmc.runtime.errors import UsageError
from ssmc.runtime.later import torch

STATE_DTYPES = ("float32", "float16", "int8")
LEVELS = 127.0
DITHER = 613.7  # low digits of a code, as a number in [0, 1): the fraction of so many times it
_MOST = 65504.0  # of float16


@dataclass(frozen=True)
class StateFormat:
    """How a state is kept between calls.

    Attributes:
        dtype: "float16" or "int8".
        per: who shares a scale of int8: "state": a state of a head; "channel": the N states of a channel; "head".
        dithered: round codes up or down by chance; otherwise to the nearest.
    """

    dtype: Literal["float16", "int8"] = "int8"
    per: Literal["state", "channel", "head"] = "state"
    dithered: bool = True

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of (B, heads, channels, N) that a scale spans."""
        return {"state": (2,), "channel": (3,), "head": (2, 3)}[self.per]


def state_format(dtype: str) -> StateFormat | None:
    """The format of that name; None for float32, in which states are computed.

    Raises:
        UsageError: there is none.
    """
    if dtype not in STATE_DTYPES:
        raise UsageError(f"There is no state dtype {dtype!r}: choose one of {', '.join(STATE_DTYPES)}.")
    if dtype == "float32":
        return None
    return StateFormat("int8") if dtype == "int8" else StateFormat("float16")


def channel_block(d_inner: int, most: int = 32) -> int:
    """How many neighbouring channels of a Mamba-1 share a scale: the largest divisor of D up to 32."""
    return next(size for size in range(min(most, d_inner), 0, -1) if d_inner % size == 0)


def by_heads(state: torch.Tensor) -> torch.Tensor:
    """A state (B, D, N) as (B, blocks, channels, N); (B, H, P, N) of a Mamba-2 as it is."""
    return state if state.dim() == 4 else state.unflatten(1, (-1, channel_block(state.shape[1])))


def pack(state: torch.Tensor, form: StateFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round a state.

    Args:
        state: (B, D, N) or (B, H, P, N) float32.
        form: how it is kept.

    Returns:
        Codes of the same shape, float16 or int8, and for int8 the scales (B, heads, channels or 1, N or 1) float16.
    """
    if form.dtype == "float16":
        return state.clamp(-_MOST, _MOST).half(), None
    whole = by_heads(state.float())
    scales = scales_of(whole.abs().amax(form.axes, keepdim=True))
    return codes_of(whole, scales.float(), form.dithered).to(torch.int8).view(state.shape), scales


def scales_of(largest: torch.Tensor) -> torch.Tensor:
    """Scales, float16, by which the largest values are 127."""
    return (largest * (1 / LEVELS)).clamp(max=_MOST).half()


def codes_of(state: torch.Tensor, scales: torch.Tensor, dithered: bool) -> torch.Tensor:
    """Codes as whole float32 numbers; 0 where the scale is 0."""
    x = torch.where(scales > 0, state / scales, 0.0)
    rounded = (x + (x * DITHER - (x * DITHER).floor())).floor() if dithered else x.round()
    return rounded.clamp(-LEVELS, LEVELS)


def unpack(codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The state, float32, of what `pack` returns."""
    if scales is None:
        return codes.float()
    return (by_heads(codes).float() * scales.float()).view(codes.shape)
