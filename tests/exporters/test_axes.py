"""Every axis of a hybrid in GGUF and ONNX: what was cut runs there and computes the same, or is refused by name."""

from __future__ import annotations

from functools import partial

import pytest

from ssmc.compressor import compress
from ssmc.compressor.families import UNITS, parts_of
from ssmc.compressor.options.patterns import CHANNEL, HEAD, HEAD_DIM, WIDTH
from ssmc.exporters import export
from ssmc.exporters.foresight import refuse_left
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.models.families import architecture_for
from tests.support.families import FAMILIES, TINY_VOCAB, with_tokenizer
from tests.support.models import random_mamba2, random_model, save_transformers

SIZES = {
    "jamba": {"num_experts": 4, "intermediate_size": 32},
    "granitemoehybrid": {"num_local_experts": 4, "intermediate_size": 32, "hidden_size": 32, "mamba_n_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention", "moe"],
        **{"n_routed_experts": 4, "moe_intermediate_size": 32},
    },
    "bamba": {"partial_rotary_factor": 0.5, "hidden_size": 32, "mamba_n_heads": 8},  # llama.cpp turns pairs
}
AXES = (*UNITS, HEAD, HEAD_DIM)
HYBRIDS = [family for family in FAMILIES if not architecture_for(family).capabilities.uniform and family != "zamba2"]
CASES = [(family, axis) for family in HYBRIDS for axis in AXES if axis in parts_of(architecture_for(family))]
REFUSED = {("jamba", "mlp"): "experts have the same width"}  # of what is compressed
NOT_IN_GGUF = {
    ("jamba", "attention"): "only as wide as d_model: its query heads have to stay",
    **{
        (family, axis): rf"d_inner of 2 x d_model only.*{advice}"
        for family, advice in (("bamba", r"--pattern head\+width"), ("granitemoehybrid", "heads have to stay"))
        for axis in (HEAD, HEAD_DIM)
    },
}


FOR_LLAMA_CPP = {"runtime": "llama.cpp", "refuse": partial(refuse_left, "llama.cpp"), "force": True}


@pytest.mark.parametrize(("family", "axis"), CASES, ids=["-".join(case) for case in CASES])
def test_what_was_cut_runs_in_gguf_and_onnx_or_is_refused_by_name(family, axis, tmp_path):
    """An export is proven against stock transformers before it is written; a refusal comes before any work, too."""
    model = FAMILIES[family](vocab_size=TINY_VOCAB, **SIZES.get(family, {}))
    folder = with_tokenizer(save_transformers(model, tmp_path / "m"))
    options = {"pattern": axis, "sparsity": 0.5, "score": "magnitude", "repair": False, "out": tmp_path / "out"}
    if (family, axis) in REFUSED:
        with pytest.raises(SsmcError, match=REFUSED[family, axis]):
            compress(folder, **options)
        return
    result = compress(folder, **options)
    graph = export(result.directory, format="onnx")
    assert graph.comparison.max_difference < 1e-3
    if (family, axis) in NOT_IN_GGUF:
        for refuse in (
            lambda: export(result.directory, format="gguf"),
            lambda: compress(folder, **options, **FOR_LLAMA_CPP, calib=tmp_path / "no-such-text.txt"),
        ):
            with pytest.raises(SsmcError, match=NOT_IN_GGUF[family, axis]):
                refuse()
        return
    compress(folder, **options, **FOR_LLAMA_CPP)
    file = export(result.directory, format="gguf")
    assert file.comparison.max_difference < 1e-3


WIDE = {
    "mamba": (partial(random_model, hidden_size=32, intermediate_size=64), CHANNEL),
    "mamba2": (partial(random_mamba2, hidden_size=32, num_heads=8, head_dim=8), None),
    "falcon_mamba": (FAMILIES["falcon_mamba"], CHANNEL),
    "jamba": (partial(FAMILIES["jamba"], num_experts=1), ""),
    "granitemoehybrid": (
        partial(FAMILIES["granitemoehybrid"], num_local_experts=0, hidden_size=32, mamba_n_heads=8),
        HEAD,
    ),
    "bamba": (partial(FAMILIES["bamba"], **SIZES["bamba"]), HEAD),
    "falcon_h1": (FAMILIES["falcon_h1"], None),
    "nemotron_h": (
        partial(
            FAMILIES["nemotron_h"], layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"]
        ),
        None,
    ),
}
"""A model without experts, and what goes by the same part as d_model where llama.cpp wants twice that as d_inner;
empty: nothing can, None: it takes any."""


@pytest.mark.parametrize("family", WIDE)
def test_a_narrower_stream_runs_in_gguf_and_onnx_or_is_refused_by_name(family, tmp_path):
    """As for the other axes; a Mamba and a Mamba-2 in mamba_ssm's layout as well."""
    make, beside = WIDE[family]
    folder = with_tokenizer(save_transformers(make(vocab_size=TINY_VOCAB), tmp_path / "m"))
    options = {"sparsity": 0.5, "score": "magnitude", "repair": False}
    alone = compress(folder, pattern=WIDTH, out=tmp_path / "alone", **options)
    for format in ("onnx", *(["mamba-ssm"] if family in ("mamba", "mamba2") else [])):
        assert export(alone.directory, format=format).comparison.max_difference < 1e-3
    if beside is None:
        assert export(alone.directory, format="gguf").comparison.max_difference < 1e-3
        return
    with pytest.raises(SsmcError, match=r"twice d_model|2 x d_model"):
        export(alone.directory, format="gguf")
    with pytest.raises(SsmcError, match=r"twice d_model|2 x d_model"):  # and before any work
        compress(folder, pattern=WIDTH, out=tmp_path / "no", calib="no-such.txt", **FOR_LLAMA_CPP, **options)
    if not beside:
        return
    both = compress(folder, pattern=f"{beside}+{WIDTH}", out=tmp_path / "both", **options)
    for format in ("onnx", "gguf"):
        assert export(both.directory, format=format).comparison.max_difference < 1e-3
