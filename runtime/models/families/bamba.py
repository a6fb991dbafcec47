"""Bamba (`model_type: bamba`), as transformers' BambaForCausalLM holds it: Mamba-2 layers among layers of attention."""

from __future__ import annotations

from ssmc.runtime.models.architectures.mamba2_hybrid import Mamba2Hybrid


class BambaFamily(Mamba2Hybrid):
    """Adapter for Bamba; see `interface` for what each method promises."""

    model_type = "bamba"
    mixer_name = "mamba"
    final_norm = "final_layernorm"


FAMILY = BambaFamily()
