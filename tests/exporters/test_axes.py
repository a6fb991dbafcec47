"""Every axis of a hybrid in GGUF and ONNX: what was cut runs there and computes the same, or is refused by name."""

from __future__ import annotations

from functools import partial

import pytest

from ssmc.compressor import compress
from ssmc.compressor.families import UNITS, parts_of
from ssmc.compressor.methods.units.foreseen import without_units
from ssmc.compressor.options.patterns import HEAD, HEAD_DIM
from ssmc.exporters import export
from ssmc.exporters.foresight import refuse_unfit
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.models.families import architecture_for
from tests.support.families import FAMILIES, TINY_VOCAB, with_tokenizer
from tests.support.models import save_transformers

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
        (family, axis): r"d_inner of 2 x d_model only.*--pattern head\+width"
        for family in ("bamba", "granitemoehybrid")
        for axis in (HEAD, HEAD_DIM)
    },
}


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
            lambda: refuse_unfit(folder, "llama.cpp", left=partial(without_units, removed={axis: 0.5})),
        ):
            with pytest.raises(SsmcError, match=NOT_IN_GGUF[family, axis]):
                refuse()
        return
    refuse_unfit(folder, "llama.cpp", left=partial(without_units, removed={axis: 0.5}))
    file = export(result.directory, format="gguf")
    assert file.comparison.max_difference < 1e-3
