"""Mamba-1 whose B, C and dt pass an RMSNorm before the scan: Falcon-Mamba and the Mamba layers of Jamba.

With b the B rows of x_proj applied to u, a stock loader computes B = w b / sqrt(mean_n b[n]^2 + eps), the mean over all
the states of the layer; C likewise. A silent state has b = 0. So a layer of N states of which K speak has the same sum
of squares as the layer cut to K, and a mean that is K/N of it. Cutting multiplies what the norm puts out by sqrt(K/N),
for B and for C, which is undone by a factor N/K on what is read out of the states. What is left is eps, which counts
for more in a mean over fewer: masking scales all rows of B, and all of C, by a power of two, which the norms take away
again, up to where eps is lost in rounding. The cut layer computes what the masked one did, but where all that is left
of b, or of c, is small beside eps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssmc.runtime.later import F, nn, torch
from ssmc.runtime.models.architectures.mamba1 import Mamba1
from ssmc.runtime.models.architectures.plan import STATE
from ssmc.runtime.models.architectures.surgery import Sizes

LOUD = 64.0  # Euclidean norm that the longest row of B has at least, and of C, when states are gone


class NormedMamba1(Mamba1):
    """What Falcon-Mamba and Jamba have in common; see `interface` for what each method promises."""

    has_norm_weights: bool  # of the norms of B and C
    behind_norm: tuple[str, ...]  # tensors of a mixer that take a factor on the read-out of the states

    def after_x_proj(
        self, mixer: nn.Module, low_rank: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What dt_proj and the scan read of what x_proj puts out: each of the three behind its norm."""
        return mixer.dt_layernorm(low_rank), mixer.b_layernorm(B), mixer.c_layernorm(C)

    def before_norm(self, mixer: nn.Module, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """b and c, (B, L, N) each: what the norms of B and C read where the scan reads u (B, L, D)."""
        return tuple(F.linear(u, mixer.x_proj.weight[rows]) for rows in self.state_rows(mixer))

    def mask_states(self, mixer: nn.Module, kept: Sequence[int], mixing: torch.Tensor | None = None) -> None:
        """Silence all states but `kept` in place; `mixing` (K, N) acts on C behind its norm, in the dense model."""
        if mixing is not None and self.has_norm_weights:
            weight, index = mixer.c_layernorm.weight.detach(), list(kept)
            left = torch.where(weight[index] == 0, 1.0, weight[index])  # C M = w' (1/w' M w) c
            mixing = mixing.to(weight.device, torch.float64) * weight.double() / left.double()[:, None]
            with torch.no_grad():
                mixer.c_layernorm.weight[index] = left
        super().mask_states(mixer, kept, mixing)
        if len(kept) < mixer.ssm_state_size:
            for rows in self.state_rows(mixer):
                _amplify(mixer.x_proj.weight.data[rows])

    def after_cut(
        self, tensors: dict[str, torch.Tensor], prefix: str, dimension: str, sizes: Sizes, left: tuple[int, int]
    ) -> None:
        """Undo in the weights what the norms' other mean changes, see the head of this file."""
        if dimension == STATE and left[0] < sizes[STATE]:
            self._undo(tensors, prefix, left[0] / sizes[STATE])

    def _undo(self, tensors: dict[str, torch.Tensor], prefix: str, share: float) -> None:
        """Multiply the read-out of a layer by 1 / share; where that needs more digits than are stored, in float32."""
        behind = {name: tensors[prefix + name].clone() for name in self.behind_norm}
        if not is_power_of_two(share):
            behind = {name: weight.float() for name, weight in behind.items()}
        self.scale_readout(behind, 1 / share)
        tensors |= {prefix + name: weight for name, weight in behind.items()}

    def with_epsilons_of(self, model: nn.Module, config: Any) -> None:
        """Make norms of B and C over all states, some silent, compute what those of a cut model compute.

        As for gated norms: eps counts K/N times as much. With one state left it tells wherever that comes close to 0.
        """
        left, whole = (getattr(c, self.state_field) for c in (config, model.config))
        for block in self.blocks(model):
            mixer = self.mixer(block)
            for norm in () if mixer is None else (mixer.b_layernorm, mixer.c_layernorm):
                name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
                setattr(norm, name, getattr(norm, name) * left / whole)

    def scale_readers(
        self, mixer: nn.Module, kept: Sequence[int], b: torch.Tensor, c: torch.Tensor, factor: float
    ) -> None:
        """Scale the rows of B and C of some states, which the norms see, and what is read out of all of them.

        Args:
            mixer: the mixer.
            kept: K states.
            b: (K,) factors of their B rows. Weights of the norm undo them, if it has any.
            c: (K,) factors of their C rows; without weights of the norms the inverse of `b`, which undoes them, too.
            factor: of the read-out.
        """
        with torch.no_grad():
            index = torch.as_tensor(list(kept), device=mixer.x_proj.weight.device)
            for rows, scale in zip(self.state_rows(mixer), (b, c), strict=True):
                mixer.x_proj.weight[rows][index] *= scale[:, None].to(mixer.x_proj.weight)
            if self.has_norm_weights:
                for norm, scale in ((mixer.b_layernorm, b), (mixer.c_layernorm, c)):
                    norm.weight[index] /= scale.to(norm.weight)
            self.scale_readout({name: mixer.get_parameter(name) for name in self.behind_norm}, factor)

    def scale_readout(self, weights: Mapping[str, torch.Tensor], factor: float) -> None:
        """Multiply what is read out of the states, in place; `weights` are those named in `behind_norm`."""
        raise NotImplementedError


def _amplify(rows: torch.Tensor) -> None:
    """Scale rows (N, D) by a power of two, in place, so that their mean square leaves eps far behind."""
    longest = float(rows.norm(dim=1).max())
    if 0 < longest < LOUD:
        rows *= 2.0 ** math.ceil(math.log2(LOUD / longest))


def is_power_of_two(value: float) -> bool:
    """Whether a half precision number times this is exact."""
    return math.frexp(value)[0] == 0.5
