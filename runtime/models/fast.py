"""Give a stock transformers model our selective scan, with one call, and take it away again.

transformers computes a Mamba on CPU with a Python loop over tokens, and its multi-token forward with a cache starts the
SSM state from zero. Here each mixer gets a forward of its own, as an attribute of the instance: weights, class, state
dict and saved files stay those of the stock model. So do norms and blocks, which need fewer kernels on a GPU
(`fast_norms`, `fast_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.architectures.convolution import Window, takes_window
from ssmc.runtime.models.families import Architecture, architecture_for
from ssmc.runtime.models.fast_blocks import use_fast_blocks, use_stock_blocks
from ssmc.runtime.models.fast_norms import use_fast_norms, use_stock_norms
from ssmc.runtime.models.stock_kernels import guard_kernels
from ssmc.runtime.scan import accelerator, check_backend
from ssmc.runtime.scan.accelerators import needs_gradients
from ssmc.runtime.scan.rounding import StateFormat, pack, state_format, unpack

_SCALES = 1  # of the states of a layer in transformers' cache: the scales of int8 codes
_MARK = "_ssmc_fast"  # attribute of a mixer that holds its _Fast


@dataclass(frozen=True)
class _Fast:
    """What a replaced forward must know."""

    architecture: Architecture
    backend: str
    form: StateFormat | None  # how states are kept between calls; None: in float32
    each_token: bool  # whether they are rounded after every token of a call too


def use_fast_scan(
    model: nn.Module, backend: str = "auto", state_dtype: str | StateFormat = "float32", each_token: bool = False
) -> nn.Module:
    """Make a loaded model use our scan for prefill, decode and training; calling it again changes the backend.

    Outputs agree with stock transformers, except that a prompt given in pieces (several tokens with a cache that
    already holds some) continues from the state, as one pass would. Training on a CPU is fast, too; for second
    derivatives use the backend "reference". On a GPU models use our Triton scan, also for gradients; without triton,
    and under torch.compile or tracing, the stock forward runs wherever that is right.

    Args:
        model: a transformers MambaForCausalLM, changed in place.
        backend: see `ssmc.runtime.scan.selective_scan`.
        state_dtype: how SSM states are kept between calls, "float32", "float16" or "int8", see
            `ssmc.runtime.scan.rounding`; they are computed in float32.
        each_token: round states after every token of a call, as if each had been a call of its own, to measure what
            that costs. It is slower.

    Returns:
        The same model.

    Raises:
        CheckpointError: this is not a model with mixers ssmc knows.
        UsageError: there is no such backend, or no such state dtype.
    """
    check_backend(backend)
    form = state_format(state_dtype) if isinstance(state_dtype, str) else state_dtype
    architecture, mixers = _mixers(model)
    hooked = [m for m in mixers if _MARK not in vars(m) and "forward" in vars(m)]
    if hooked:
        raise CheckpointError(
            f"A {type(hooked[0]).__name__} of this model already has a replaced forward (accelerate's hooks do that). "
            "Load the model without offloading, or remove the hooks, before giving it the fast scan."
        )
    for mixer in mixers:
        mixer.forward = partial(_forward, mixer)  # which copies and pickles with the mixer, as no bound method does
        setattr(mixer, _MARK, _Fast(architecture, backend, form, each_token))
    use_fast_norms(model, backend)
    use_fast_blocks(architecture, model, backend)
    return model


def use_stock_scan(model: nn.Module) -> nn.Module:
    """Undo `use_fast_scan`; a model that does not use it stays as it is.

    Raises:
        CheckpointError: this is not a model with mixers ssmc knows.
    """
    for mixer in _mixers(model)[1]:
        if _MARK in vars(mixer):
            delattr(mixer, _MARK)
            del mixer.forward
    use_stock_blocks(model)
    use_stock_norms(model)
    return model


def _mixers(model: nn.Module) -> tuple[Architecture, Sequence[nn.Module]]:
    """The adapter of a model and its mixers in the order they run."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None:
        raise CheckpointError(f"{name} has no config: give the transformers model itself, not something around it.")
    architecture = architecture_for(getattr(config, "model_type", None), where=f"This {name}")
    guard_kernels(model)
    try:
        mixers = [architecture.mixer(block) for block in architecture.blocks(model)]
        return architecture, [mixer for mixer in mixers if mixer is not None]
    except AttributeError as error:
        raise CheckpointError(
            f"{name} has no mixers where a {architecture.model_type} language model has them ({error}): "
            "give the model that AutoModelForCausalLM loads, not a part of it or something around it."
        ) from error


def _forward(
    mixer: nn.Module,
    hidden_states: torch.Tensor,
    cache_params: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The forward of a mixer: (B, L, d_model) to the same, reading and updating transformers' cache.

    Args:
        mixer: the mixer itself.
        hidden_states: (B, L, d_model).
        cache_params: transformers' cache, or None.
        attention_mask: (B, L), 0 at padding; of a longer one, the last L columns count.
        kwargs: what other versions of transformers pass; only the stock forward reads it.
    """
    fast: _Fast = getattr(mixer, _MARK)
    conv_state, state = _cached(mixer, cache_params)
    length = hidden_states.shape[1]
    on_gpu = _on_gpu(fast, mixer, hidden_states)
    ours = on_gpu or (
        fast.architecture.capabilities.gpu_gradients and _on_gpu(fast, mixer, hidden_states, gradients=True)
    )
    if _leave_to_stock(mixer, hidden_states, cache_params, ours, continues=state is not None and length > 1):
        if fast.form is not None:
            raise UsageError(
                f"States in {fast.form.dtype} need the scan of ssmc, which cannot run here. Leave --state-dtype out."
            )
        return type(mixer).forward(
            mixer, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )
    if attention_mask is not None:
        attention_mask = attention_mask[:, -length:]
        hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
    x, z = fast.architecture.expand(mixer, hidden_states)
    one_more = on_gpu and _moves_on(_layer(mixer, cache_params), mixer, x)
    history: torch.Tensor | Window | None = None
    if conv_state is not None:
        history = Window(conv_state) if one_more else _history(conv_state, mixer.conv_kernel_size - 1)
    inputs = fast.architecture.scan_inputs(mixer, x, z, history, attention_mask, fused=on_gpu)
    if state is not None and torch.is_grad_enabled():
        state = state.clone()  # autograd keeps it for the backward pass, and the cache overwrites its own below
    rounding = fast.form if fast.each_token and length > 1 else None
    y, state = fast.architecture.scan(mixer, inputs, state, fast.backend, in_place=on_gpu, rounding=rounding)
    if cache_params is not None:
        if not one_more:  # only now: the update overwrites the tensor that `history` looks into
            _keep_window(_layer(mixer, cache_params), cache_params, mixer, x)
        if fast.form is None:
            cache_params.update_recurrent_state(state, mixer.layer_idx)
        else:
            _keep_rounded(_layer(mixer, cache_params), state, fast.form)
    return mixer.out_proj(y.to(hidden_states.dtype))


def _cached(mixer: nn.Module, cache: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The last convolution inputs (B, D, >= d_conv) and the SSM state (B, D, N) before this call, None at the start."""
    layer = _layer(mixer, cache)
    if layer is None or not layer.has_previous_state[0]:
        return None, None
    state = layer.recurrent_states[0]
    if state.dtype != torch.float32:
        state = unpack(state, layer.recurrent_states.get(_SCALES))
    return layer.conv_states[0], state


def _keep_rounded(layer: Any, state: torch.Tensor, form: StateFormat) -> None:
    """Let the cache hold a rounded state; scales are a second state of the layer, so that whatever moves or reorders
    the cache takes them along."""
    for index, tensor in zip((0, _SCALES), pack(state, form), strict=True):
        if tensor is None:
            continue
        if index and layer.number_of_states == 1:
            layer.number_of_states = 1 + _SCALES
            for held in (layer.conv_states, layer.recurrent_states, layer.conv_kernel_size):
                held[index] = None
            for is_there in (layer.is_conv_states_initialized, layer.has_previous_state):
                is_there[index] = False
        kept = layer.recurrent_states[index]
        if kept is not None and (kept.shape, kept.dtype) == (tensor.shape, tensor.dtype):
            kept.copy_(tensor)  # where it is, for what recorded its address
        else:
            layer.recurrent_states[index] = tensor
        layer.is_recurrent_states_initialized[index] = True


def _layer(mixer: nn.Module, cache: Any) -> Any:
    """What transformers' cache holds of this mixer; None without a cache, and of versions that build it otherwise.

    The tensors are read here, as the cache's methods that give them are newer than what they give.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[mixer.layer_idx] if len(layers) > mixer.layer_idx else None
    return layer if isinstance(getattr(layer, "has_previous_state", None), dict) else None


def _moves_on(layer: Any, mixer: nn.Module, x: torch.Tensor) -> bool:
    """Whether a GPU's kernel convolves x (B, L, D) behind the cached window, and moves that on by it, in one."""
    if layer is None or x.shape[1] != 1 or not layer.has_previous_state[0] or layer.record_past:
        return False
    window = layer.conv_states[0]
    fits = window.shape[-1] == mixer.conv_kernel_size and window.is_contiguous()
    return fits and takes_window(mixer) and not needs_gradients([x])


def _keep_window(layer: Any, cache: Any, mixer: nn.Module, x: torch.Tensor) -> None:
    """Let the cache hold the last inputs x (B, L, D) of the convolution."""
    width = mixer.conv_kernel_size
    last = x if layer.record_past else x[:, -width:]
    cache.update_conv_state(last.transpose(1, 2), mixer.layer_idx, conv_kernel_size=width)


def _history(conv_state: torch.Tensor, length: int) -> torch.Tensor:
    """The last `length` inputs of the convolution, (B, length, D), out of the cache's (B, D, any)."""
    missing = length - conv_state.shape[-1]
    if missing > 0:  # a cache that records its past does not pad
        conv_state = F.pad(conv_state, (missing, 0))
    return conv_state[..., conv_state.shape[-1] - length :].transpose(1, 2)


def _on_gpu(fast: _Fast, mixer: nn.Module, hidden_states: torch.Tensor, gradients: bool = False) -> bool:
    """Whether one of the scans for a GPU takes this call; with `gradients`, also one that records them."""
    if not fast.architecture.capabilities.gpu_scan or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    weights = mixer.parameters() if torch.is_grad_enabled() else [mixer.conv1d.weight]  # any may need a gradient
    return accelerator(fast.backend, [hidden_states, *weights], gradients) is not None


def _leave_to_stock(mixer: nn.Module, hidden_states: torch.Tensor, cache: Any, on_gpu: bool, continues: bool) -> bool:
    """Whether this call must run transformers' own forward: where our scan has no kernel, or cannot be recorded.

    A piece of a prompt that continues an earlier one is never left to it on a GPU: the stock forward is wrong there.
    """
    if cache is not None and _layer(mixer, cache) is None:
        return True  # the cache of a transformers version whose mixers have another interface
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    on_cpu = hidden_states.is_cpu and mixer.conv1d.weight.is_cpu
    return not (on_cpu or on_gpu) and (not continues or mixer.conv1d.weight.is_meta)
