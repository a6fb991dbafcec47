"""Embedding and head in few bits, rounded to nearest: every row of theirs is another token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssmc.compressor.methods.method import Record, Survey
from ssmc.compressor.methods.quantize.grid import digits_for, fit_grid
from ssmc.compressor.methods.quantize.modules import QuantizedModule, no_groups, read_inputs
from ssmc.compressor.options.patterns import WIDTH
from ssmc.compressor.options.quantization import BITS, group_for
from ssmc.runtime.quantized import GridShape

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class OutsideRecord(Record):
    """What happened to embedding and head."""

    name = "quantized_outside"

    modules: tuple[QuantizedModule, ...]


def quantize_embedding(survey: Survey) -> OutsideRecord:
    """Quantise the embedding in place, and the head where it is a matrix of its own."""
    model, config = survey.model, survey.plan.config
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    matrices: dict[str, nn.Module] = {survey.plan.architecture.embedding: embedding}
    if head is not None and head.weight is not embedding.weight:
        matrices[HEAD] = head
    return OutsideRecord(tuple(_quantize(survey, name, module, config) for name, module in matrices.items()))


def _quantize(survey: Survey, tensor: str, module: Any, config: Any) -> QuantizedModule:
    whole, name = module.weight.data, tensor.removesuffix(".weight")
    kept = read_inputs(whole, WIDTH in config.parts)
    weight = whole[:, kept]  # what exports cut out is in no group
    group = group_for(weight.shape[1], config.group_size)
    if group is None:
        return no_groups(name, tensor, weight)
    shape = GridShape(BITS[config.quantize_embedding], group, config.symmetric)
    digits = digits_for(survey.stored_dtypes.get(tensor), shape)
    stored = fit_grid(weight, shape, torch.ones_like(weight[0]), digits).quantized(weight)
    whole[:, kept] = stored.weight().to(whole)
    return QuantizedModule(name, tensor, stored)
