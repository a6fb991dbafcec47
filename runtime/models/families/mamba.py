"""Mamba-1 (`model_type: mamba`), as transformers' MambaForCausalLM holds it.

The state dimension N appears in two tensors of a mixer: the columns of A_log (D, N), and the B rows and C rows of
x_proj, whose (dt_rank + 2 N) rows are stacked as dt, B, C. The channels D appear in all of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ssmc.runtime.later import nn
from ssmc.runtime.models.architectures.alone import Alone, misfit
from ssmc.runtime.models.architectures.capabilities import Capabilities, MambaSsmLayer
from ssmc.runtime.models.architectures.layouts.stack import Stack
from ssmc.runtime.models.architectures.mamba1 import Mamba1

_MAMBA_SSM = MambaSsmLayer(
    layer="Mamba1",
    class_name="MambaForCausalLM",
    fields={
        "d_conv": ("conv_kernel", 4),
        "dt_min": ("time_step_min", 0.001),
        "dt_max": ("time_step_max", 0.1),
        "dt_init_floor": ("time_step_floor", 1e-4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        "d_state": ("state_size", 16),
        "dt_rank": ("time_step_rank", "auto"),
        "dt_init": ("time_step_init_scheme", "random"),
        "dt_scale": ("time_step_scale", 1.0),
    },
    ignored=("layer", "expand", "use_fast_path"),
)


class MambaFamily(Stack, Mamba1):
    """Mamba-1; see `interface` for what each method promises."""

    model_type = "mamba"
    capabilities = Capabilities(gpu_scan=True, gpu_gradients=True, gpu_sums=True, mamba_ssm=_MAMBA_SSM)


class _MambaAlone(Alone, MambaFamily):
    """One Mamba-1 mixer by itself; see `LoneMixer`."""

    parts = ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "D", "out_proj")

    def read_sizes(self, mixer: nn.Module) -> SimpleNamespace | str:
        """The sizes of a Mamba-1 mixer, or why its parameters do not make one."""
        if mixer.A_log.dim() != 2:
            return f"with A_log of shape {tuple(mixer.A_log.shape)}, not (D, N)"
        (d_inner, states), d_model = mixer.A_log.shape, mixer.in_proj.weight.shape[-1]
        rank, width = mixer.dt_proj.weight.shape[-1], mixer.conv1d.weight.shape[-1]
        wanted = {"in_proj": (2 * d_inner, d_model), "conv1d": (d_inner, 1, width), "dt_proj": (d_inner, rank)}
        wanted |= {"x_proj": (rank + 2 * states, d_inner), "D": (d_inner,), "out_proj": (d_model, d_inner)}
        if mixer.dt_proj.bias is None:
            return "without a bias of dt_proj"
        return misfit(mixer, wanted) or SimpleNamespace(
            num_hidden_layers=1,
            hidden_size=d_model,
            intermediate_size=d_inner,
            state_size=states,
            time_step_rank=rank,
            conv_kernel=width,
            vocab_size=0,
        )

    def describe(self, view: nn.Module, own: nn.Module, sizes: Any) -> None:
        """The rank of dt."""
        view.time_step_rank = sizes.time_step_rank


FAMILY = MambaFamily()
ALONE = _MambaAlone()
