"""Codes as the package compressed-tensors packs them, and the proof that transformers reads them back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)

from ssmc.exporters import verify
from ssmc.exporters.format import Job
from ssmc.exporters.quantized import require_codes
from ssmc.runtime.errors import UsageError, VerificationError
from ssmc.runtime.models.checkpoints import transformers_format
from ssmc.runtime.quantized import Quantized

NAME, LAYOUT = "compressed-tensors", "pack-quantized"
MAX_SHARD = "5GB"
HEAD = "lm_head.weight"  # where it is tied no tensor has the name, but a module has


@dataclass(frozen=True)
class Packed:
    """What is written.

    Attributes:
        tensors: by the names of the files.
        codes: what was packed, by the names of the weights.
        group: inputs that share a scale, in all of them.
        config: of the quantisation, for config.json.
        remarks: sentences for people.
    """

    tensors: dict[str, torch.Tensor]
    codes: Mapping[str, Quantized]
    group: int
    config: dict[str, Any]
    remarks: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        first = next(iter(self.codes.values())).shape
        return {
            "layout": LAYOUT,
            "bits": first.bits,
            "group_size": self.group,
            "symmetric": first.symmetric,
            "modules": len(self.codes),
        }


def pack(job: Job) -> Packed:
    """Pack the codes of a job's model.

    All maps get one group size, the largest that divides all of them, since software that unpacks while it loads looks
    at one: a scale is then stored twice or four times, and the numbers stay the same. Embedding and head are stored as
    ordinary numbers.

    Raises:
        UsageError: the model was not quantised.
        CheckpointError: the codes are not those of its weights.
    """
    source, shrunk = job.source, job.shrunk
    found = require_codes(source, shrunk, NAME)
    outside = {name for name in found if _is_outside(name, source.checkpoint)}
    codes = {name: code for name, code in found.items() if name not in outside}
    if not codes:
        raise UsageError("Only the embedding of this model is quantised, which compressed-tensors does not pack.")
    group = math.gcd(*(code.shape.group for code in codes.values()))
    tensors = {name: tensor for name, tensor in shrunk.tensors.items() if name not in codes}
    for name, code in codes.items():
        tensors |= _packed(name, code, group, shrunk.tensors[name].dtype)
    stored = source.checkpoint.architecture.to_stored(tensors)
    both = {**tensors, **stored}.items()  # loaders may have either name
    dense = sorted({HEAD} | {name for name, tensor in both if name.endswith(".weight") and tensor.dim() == 2})
    remarks = ("Embedding and head are stored as ordinary numbers.",) if outside else ()
    return Packed(stored, codes, group, _config(codes, group, dense), remarks)


def _is_outside(name: str, checkpoint: Any) -> bool:
    prefix, layers = checkpoint.architecture.block_prefix, range(checkpoint.dimensions.n_layer)
    return not any(name.startswith(prefix(layer)) for layer in layers)


def _packed(name: str, code: Quantized, group: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of one map; codes and zero points are signed there."""
    prefix, half = name.removesuffix("weight"), 0 if code.shape.symmetric else 2 ** (code.shape.bits - 1)
    bits, times = code.shape.bits, code.shape.group // group
    signed = (code.codes.short() - half).to(torch.int8)
    tensors = {
        prefix + "weight_packed": pack_to_int32(signed, bits),
        prefix + "weight_scale": code.scale.repeat_interleave(times, 1).to(dtype).contiguous(),
        prefix + "weight_shape": torch.tensor(code.codes.shape),
    }
    if code.zero is not None:
        zero = (code.zero.repeat_interleave(times, 1).short() - half).to(torch.int8)
        tensors[prefix + "weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0).contiguous()
    return tensors


def _config(codes: Mapping[str, Quantized], group: int, dense: list[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json.

    transformers is told to unpack the weights while it loads: where it leaves them packed, it unpacks them when the
    model first runs, and its Mamba (5.23) looks for out_proj.weight before that. vLLM does not read this entry.
    """
    shape = next(iter(codes.values())).shape
    weights = QuantizationArgs(
        num_bits=shape.bits, type="int", symmetric=shape.symmetric, strategy="group", group_size=group, dynamic=False
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format=LAYOUT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name.removesuffix(".weight") for name in dense],
    )
    return config.model_dump(mode="json") | {"dequantize": True}


def write(job: Job, folder: Path) -> list[Path]:
    """Write config.json and the tensors."""
    checkpoint, config, packed = job.source.checkpoint, job.shrunk.config, job.extra
    config.ssmc = job.source.provenance
    marks = {"quantization_config": packed.config}
    words = checkpoint.stored_config
    return transformers_format.write(folder, packed.tensors, config, MAX_SHARD, words, marks)


def compare(job: Job, folder: Path) -> verify.Comparison:
    """Have transformers read what was written, and compare its logits with the masked model's.

    Raises:
        VerificationError: it cannot read it, or computes something else.
    """
    from transformers import AutoModelForCausalLM

    checkpoint = job.source.checkpoint
    moved = verify.cut_epsilons(checkpoint, job.shrunk.config, job.tokens.sample)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as error:  # whatever a library raises at files it does not take
        reason = " ".join(str(error).split())[:200]
        raise VerificationError(f"transformers cannot read the export ({reason}), so nothing was written.") from error
    found = verify.compare(checkpoint.model, loaded, job.tokens.sample, job.tokens.real)
    return replace(found, epsilon_difference=moved)
