"""Mamba-3 mixers (arXiv 2603.15569) wherever they sit: known by their parameters, computed by their structure, cut.

Those of mamba_ssm and of the package mamba3-ssm name their parameters alike and compute differently; `RULES` has both.
in_proj makes [z, x, B, C, dt, A, trap, angles]. B and C pass an RMSNorm over the N states and get a bias for each head,
then pairs of states are turned by angles that add up over time, as rotary positions are:

    h_t = a_t h_{t-1} + now_t x_t B_t' + before_t x_{t-1} B_{t-1}'        h (P, N) of every head
    y_t = h_t C_t + D x_t                                                 out = out_proj(y * silu(z))

In a model of several ranks (MIMO) B, C and what x is multiplied by have one more axis R. What is read out is a sum over
states, so that states can go, but those of a pair together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.models.architectures.alone import STATE_NAMES
from ssmc.runtime.models.mixers import Undo, taken_back_on_failure, tell, tell_sizes, tell_tensors

FAMILY = "mamba3"
PARTS = ("in_proj", "out_proj", "B_norm", "C_norm", "B_bias", "C_bias", "dt_bias", "D")
"""Parameters, or modules with a weight, that such a mixer has; and no A_log, as A comes from the data."""

_ANGLES, _ROTATED, _GROUPS = "num_rope_angles", "split_tensor_size", "num_bc_heads"  # attributes
EPS, FLOOR = 1e-5, 1e-4  # of the norms, and of the rate A, where a mixer does not say


@dataclass(frozen=True)
class Sizes:
    """Sizes of a mixer.

    Attributes:
        d_inner: channels.
        heads: H, of P = d_inner / H channels.
        states: N.
        rank: R; 1 where there are no ranks.
        groups: of heads that share B and C.
        angles: pairs of states that turn; the other states stand still.
    """

    d_inner: int
    heads: int
    states: int
    rank: int
    groups: int
    angles: int

    @property
    def head_dim(self) -> int:
        """P."""
        return self.d_inner // self.heads

    @property
    def splits(self) -> list[int]:
        """Rows of in_proj: z, x, B, C, dt, A, trap, angles."""
        shared = self.states * self.groups * self.rank
        return [self.d_inner, self.d_inner, shared, shared, *[self.heads] * 3, self.angles]


@dataclass(frozen=True)
class Rules:
    """What implementations do differently.

    Attributes:
        name: of the implementation.
        rate: A from its row of in_proj and the mixer's floor.
        turn: angles of a unit of time from their rows of in_proj.
        blends: whether the trapezoid blends inputs, not what they become a step later.
        apart: whether a pair is (i, i + N / 2); else neighbours.
        whole_rank: whether ranks keep x apart; else their sum is one number a head.
    """

    name: str
    rate: Callable[[torch.Tensor, float], torch.Tensor]
    turn: Callable[[torch.Tensor], torch.Tensor]
    blends: bool = False
    apart: bool = False
    whole_rank: bool = True

    def pairs(self, sizes: Sizes) -> list[tuple[int, int]]:
        """The states that turn together."""
        if self.apart:
            return [(i, i + sizes.states // 2) for i in range(sizes.angles)]
        return [(2 * i, 2 * i + 1) for i in range(sizes.angles)]

    def in_order(self, units: Sequence[Sequence[int]]) -> list[int]:
        """The states of pairs and of single states in an order in which pairs lie where a mixer looks for them.

        Single states may lie anywhere.
        """
        pairs, single = [u for u in units if len(u) == 2], [u[0] for u in units if len(u) == 1]
        if not self.apart:
            return sorted(state for unit in units for state in unit)
        half = (sum(map(len, units)) + 1) // 2 - len(pairs)  # single ones between the first of pairs and the second
        return [*(a for a, _ in pairs), *single[:half], *(b for _, b in pairs), *single[half:]]

    def weights(self, trap: torch.Tensor, dt: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the input of this step and of the one before are multiplied by."""
        gate = torch.sigmoid(trap)
        return (dt * (1 - gate / 2), dt * gate / 2) if self.blends else (dt * gate, dt * (1 - gate) * decay)


def _heavy_tailed(raw: torch.Tensor, floor: float) -> torch.Tensor:
    return -(raw.clamp_min(0) + torch.reciprocal(1 - raw.clamp_max(0))).clamp_min(floor)


def _clamped(raw: torch.Tensor, floor: float) -> torch.Tensor:
    """As release 0.2.1 has it: what should be a floor of the rate is a ceiling, so that A is the floor itself."""
    return -F.softplus(raw).clamp(max=-floor)


def _half_turns(raw: torch.Tensor) -> torch.Tensor:
    return torch.tanh(raw) * math.pi


RULES = (
    Rules("mamba_ssm", _heavy_tailed, _half_turns),
    Rules("mamba_ssm", _heavy_tailed, _half_turns, apart=True),
    Rules("mamba3-ssm", _clamped, lambda raw: raw, blends=True, whole_rank=False),
)


@dataclass(frozen=True)
class Mamba3Mixer:
    """A Mamba-3 mixer inside some module."""

    name: str
    module: nn.Module
    sizes: Sizes


def find_mamba3(module: nn.Module) -> list[Mamba3Mixer]:
    """All Mamba-3 mixers in a module, in the order they are registered."""
    found = []
    for name, candidate in module.named_modules():
        sizes = read_sizes(candidate)
        if sizes is not None:
            found.append(Mamba3Mixer(name, candidate, sizes))
    return found


def read_sizes(mixer: nn.Module) -> Sizes | None:
    """The sizes of a mixer from its shapes; None where they do not belong together, or it is no Mamba-3."""
    if hasattr(mixer, "A_log") or not all(hasattr(mixer, part) for part in (*PARTS, _ANGLES)):
        return None
    if mixer.B_bias.dim() != 3 or mixer.B_bias.shape != mixer.C_bias.shape or hasattr(mixer, "conv1d"):
        return None
    if getattr(mixer.in_proj, "bias", None) is not None:
        return None
    heads, rank, states = mixer.B_bias.shape
    d_inner, groups, angles = mixer.out_proj.weight.shape[1], getattr(mixer, _GROUPS, 1), getattr(mixer, _ANGLES)
    sizes = Sizes(d_inner, heads, states, rank, groups, angles)
    fits = sum(sizes.splits) == len(mixer.in_proj.weight) and not d_inner % heads and len(mixer.D) == heads
    return sizes if fits and mixer.B_norm.weight.shape == mixer.C_norm.weight.shape == (states,) else None


@dataclass(frozen=True)
class Step:
    """What happens at one time step of a batch.

    Attributes:
        read: (B, H, P, N) what every state adds to the gated output.
        skip: (B, H, P) what D adds to it.
        states: (B, H, P, N), or (B, H, 1, N) where ranks are summed.
        C: (B, R, H, N), turned.
    """

    read: torch.Tensor
    skip: torch.Tensor
    states: torch.Tensor
    C: torch.Tensor


def raw_readers(mixer: nn.Module, sizes: Sizes, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """B and C before their norms, (B, L, R, G, N) each, where a mixer reads hidden (B, L, d_model)."""
    parts = mixer.in_proj(hidden.to(mixer.in_proj.weight.dtype)).float().split(sizes.splits, -1)
    shape = (sizes.rank, sizes.groups, sizes.states)
    return parts[2].unflatten(-1, shape), parts[3].unflatten(-1, shape)


def steps(mixer: nn.Module, sizes: Sizes, rules: Rules, hidden: torch.Tensor) -> Iterator[Step]:
    """A mixer on hidden (B, L, d_model), step by step, in float32."""
    parts = mixer.in_proj(hidden.to(mixer.in_proj.weight.dtype)).float().split(sizes.splits, -1)
    z, x = (part.unflatten(-1, (sizes.heads, -1)) for part in parts[:2])  # (B, L, H, P)
    dt = F.softplus(parts[4] + mixer.dt_bias.float())  # (B, L, H)
    decay = torch.exp(rules.rate(parts[5], getattr(mixer, "A_floor", FLOOR)) * dt)
    now, before = rules.weights(parts[6], dt, decay)
    angles = torch.cumsum(rules.turn(parts[7])[:, :, None] * dt[..., None], 1)  # (B, L, H, S)
    B, C = (
        _turned(_biased(raw, norm, bias, sizes), angles, rules.pairs(sizes))
        for raw, norm, bias in zip(
            raw_readers(mixer, sizes, hidden), (mixer.B_norm, mixer.C_norm), (mixer.B_bias, mixer.C_bias), strict=True
        )
    )  # (B, L, R, H, N)
    inward, read = _drive(mixer, rules, x), _reader(mixer, rules)
    state = last = torch.zeros(())
    for t in range(hidden.shape[1]):
        drive = torch.einsum("brhp,brhn->bhpn", inward[:, t], B[:, t])
        state = decay[:, t, :, None, None] * state + now[:, t, :, None, None] * drive
        state = state + before[:, t, :, None, None] * last
        last = drive
        yield read(C[:, t], state, inward[:, t], z[:, t])


def put_out(mixer: nn.Module, sizes: Sizes, rules: Rules, hidden: torch.Tensor) -> torch.Tensor:
    """What a mixer puts out for hidden (B, L, d_model) by its structure."""
    y = [(step.read.sum(-1) + step.skip).flatten(1) for step in steps(mixer, sizes, rules, hidden)]
    return mixer.out_proj(torch.stack(y, 1).to(mixer.out_proj.weight.dtype))


def _biased(raw: torch.Tensor, norm: nn.Module, bias: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """B or C of every head, (B, L, R, H, N), from what in_proj makes of them."""
    scale = (raw.square().mean(-1, keepdim=True) + getattr(norm, "eps", EPS)).rsqrt()
    normed = raw * scale * norm.weight.float()
    return normed.repeat_interleave(sizes.heads // sizes.groups, 3) + bias.float().transpose(0, 1)


def _turned(v: torch.Tensor, angles: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Pairs of states (..., N) turned by (B, L, H, pairs)."""
    first, second = (torch.tensor(side, device=v.device) for side in zip(*pairs, strict=True))
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    out, a, b = v.clone(), v[..., first], v[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def _drive(mixer: nn.Module, rules: Rules, x: torch.Tensor) -> torch.Tensor:
    """What B is multiplied by, (B, L, R, H, P), or (B, L, R, H, 1) where ranks are summed."""
    if not hasattr(mixer, "mimo_x"):
        return x[:, :, None]
    ranks = x[:, :, None] * mixer.mimo_x.float().transpose(0, 1)  # (B, L, R, H, P)
    return ranks if rules.whole_rank else ranks.sum(-1, keepdim=True)


def _reader(mixer: nn.Module, rules: Rules) -> Callable[..., Step]:
    """How a step is read out of C (B, R, H, N), states (B, H, P, N), inputs (B, R, H, P) and z (B, H, P)."""
    D = mixer.D.float()[:, None]
    outward = mixer.mimo_o.float().transpose(0, 1) if hasattr(mixer, "mimo_o") else None  # (R, H, P)
    gates = mixer.mimo_z.float().transpose(0, 1) if hasattr(mixer, "mimo_z") else None

    def read(C: torch.Tensor, state: torch.Tensor, inward: torch.Tensor, z: torch.Tensor) -> Step:
        if outward is None:
            gate = F.silu(z)[:, None]  # (B, 1, H, P)
        else:
            gate = outward * (F.silu(z)[:, None] if gates is None else F.silu(z[:, None] * gates))  # (B, R, H, P)
        return Step(torch.einsum("brhp,brhn->bhpn", gate, C) * state, (gate * D * inward).sum(1), state, C)

    return read


@torch.no_grad()
def cut_states(mixer: Mamba3Mixer, rules: Rules, kept: Sequence[int]) -> Undo:
    """Cut all states but some out of a mixer, in place, and tell it its sizes.

    The norms of B and C take their means over what stays then.

    Args:
        mixer: as `find_mamba3` found it.
        rules: what it computes.
        kept: the states that stay, whole pairs, in the order of `Rules.in_order`.

    Raises:
        AttributeError, TypeError: the mixer does not let a size be set; it is as it was.
    """
    own, sizes = mixer.module, mixer.sizes
    number_of = {pair[0]: i for i, pair in enumerate(rules.pairs(sizes))}
    turning = [number_of[state] for state in kept if state in number_of]
    device = own.in_proj.weight.device
    index = torch.as_tensor(list(kept), device=device)
    rows, start = [], 0
    for number, size in enumerate(sizes.splits):
        block = torch.arange(start, start + size, device=device)
        if number in (2, 3):
            block = block.unflatten(0, (-1, sizes.states))[:, index].flatten()
        rows.append(block[turning] if number == 7 else block)
        start += size
    smaller = {"in_proj.weight": own.in_proj.weight.detach()[torch.cat(rows)]}
    smaller |= {f"{norm}.weight": getattr(own, norm).weight.detach()[index] for norm in ("B_norm", "C_norm")}
    smaller |= {bias: getattr(own, bias).detach()[..., index] for bias in ("B_bias", "C_bias")}
    with taken_back_on_failure() as was:
        cuts = tell_tensors(was, own, smaller)
        tell_sizes(was, own, sizes.states, len(kept), STATE_NAMES)
        for attribute, size in ((_ANGLES, len(turning)), (_ROTATED, 2 * len(turning))):
            if getattr(own, attribute, size) != size:
                tell(was, own, attribute, size)
    return Undo(cuts, tuple(was))
