"""Mixers that scan in several directions: those of Vision Mamba and of VMamba, known by their parameters.

Every direction is a Mamba-1 scan of one input in another order; what they put out is added up in that of the input.

- **Vim**: one in_proj and out_proj; the second direction reads the sequence from its end. Its parameters have `_b` in
  their names: `A_b_log`, `conv1d_b`, `x_proj_b`, `dt_proj_b`, `D_b`. Where the directions are tied, the second has
  `A_b_log` alone, and scans what the convolution of the first put out.
- **SS2D** of VMamba reads (B, H, W, d_model). Behind a depthwise convolution are four directions, by rows and by
  columns, each from both ends, with their parameters stacked: `x_proj_weight` (4, R + 2 N, D), `dt_projs_weight`
  (4, D, R), `dt_projs_bias` (4, D), `A_logs` (4 D, N), `Ds` (4 D). A norm stands behind the sum, then the gate.

Directions with one x_proj are a `Reader`: they lose states together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.models.architectures.alone import STATE_NAMES, Alone
from ssmc.runtime.models.architectures.convolution import Window
from ssmc.runtime.models.families.mamba import MambaFamily
from ssmc.runtime.models.mixers import Undo, taken_back_on_failure, tell_sizes, tell_tensors
from ssmc.runtime.scan import ScanInputs, selective_scan
from ssmc.runtime.scan.inputs import decay_rates

VIM, SS2D = "vim", "ss2d"
_OF_VIM = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "A_b_log", "out_proj")
_SECOND = ("conv1d_b", "x_proj_b", "dt_proj_b", "D_b")  # of a Vim whose directions are not tied
_OF_SS2D = ("in_proj", "conv2d", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds", "out_norm")
_HALVES = ("if_divide_out", "if_devide_out")  # attributes of a Vim that takes the mean of its directions

Order = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reader:
    """Directions that read the same x_proj.

    Attributes:
        view: a module with `x_proj`, `dt_proj`, `D`, `A_log` and `rates`, one A_log for each direction; its parameters
            are those of the mixer, or lie in them.
        orders: of each direction: what it makes of (B, L, D) in the order of the input.
        back: the opposite of each.
        taps: the convolution of these directions, where they have one of their own.
    """

    view: nn.Module
    orders: tuple[Order, ...]
    back: tuple[Order, ...]
    taps: nn.Module | None = None


@dataclass(frozen=True)
class DirectionalMixer:
    """A mixer of several directions inside some module."""

    name: str
    module: nn.Module
    kind: str  # VIM or SS2D
    d_model: int
    d_inner: int
    states: int  # N
    rank: int  # R

    @property
    def axes(self) -> int:
        """Of what it is called with."""
        return 4 if self.kind == SS2D else 3

    @property
    def sizes(self) -> Any:
        """As a configuration of transformers names them."""
        from types import SimpleNamespace

        return SimpleNamespace(
            num_hidden_layers=1,
            hidden_size=self.d_model,
            intermediate_size=self.d_inner,
            state_size=self.states,
            time_step_rank=self.rank,
            conv_kernel=1,
            vocab_size=0,
        )


def find_directional(module: nn.Module) -> list[DirectionalMixer]:
    """All mixers of several directions in a module, in the order they are registered."""
    found = []
    for name, candidate in module.named_modules():
        mixer = _read_vim(name, candidate) or _read_ss2d(name, candidate)
        if mixer is not None:
            found.append(mixer)
    return found


def _read_vim(name: str, own: nn.Module) -> DirectionalMixer | None:
    if not all(hasattr(own, part) for part in _OF_VIM) or own.A_log.shape != own.A_b_log.shape or own.A_log.dim() != 2:
        return None
    second = [hasattr(own, part) for part in _SECOND]
    (d_inner, states), rank = own.A_log.shape, own.dt_proj.weight.shape[1]
    fits = own.x_proj.weight.shape == (rank + 2 * states, d_inner) and own.dt_proj.bias is not None
    if any(second) != all(second) or not fits or own.x_proj.bias is not None:
        return None
    return DirectionalMixer(name, own, VIM, own.in_proj.weight.shape[1], d_inner, states, rank)


def _read_ss2d(name: str, own: nn.Module) -> DirectionalMixer | None:
    if not all(hasattr(own, part) for part in _OF_SS2D):
        return None
    directions, rows, d_inner = own.x_proj_weight.shape
    rank, states = own.dt_projs_weight.shape[-1], own.A_logs.shape[-1]
    fits = directions == 4 and rows == rank + 2 * states and own.A_logs.shape[0] == 4 * d_inner == len(own.Ds)
    if not fits or len(own.in_proj.weight) != 2 * d_inner:
        return None
    return DirectionalMixer(name, own, SS2D, own.in_proj.weight.shape[1], d_inner, states, rank)


def readers(mixer: DirectionalMixer, shape: Sequence[int]) -> list[Reader]:
    """The readers of a mixer that is called with something of this shape."""
    own = mixer.module
    if mixer.kind == VIM:
        if not hasattr(own, "x_proj_b"):
            view = _view(mixer, own.x_proj, own.dt_proj, own.D, [own.A_log, own.A_b_log])
            return [Reader(view, (_same, _flipped), (_same, _flipped), own.conv1d)]
        first = _view(mixer, own.x_proj, own.dt_proj, own.D, [own.A_log])
        second = _view(mixer, own.x_proj_b, own.dt_proj_b, own.D_b, [own.A_b_log])
        return [
            Reader(first, (_same,), (_same,), own.conv1d),
            Reader(second, (_flipped,), (_flipped,), own.conv1d_b),
        ]
    found, width = [], mixer.d_inner
    turned, back = _columns(shape[1], shape[2]), _columns(shape[2], shape[1])
    ways = ((_same, _same), (turned, back), (_flipped, _flipped), (_then(turned, _flipped), _then(_flipped, back)))
    for k, (order, again) in enumerate(ways):
        stack = slice(k * width, (k + 1) * width)
        x_proj, dt_proj = _linear(own.x_proj_weight[k]), _linear(own.dt_projs_weight[k], own.dt_projs_bias[k])
        view = _view(mixer, x_proj, dt_proj, _part(own.Ds[stack]), [_part(own.A_logs[stack])])
        found.append(Reader(view, (order,), (again,)))
    return found


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _flipped(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


def _columns(rows: int, columns: int) -> Order:
    """From an order by rows to one by columns."""
    return lambda x: x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)


def _then(first: Order, second: Order) -> Order:
    return lambda x: second(first(x))


def _part(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter that lies in another one."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = _part(weight)
    if bias is not None:
        linear.bias = _part(bias)
    return linear


def _view(
    mixer: DirectionalMixer, x_proj: nn.Module, dt_proj: nn.Module, D: nn.Parameter, rates: Sequence[nn.Parameter]
) -> nn.Module:
    view = nn.Module()
    view.x_proj, view.dt_proj, view.D, view.A_log, view.rates = x_proj, dt_proj, D, rates[0], tuple(rates)
    view.ssm_state_size, view.time_step_rank, view.intermediate_size = mixer.states, mixer.rank, mixer.d_inner
    view.conv_kernel_size = 1  # the convolution is done already
    return view


class Direction(Alone, MambaFamily):
    """A Mamba-1 that reads, in the order of a direction, what its convolution put out: (B, L, 2 D + 1).

    The last column says which of the directions of a reader it is; before it are u and the gate z.
    """

    def normed(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What is read, in the type of what reads it."""
        weight: Any = self.mixer(block).x_proj.weight
        return hidden.to(weight.dtype)

    def expand(self, mixer: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u with the number of the direction behind it, and z."""
        width = mixer.intermediate_size
        return torch.cat([hidden[..., :width], hidden[..., 2 * width :]], -1), hidden[..., width : 2 * width]

    def convolve(
        self, mixer: nn.Module, x: torch.Tensor, history: torch.Tensor | Window | None = None, fused: bool = False
    ) -> torch.Tensor:
        """u alone: it is convolved already."""
        return x[..., :-1]

    def scan_inputs(
        self,
        mixer: nn.Module,
        x: torch.Tensor,
        z: torch.Tensor,
        history: torch.Tensor | Window | None = None,
        attention_mask: torch.Tensor | None = None,
        fused: bool = False,
    ) -> ScanInputs:
        """Everything between the convolution and the scan, with the decay rates of this direction."""
        inputs = super().scan_inputs(mixer, x, z, history, attention_mask, fused)
        return replace(inputs, A=decay_rates(mixer.rates[int(x[0, 0, -1])], fused))


DIRECTION: Any = Direction()  # an Architecture: `Alone` gives what a family has besides


def read_by(mixer: DirectionalMixer, reader: Reader, hidden: torch.Tensor) -> list[torch.Tensor]:
    """What each direction of a reader reads where the mixer reads hidden: (B, L, 2 D + 1), as `Direction` has it."""
    own, found = mixer.module, []
    x, z = own.in_proj(hidden.to(own.in_proj.weight.dtype)).chunk(2, dim=-1)
    if mixer.kind == SS2D:
        x = F.silu(own.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
        z = z.flatten(1, 2)
    elif len(reader.orders) > 1:  # tied
        x = _convolved(reader, x)
    for number, order in enumerate(reader.orders):
        own_taps = mixer.kind == VIM and len(reader.orders) == 1
        u = _convolved(reader, order(x)) if own_taps else order(x)
        which = torch.full_like(u[..., :1], number)
        found.append(torch.cat([u, order(z), which], -1))
    return found


def _convolved(reader: Reader, x: torch.Tensor) -> torch.Tensor:
    """The causal convolution of x (B, L, D), activated."""
    taps = reader.taps
    assert taps is not None
    padded = F.pad(x.transpose(1, 2), (taps.weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, taps.weight, taps.bias, groups=taps.weight.shape[0])).transpose(1, 2)


def put_out(mixer: DirectionalMixer, hidden: torch.Tensor) -> torch.Tensor:
    """What a mixer puts out for hidden, (B, L, d_model) or (B, H, W, d_model), by its structure."""
    own, total = mixer.module, torch.zeros(())
    for reader in readers(mixer, hidden.shape):
        for piece, again in zip(read_by(mixer, reader, hidden), reader.back, strict=True):
            inputs = DIRECTION.scan_inputs(reader.view, *DIRECTION.expand(reader.view, piece))
            inputs = replace(inputs, z=None) if mixer.kind == SS2D else inputs
            total = total + again(selective_scan(inputs)[0])
    if mixer.kind == SS2D:
        z = own.in_proj(hidden).chunk(2, dim=-1)[1]
        total = own.out_norm(total.unflatten(1, hidden.shape[1:3])) * F.silu(z)
    elif any(getattr(own, name, False) for name in _HALVES):
        total = total / 2
    return own.out_proj(total.to(own.out_proj.weight.dtype))


@torch.no_grad()
def cut_directions(mixer: DirectionalMixer, kept: Sequence[Sequence[int]]) -> Undo:
    """Cut all states but some out of a mixer, in place, and tell it its size.

    Args:
        mixer: as `find_directional` found it.
        kept: the states that stay, of each reader, as many of each.

    Raises:
        AttributeError, TypeError: the mixer does not let a size be set; it is as it was.
    """
    own, N, R = mixer.module, mixer.states, mixer.rank
    rows = [torch.as_tensor([*range(R), *(R + n for n in stay), *(R + N + n for n in stay)]) for stay in kept]
    columns = [torch.as_tensor(list(stay)) for stay in kept]
    if mixer.kind == SS2D:
        split = own.A_logs.detach().unflatten(0, (4, -1))
        smaller = {
            "x_proj_weight": torch.stack([w[r] for w, r in zip(own.x_proj_weight.detach(), rows, strict=True)]),
            "A_logs": torch.cat([a[:, c] for a, c in zip(split, columns, strict=True)]),
        }
    else:
        last = len(kept) - 1
        smaller = {
            "x_proj.weight": own.x_proj.weight.detach()[rows[0]],
            "A_log": own.A_log.detach()[:, columns[0]],
            "A_b_log": own.A_b_log.detach()[:, columns[last]],
        }
        if last:
            smaller["x_proj_b.weight"] = own.x_proj_b.weight.detach()[rows[1]]
    with taken_back_on_failure() as was:
        cuts = tell_tensors(was, own, smaller)
        tell_sizes(was, own, N, len(kept[0]), STATE_NAMES)
    return Undo(cuts, tuple(was))
