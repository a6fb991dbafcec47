"""Mamba-2 (`model_type: mamba2`), as transformers' Mamba2ForCausalLM holds it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

from ssmc.runtime.later import nn
from ssmc.runtime.models.architectures.alone import STATE_NAMES, Alone, misfit, stated
from ssmc.runtime.models.architectures.capabilities import Capabilities, MambaSsmLayer
from ssmc.runtime.models.architectures.layouts.stack import Stack
from ssmc.runtime.models.architectures.mamba2 import Mamba2
from ssmc.runtime.models.architectures.plan import CHANNEL, HEAD

_MAMBA_SSM = MambaSsmLayer(
    layer="Mamba2",
    class_name="Mamba2ForCausalLM",
    fields={
        "d_conv": ("conv_kernel", 4),
        "dt_min": ("time_step_min", 0.001),
        "dt_max": ("time_step_max", 0.1),
        "dt_init_floor": ("time_step_floor", 1e-4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
        "d_state": ("state_size", 128),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "dt_limit": ("time_step_limit", (0.0, math.inf)),
        "chunk_size": ("chunk_size", 256),
    },
    ignored=("layer", "expand", "use_mem_eff_path", "conv_init", "A_init_range", "sequence_parallel"),
    fixed={"d_ssm": (None,), "D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,)},
    heads=True,
)


class Mamba2Family(Stack, Mamba2):
    """Mamba-2; see `interface` for what each method promises."""

    model_type = "mamba2"
    capabilities = Capabilities(heads=True, gpu_scan=True, gpu_gradients=True, gpu_sums=True, mamba_ssm=_MAMBA_SSM)


class _Mamba2Alone(Alone, Mamba2Family):
    """One Mamba-2 mixer by itself; see `LoneMixer`."""

    capabilities = replace(
        Mamba2Family.capabilities, fixed=dict.fromkeys((CHANNEL, HEAD), "heads of a mixer by itself are not cut yet")
    )
    parts = ("in_proj", "conv1d", "dt_bias", "A_log", "D", "norm", "out_proj")

    def read_sizes(self, mixer: nn.Module) -> SimpleNamespace | str:
        """The sizes of a Mamba-2 mixer, or why its parameters do not make one."""
        if mixer.A_log.dim() != 1:
            return f"with A_log of shape {tuple(mixer.A_log.shape)}, not (H,)"
        heads, (d_model, d_inner) = len(mixer.A_log), mixer.out_proj.weight.shape
        channels, width = mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1]
        readers = channels - d_inner  # B and C of all groups
        states = stated(mixer, STATE_NAMES) or max(1, readers // 2)
        groups = stated(mixer, ("n_groups", "ngroups")) or max(1, readers // 2 // states)
        wanted = {"in_proj": (d_inner + channels + heads, d_model), "conv1d": (channels, 1, width), "D": (heads,)}
        wanted |= {"dt_bias": (heads,), "norm": (d_inner,)}
        if wrong := misfit(mixer, wanted):
            return wrong
        if readers <= 0 or readers % (2 * groups) or d_inner % heads or heads % groups:
            return f"with {channels} channels of conv1d, {d_inner} of out_proj, {heads} heads and {groups} groups"
        if getattr(mixer.norm, "norm_before_gate", False):
            return "with a norm before the gate"
        return SimpleNamespace(
            num_hidden_layers=1,
            hidden_size=d_model,
            intermediate_size=d_inner,
            expand=Fraction(d_inner, d_model),
            state_size=readers // (2 * groups),
            num_heads=heads,
            head_dim=d_inner // heads,
            n_groups=groups,
            conv_kernel=width,
            vocab_size=0,
        )

    def describe(self, view: nn.Module, own: nn.Module, sizes: Any) -> None:
        """Heads, the channels of conv1d, the limits of dt, and the gated norm by transformers' names."""
        view.num_heads, view.head_dim, view.n_groups = sizes.num_heads, sizes.head_dim, sizes.n_groups
        view.conv_dim = len(own.conv1d.weight)
        low, high = stated(own, ("time_step_limit", "dt_limit")) or (0.0, float("inf"))
        view.time_step_limit = (low, high)
        if not hasattr(own.norm, "variance_epsilon"):
            from ssmc.runtime.models.architectures.gated_norm import GatedNorm

            view.norm = GatedNorm(own.norm)

    def other_sizes(self, sizes: Any) -> dict[tuple[str, ...], int]:
        """The channels of conv1d."""
        return {("conv_dim",): sizes.intermediate_size + 2 * sizes.n_groups * sizes.state_size}


FAMILY = Mamba2Family()
ALONE = _Mamba2Alone()
