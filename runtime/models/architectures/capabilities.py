"""Facts of a family that decide what can be done with its models, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BLOCK = "block"
"""Whole blocks, beside the dimensions of `plan`, as a key of `Capabilities.fixed`."""

MAMBA_ALONE = frozenset({"mamba-ssm"})
"""Names of `runtime/models/consumers.py` that know Mamba and Mamba-2 alone."""


@dataclass(frozen=True)
class MambaSsmLayer:
    """The layer of the package mamba_ssm that computes what a family's mixers do.

    Attributes:
        layer: its name, the value of `layer` in `ssm_cfg`.
        class_name: transformers' class of the model.
        fields: key of `ssm_cfg` -> transformers' field and mamba_ssm's default.
        ignored: keys of `ssm_cfg` that change nothing in the result.
        fixed: keys of `ssm_cfg` and their values that transformers can express.
        heads: whether a d_inner is told as so many heads.
    """

    layer: str
    class_name: str
    fields: Mapping[str, tuple[str, Any]]
    ignored: tuple[str, ...]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    heads: bool = False


@dataclass(frozen=True)
class Otherwise:
    """What software computes otherwise than transformers does of a prompt, without a word, or what it does not load.

    Attributes:
        consumer: its name in `runtime/models/consumers.py`.
        what: half a sentence, about "it".
        wrong: whether its results are useless.
        release: the beginning of the version that does so; empty: all that were tried.
        refused: whether it loads none of these models, with an error of its own.
    """

    consumer: str
    what: str
    wrong: bool = False
    release: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What is particular about a family; the defaults are those of Mamba-1.

    Attributes:
        fixed: dimension of `plan`, or BLOCK, that cannot get smaller -> why.
        heads: channels form heads, and a head has one decay rate for all of its channels and states; in_proj makes B,
            C and dt itself. Such a family is a `HeadReaders`.
        whole_expand: its configuration has d_inner as a whole number of times d_model.
        free_width: transformers takes any d_inner of whole heads, whatever d_model is.
        normed_readers: B and C pass a norm over the states. Such a family is a `NormedReaders`.
        uniform: all blocks are alike and hold a mixer and nothing else; false for hybrids.
        shared_blocks: something that several layers share is to `enter` what they read before they run.
        gpu_scan: there are kernels for a GPU.
        gpu_gradients: their backward pass, too.
        gpu_sums: one of them sums over the states without writing them.
        mamba_ssm: the layer of mamba_ssm that computes the same; None: there is none.
        unknown_to: software of `runtime/models/consumers.py` that has no model of this family, or no export of ours.
    """

    fixed: Mapping[str, str] = field(default_factory=dict)
    heads: bool = False
    whole_expand: bool = False
    free_width: bool = False
    normed_readers: bool = False
    uniform: bool = True
    shared_blocks: bool = False
    gpu_scan: bool = False
    gpu_gradients: bool = False
    gpu_sums: bool = False
    mamba_ssm: MambaSsmLayer | None = None
    unknown_to: frozenset[str] = frozenset()
