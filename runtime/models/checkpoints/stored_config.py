"""config.json in its author's own words, with nothing changed but the sizes that were cut.

Every release of transformers words a configuration anew: layer kinds get other names, keys move. Software of another
release reads the words it knows and takes defaults for the rest, without a warning. So what is written is what was
read, key by key; only values that say something else now are replaced, wherever the file says them.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ssmc.runtime.models.checkpoints.config_reading import DTYPE_KEYS, NOT_PASSED_ON, read_config
from ssmc.runtime.models.families import Dimensions, architecture_for

_SIZES = {
    "n_layer": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "d_model": ("hidden_size", "d_model"),
    "d_inner": ("d_inner", "mamba_d_ssm"),
    "d_state": ("state_size", "d_state", "ssm_state_size", "mamba_d_state"),
    "d_conv": ("conv_kernel", "d_conv", "mamba_d_conv"),
}
"""Size -> the keys that say it, of which a configuration may have several."""
_RANK = ("time_step_rank", "dt_rank", "mamba_dt_rank")
_HEADS = ("num_heads", "nheads", "n_heads", "mamba_num_heads", "mamba_n_heads", "n_mamba_heads")
_WIDTH = "intermediate_size"  # of the mixer in pure state-space models, of the MLP in others
_NESTED = "ssm_cfg"  # a part of the configuration that repeats sizes
_KINDS = ("layers_block_type", "layer_types", "hybrid_override_pattern")  # one entry a layer, in words of the release


_NEEDED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"),
    *("tie_word_embeddings", "layer_norm_epsilon", "rms_norm_eps", "rope_theta", "position_embedding_type"),
    *("state_size", "conv_kernel", "time_step_rank", "time_step_limit", "use_bias", "use_conv_bias"),
    *("num_heads", "head_dim", "n_groups", "ssm_state_size", "mamba_num_heads", "mamba_head_dim"),
    *("mamba_d_state", "mamba_d_conv", "mamba_d_head", "mamba_d_ssm", "mamba_n_heads", "mamba_n_groups"),
    *("mamba_expand", "mamba_dt_rank", "mamba_proj_bias", "mamba_conv_bias", "mamba_rms_norm"),
    *("mamba_norm_before_gate", "attention_bias", "mlp_bias", "projectors_bias", "mixer_rms_eps"),
    *("num_attention_heads", "num_key_value_heads", "attn_layer_offset", "attn_layer_period"),
    *("num_experts", "num_experts_per_tok", "expert_layer_offset", "expert_layer_period", "num_local_experts"),
    *("shared_intermediate_size", "embedding_multiplier", "attention_multiplier", "logits_scaling"),
    *("residual_multiplier", "lm_head_multiplier", "key_multiplier", "attention_in_multiplier"),
    *("attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier", "ssm_multipliers", "mlp_multipliers"),
)
"""Keys that mlx-lm has no default for, or another one than transformers, if the family has such a key."""


def said_in_full(stored: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The content of a config.json with what it leaves to transformers' defaults, which other software has not.

    Args:
        stored: the content of a config.json, in transformers' layout.
        config: what transformers makes of it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    values = {"rope_theta": rope.get("rope_theta")} | config.to_dict()
    if values.get("mamba_d_ssm") and values.get("head_dim") is None:  # transformers works it out, mlx-lm takes 64
        values["head_dim"] = config.hidden_size // config.num_attention_heads
    left_out = {key: _plain(values[key]) for key in _NEEDED if key not in stored and values.get(key) is not None}
    return {**stored, **left_out}


def in_own_words(stored: Mapping[str, Any], config: PretrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a config.json for `config`, worded as the one its model was read from.

    Args:
        stored: the content of that config.json, in transformers' layout.
        config: what it shall say; it was made from `stored` by changing sizes. Its dtype is that of the stored weights.
        dtype: of the weights that are written.
    """
    before = read_config(stored, Path("config.json"))
    out = copy.deepcopy(dict(stored))
    then, now = before.to_dict(), config.to_dict()
    aside = {*NOT_PASSED_ON, *(_KINDS if any(word in stored for word in _KINDS) else ())}
    changed = {key: value for key, value in now.items() if key not in aside and then.get(key) != value}
    for key, value in changed.items():
        words = [word for word in (key, *_aliases(config, key)) if word in stored] or [key]
        out |= dict.fromkeys(words, _plain(value))
    _change_kinds(out, stored, then, now)
    architecture = architecture_for(config.model_type)
    _change_sizes(
        out,
        stored,
        architecture.dimensions(before),
        architecture.dimensions(config),
        not architecture.capabilities.uniform,
    )
    if config.hidden_size != before.hidden_size:
        _say_what_followed(out, config)
    if dtype != config.dtype:
        keys = [key for key in DTYPE_KEYS if key in stored] or [DTYPE_KEYS[0]]
        out |= dict.fromkeys(keys, str(dtype).removeprefix("torch."))
    return out


def in_new_words(config: PretrainedConfig) -> dict[str, Any]:
    """The content of a config.json for a model that was stored in another layout, as every release can read it.

    What is the default of its class is left out where JSON has no word for it: releases write infinity differently.
    """
    content = json.loads(config.to_json_string(use_diff=True))
    defaults = type(config)().to_dict()
    for key, value in config.to_dict().items():
        if key in content and _is_infinite(value) and list(value) == list(defaults.get(key, ())):
            del content[key]
    return {key: _plain(value) for key, value in content.items()}


def _aliases(config: PretrainedConfig, key: str) -> list[str]:
    """Other names of a key in its class."""
    return [alias for alias, name in config.attribute_map.items() if name == key]


def _change_sizes(
    out: dict[str, Any], stored: Mapping[str, Any], before: Dimensions, after: Dimensions, hybrid: bool
) -> None:
    """Change every key that says a size that is another one now."""
    then, now = before.as_dict(), after.as_dict()
    words = _SIZES | {"dt_rank": _RANK if before.heads is None else _HEADS}
    if not hybrid:
        words |= {"d_inner": (*words["d_inner"], _WIDTH)}
    for size, keys in words.items():
        if then[size] == now[size]:
            continue
        for content, place in ((stored, out), (stored.get(_NESTED), out.get(_NESTED))):
            if isinstance(content, Mapping) and isinstance(place, dict):
                place |= {key: now[size] for key in keys if content.get(key) == then[size]}


def _say_what_followed(out: dict[str, Any], config: PretrainedConfig) -> None:
    """Say the sizes that are worked out of d_model where nothing says them, and that have not changed with it."""
    worked_out = read_config(out, Path("config.json")).to_dict()
    for key, value in config.to_dict().items():
        if key not in NOT_PASSED_ON and worked_out.get(key) != value:
            words = [word for word in (key, *_aliases(config, key)) if word in out] or [key]
            out |= dict.fromkeys(words, _plain(value))


def _change_kinds(out: dict[str, Any], stored: Mapping[str, Any], then: dict[str, Any], now: dict[str, Any]) -> None:
    """Lists of the kinds of layers, whose words follow from where they stood before."""
    key = next((key for key in _KINDS if isinstance(then.get(key), list) and then[key] != now.get(key)), None)
    if key is None:
        return
    for word in _KINDS:
        own = stored.get(word)
        if isinstance(own, list | str) and len(own) == len(then[key]):
            said = dict(zip(then[key], own, strict=True))
            kinds = [said[kind] for kind in now[key]]
            out[word] = "".join(kinds) if isinstance(own, str) else kinds


def _plain(value: Any) -> Any:
    """A value as JSON has it; sequences as lists, infinity as Python writes it."""
    if isinstance(value, Mapping):
        special = value.get("__float__") if len(value) == 1 else None
        return float(special) if isinstance(special, str) else {key: _plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_infinite(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(v, float) and not math.isfinite(v) for v in value)
