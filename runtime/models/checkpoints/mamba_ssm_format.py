"""mamba_ssm's layout: config.json with `d_model` and `ssm_cfg`, and pytorch_model.bin.

Differences to transformers: backbone.embedding.weight without s, lm_head.weight stored even when tied, `vocab_size`
without the padding rows of the embedding, and a config.json in which an unknown key is an error (mamba_ssm/models/
config_mamba.py, mixer_seq_simple.py). What transformers has no field for (the unpadded vocabulary, fused_add_norm)
travels in its configuration as `mamba_ssm_config`, so that reading and writing again changes nothing.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.architectures.capabilities import MambaSsmLayer
from ssmc.runtime.models.checkpoints.config_reading import make_config
from ssmc.runtime.models.checkpoints.reading import read_tensors, some_of
from ssmc.runtime.models.families import Architecture, architecture_for, families, find_family
from ssmc.runtime.progress import NO_PROGRESS, Progress

NAME = "mamba-ssm"
REQUIRED = ("d_model", "n_layer", "vocab_size")
KEPT_CONFIG = "mamba_ssm_config"  # the original config.json, as an extra key of transformers' configuration

# the fields of mamba_ssm's MambaConfig
_ORDER: tuple[str, ...] = (
    "d_model",
    "d_intermediate",
    "n_layer",
    "vocab_size",
    "ssm_cfg",
    "attn_layer_idx",
    "attn_cfg",
    "rms_norm",
)
_ORDER += ("residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings")
_DEFAULT_EXPAND = 2
_DEFAULT_MULTIPLE = 8
_NORM_EPSILON = 1e-5  # fixed in mamba_ssm's MixerModel

_STORED_EMBEDDING, _EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"
_ANY_EMBEDDING = re.compile(r"(^|\.)embedding\.weight$")
_HEAD = "lm_head.weight"


_DEFAULT_LAYER = "Mamba1"


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is in this layout."""
    return "model_type" not in raw and "d_model" in raw


def read(directory: Path, progress: Progress = NO_PROGRESS, lazy: bool = False) -> dict[str, torch.Tensor]:
    """All stored tensors by the names they have in transformers' model; errors as `read_tensors`."""
    stored = read_tensors(directory, progress, lazy=lazy)
    # whatever a wrapper around the model put before the name, or saving its body alone took away
    return {_ANY_EMBEDDING.sub(r"\1embeddings.weight", name): tensor for name, tensor in stored.items()}


def read_config(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """A transformers configuration from the content of mamba_ssm's config.json.

    Raises:
        CheckpointError: a size is missing, or the model is none that transformers can express.
    """
    _refuse_other_models(raw, path)
    ssm_cfg = raw.get("ssm_cfg") or {}
    d_model, expand = raw["d_model"], ssm_cfg.get("expand", _DEFAULT_EXPAND)
    if not all(isinstance(value, int | float) and value > 0 for value in (d_model, expand)):
        raise CheckpointError(
            f"{path} has d_model {d_model!r} and expand {expand!r}, not positive numbers. Correct it."
        )
    family = _kinds()[ssm_cfg.get("layer", _DEFAULT_LAYER)]
    kind = family.capabilities.mamba_ssm
    assert kind is not None  # `_kinds` has those with one
    values = {field: ssm_cfg.get(key, default) for key, (field, default) in kind.fields.items()}
    values |= {
        "vocab_size": _padded(raw, path),
        "hidden_size": d_model,
        "num_hidden_layers": raw["n_layer"],
        "expand": max(1, int(expand)),  # whole numbers only; intermediate_size is what counts
        **_widths(kind, int(expand * d_model), values, path),  # as mamba_ssm rounds it
        "layer_norm_epsilon": _NORM_EPSILON,
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        "architectures": [kind.class_name],
        KEPT_CONFIG: copy.deepcopy(dict(raw)),
    }
    return make_config(family.model_type, values, path)


def unpadded_vocab_size(config: PretrainedConfig) -> int:
    """How many entries the vocabulary has without the embedding's padding rows, where that is known."""
    return getattr(config, KEPT_CONFIG, {}).get("vocab_size", config.vocab_size)


def words_of(raw: Mapping[str, Any]) -> None:
    """None: a config.json in this layout has no words that transformers' layout could take over."""


def write(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PretrainedConfig,
    max_shard_size: int | str,
    stored: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write config.json and pytorch_model.bin; same input, same bytes.

    Args:
        directory: exists.
        tensors: by transformers' names, contiguous, without a tied head.
        config: transformers' configuration of the model.
        max_shard_size: not used, mamba_ssm reads one file only.
        stored: not used, `config` carries what was read from this layout.

    Raises:
        CheckpointError: mamba_ssm has no such model.
    """
    del max_shard_size, stored
    # the name of the format's own file, as mamba_ssm's save_pretrained dumps it
    text = json.dumps(make_raw(config), indent=4)
    stored = {(_STORED_EMBEDDING if name == _EMBEDDING else name): tensor for name, tensor in tensors.items()}
    stored.setdefault(_HEAD, tensors[_EMBEDDING])  # the same storage, so that a tied head costs nothing on disk
    written = [directory / "config.json", directory / "pytorch_model.bin"]
    written[0].write_text(text, encoding="utf-8", newline="\n")
    with written[1].open("wb") as file:  # given a path, torch loses the system's error when the disk is full
        torch.save(stored, file)
    return written


def make_raw(config: PretrainedConfig) -> dict[str, Any]:
    """mamba_ssm's config.json for a model; what was read from one is kept as far as it still holds.

    Raises:
        CheckpointError: mamba_ssm has no such model.
    """
    _refuse_foreign_features(config)
    raw = copy.deepcopy(getattr(config, KEPT_CONFIG, None)) or {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {} if _layer_of(config).layer == _DEFAULT_LAYER else {"layer": _layer_of(config).layer},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": _DEFAULT_MULTIPLE if config.vocab_size % _DEFAULT_MULTIPLE == 0 else 1,
        "tie_embeddings": config.tie_word_embeddings,
    }
    for key, value in (
        ("d_model", config.hidden_size),
        ("n_layer", config.num_hidden_layers),
        ("residual_in_fp32", config.residual_in_fp32),
        ("tie_embeddings", config.tie_word_embeddings),
    ):
        if raw.get(key, True) != value:
            raw[key] = value
    if _padded(raw, Path("config.json")) != config.vocab_size:
        raw["vocab_size"] = config.vocab_size
        if config.vocab_size % raw.get("pad_vocab_size_multiple", _DEFAULT_MULTIPLE):
            raw["pad_vocab_size_multiple"] = 1
    ssm_cfg = _updated_ssm_cfg(raw.get("ssm_cfg") or {}, config)
    if ssm_cfg != (raw.get("ssm_cfg") or {}):
        raw["ssm_cfg"] = ssm_cfg
    return {key: raw[key] for key in sorted(raw, key=_position)}


def _kinds() -> dict[str, Architecture]:
    """The families with a layer of mamba_ssm's, by the name of that layer."""
    return {family.capabilities.mamba_ssm.layer: family for family in families() if family.capabilities.mamba_ssm}


def _layer_of(config: PretrainedConfig) -> MambaSsmLayer:
    family = find_family(config.model_type)
    if family is not None and family.capabilities.mamba_ssm:
        return family.capabilities.mamba_ssm
    known = ", ".join(family.model_type for family in _kinds().values())
    raise CheckpointError(
        f"mamba_ssm has no models of type {config.model_type}, only {known}. Write the transformers layout instead."
    )


def _widths(kind: MambaSsmLayer, d_inner: int, values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """transformers' fields for d_inner: one number for Mamba-1, so many heads for Mamba-2."""
    if not kind.heads:
        return {"intermediate_size": d_inner}
    head_dim = values["head_dim"]
    if not isinstance(head_dim, int) or head_dim < 1 or d_inner % head_dim:
        raise CheckpointError(f"{path} has headdim {head_dim!r}, which does not divide d_inner {d_inner}. Correct it.")
    # what MambaConfig has by default; Mamba2Config's defaults point into other vocabularies
    return {"num_heads": d_inner // head_dim, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


def _position(key: str) -> int:
    """Where mamba_ssm writes a key, since transformers sorts those it keeps for us; unknown ones come last."""
    return _ORDER.index(key) if key in _ORDER else len(_ORDER)


def _updated_ssm_cfg(ssm_cfg: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """`ssm_cfg` with the entries changed, and only those, that say something else than `config`."""
    updated = dict(ssm_cfg)
    for key, (field, default) in _layer_of(config).fields.items():
        now, wanted = ssm_cfg.get(key, default), getattr(config, field)
        if key == "dt_rank":
            now, wanted = math.ceil(config.hidden_size / 16) if now == "auto" else now, int(wanted)
        if key == "dt_limit":  # a list out of JSON
            now, wanted = tuple(now), tuple(wanted)
        if now != wanted:
            updated[key] = wanted
    d_model, d_inner = config.hidden_size, architecture_for(config.model_type).dimensions(config).d_inner
    if int(ssm_cfg.get("expand", _DEFAULT_EXPAND) * d_model) != d_inner:
        updated["expand"] = _exact_expand(d_inner, d_model)
    return updated


def _exact_expand(d_inner: int, d_model: int) -> int | float:
    """The number for which mamba_ssm's int(expand * d_model) is d_inner, though floating point rounds."""
    if d_inner % d_model == 0:
        return d_inner // d_model
    expand = d_inner / d_model
    while int(expand * d_model) < d_inner:
        expand = math.nextafter(expand, math.inf)
    return expand


def _padded(raw: Mapping[str, Any], path: Path) -> int:
    """Rows of the embedding: the vocabulary rounded up to a multiple (MambaLMHeadModel.__init__)."""
    size, multiple = raw["vocab_size"], raw.get("pad_vocab_size_multiple", _DEFAULT_MULTIPLE)
    if not all(isinstance(value, int) and value > 0 for value in (size, multiple)):
        raise CheckpointError(
            f"{path} has vocab_size {size!r} and pad_vocab_size_multiple {multiple!r}, not positive. Correct them."
        )
    return -(-size // multiple) * multiple


def _refuse_other_models(raw: Mapping[str, Any], path: Path) -> None:
    """Everything mamba_ssm can say that transformers cannot."""
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        raise CheckpointError(f"{path} does not say {', '.join(missing)}. Copy the model's own config.json.")
    ssm_cfg = raw.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise CheckpointError(f"{path} has the ssm_cfg {ssm_cfg!r}, which is not an object. Correct it.")
    layer, kinds = ssm_cfg.get("layer", _DEFAULT_LAYER), _kinds()
    if layer not in kinds:
        known = " and ".join(kinds)
        raise CheckpointError(f"{path} describes layers of the kind {layer}; ssmc knows {known} of mamba_ssm so far.")
    kind = kinds[layer].capabilities.mamba_ssm
    if unknown := ssm_cfg.keys() - kind.fields.keys() - kind.fixed.keys() - set(kind.ignored):
        raise CheckpointError(f"{path} has ssm_cfg keys that {layer} does not know: {some_of(unknown)}. Correct it.")
    for key, expressible in kind.fixed.items():
        if ssm_cfg.get(key, expressible[0]) not in expressible:
            raise CheckpointError(
                f"{path} says {key} {ssm_cfg[key]!r}, which transformers' {layer} has not, so ssmc cannot load it."
            )
    if raw.get("attn_layer_idx"):
        raise CheckpointError(f"{path} describes a hybrid (attn_layer_idx is not empty); ssmc knows pure Mamba so far.")
    if raw.get("d_intermediate"):
        raise CheckpointError(f"{path} describes MLP layers (d_intermediate is not 0); ssmc knows pure Mamba so far.")
    if not raw.get("rms_norm", True):
        raise CheckpointError(
            f"{path} says rms_norm false: the model has LayerNorm, which transformers' Mamba has not, so ssmc cannot "
            "load it."
        )


def _refuse_foreign_features(config: PretrainedConfig) -> None:
    """Everything transformers' models can say that mamba_ssm cannot."""
    _layer_of(config)
    if config.layer_norm_epsilon != _NORM_EPSILON:
        raise CheckpointError(
            f"mamba_ssm's norms always use epsilon {_NORM_EPSILON}, this model uses {config.layer_norm_epsilon}; it "
            "can only be written in transformers' layout."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(
            f"mamba_ssm's activation is always silu, this model's is {config.hidden_act}; it can only be written in "
            "transformers' layout."
        )
