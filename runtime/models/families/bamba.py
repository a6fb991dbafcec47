"""Bamba (`model_type: bamba`), as transformers' BambaForCausalLM holds it: Mamba-2 layers among layers of attention."""

from __future__ import annotations

from ssmc.runtime.models.families.mamba2_hybrid import Mamba2HybridArchitecture


class BambaArchitecture(Mamba2HybridArchitecture):
    """Adapter for Bamba; see `Architecture` for what each method promises."""

    model_type = "bamba"
    final_norm = "final_layernorm"
