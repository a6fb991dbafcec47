"""Small random models of the families beside Mamba-1 and Mamba-2, made from their own configuration classes."""

import math
import shutil
from pathlib import Path

import torch
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.stock_kernels import guard_kernels
from ssmc.runtime.tiny import TINY_DIRECTORY, heldout_path
from tests.support.models import PADDED, VOCAB

TOKENS = {"vocab_size": PADDED, "bos_token_id": 0, "eos_token_id": 60, "pad_token_id": 0}


def roughen(model, seed=0):
    """Numbers without a structure to hide behind, such that every part of the model matters."""
    g = torch.Generator().manual_seed(seed)
    spread = {"in_proj": 1.5, "x_proj": 1.5, "out_proj": 1.5, "embed": 1.0}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=g)
            if name.endswith("A_log"):
                tensor.copy_(0.5 * noise)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                tensor.copy_(noise - 1.5)
            elif tensor.ndim == 1:  # norms, D and the other biases
                tensor.copy_(1 + 0.3 * noise if "norm" in name or name.endswith(".D") else 0.3 * noise)
            else:
                factor = next((f for part, f in spread.items() if part in name), 1.0)
                tensor.copy_(
                    factor * noise / math.sqrt(tensor.shape[-1] if tensor.ndim != 3 or "conv" not in name else 4)
                )
    return guard_kernels(model).eval()


def falcon_mamba(seed=0, **changes):
    sizes = {"hidden_size": 24, "state_size": 8, "num_hidden_layers": 3, "time_step_rank": 5, **TOKENS}
    return roughen(FalconMambaForCausalLM(FalconMambaConfig(**(sizes | changes))), seed)


def jamba(seed=0, **changes):
    """Mamba, Mamba with experts, attention, Mamba with experts."""
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 4, "mamba_d_state": 8, "mamba_dt_rank": 5}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 4, "attn_layer_offset": 2}
    sizes |= {"num_experts": 3, "expert_layer_period": 2, "expert_layer_offset": 1, **TOKENS}
    return roughen(JambaForCausalLM(JambaConfig(**(sizes | changes))), seed)


ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 16}
HYBRID = {"hidden_size": 24, "intermediate_size": 36, **ATTENTION, **TOKENS}


def bamba(seed=0, **changes):
    sizes = {"num_hidden_layers": 3, "attn_layer_indices": [1], **HYBRID, **HEADS}
    return roughen(BambaForCausalLM(BambaConfig(**(sizes | changes))), seed)


def granite(seed=0, **changes):
    """With experts, rotary positions, and every multiplier something else than 1."""
    sizes = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    sizes |= {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 20, **HYBRID, **HEADS}
    sizes |= {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}
    sizes |= {"attention_multiplier": 0.4, "position_embedding_type": "rope", "tie_word_embeddings": True}
    return roughen(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**(sizes | changes))), seed)


def falcon_h1(seed=0, **changes):
    """Of a d_inner that is no multiple of hidden_size, without a gated norm, and with multipliers of its own."""
    sizes = {"num_hidden_layers": 2, "mamba_d_ssm": 32, **HYBRID, **HEADS, "mamba_n_heads": 4}
    sizes |= {"ssm_multipliers": [0.7, 1.5, 0.8, 1.3, 0.9], "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8}
    sizes |= {"embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7}
    sizes |= {"attention_in_multiplier": 0.9, "attention_out_multiplier": 1.1, "mlp_multipliers": [0.8, 1.2]}
    return roughen(FalconH1ForCausalLM(FalconH1Config(**(sizes | changes))), seed)


def nemotron_h(seed=0, **changes):
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"]
    sizes = {"layers_block_type": kinds, "head_dim": 6, **HYBRID, "n_groups": 2, "ssm_state_size": 8}
    sizes |= {"mamba_num_heads": 6, "mamba_head_dim": 8, "chunk_size": 16, "n_routed_experts": 3}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 12}
    return roughen(NemotronHForCausalLM(NemotronHConfig(**(sizes | changes))), seed)


def zamba2(seed=0, **changes):
    """Two transformer blocks that three layers share, with adapters and rotary positions."""
    kinds = ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"]
    sizes = {"layers_block_type": kinds, "num_hidden_layers": 5, "num_mem_blocks": 2, **HYBRID, "mamba_d_state": 8}
    sizes |= {"n_mamba_heads": 6, "mamba_ngroups": 2, "chunk_size": 16, "use_mem_rope": True, "adapter_rank": 5}
    sizes |= {"use_shared_attention_adapter": True, "num_key_value_heads": 4}
    return roughen(Zamba2ForCausalLM(Zamba2Config(**(sizes | changes))), seed)


FAMILIES = {
    "falcon_mamba": falcon_mamba,
    "jamba": jamba,
    "bamba": bamba,
    "granitemoehybrid": granite,
    "falcon_h1": falcon_h1,
    "nemotron_h": nemotron_h,
    "zamba2": zamba2,
}

NORMED = [name for name in FAMILIES if architecture_for(name).capabilities.normed_readers]
TINY_VOCAB = 4096
NOISE = 3e-5  # of float32 sums in another order, which random models amplify


def random_ids(*shape: int, seed=3) -> torch.Tensor:
    return torch.randint(1, VOCAB - 1, shape, generator=torch.Generator().manual_seed(seed))


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


def with_tokenizer(directory: Path) -> Path:
    """The folder of a model with the tokenizer of `tiny` in it, and a short text beside it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_DIRECTORY / name, directory)
    stories = heldout_path().read_text(encoding="utf-8").splitlines()[:6]
    (directory.parent / "text.jsonl").write_text("\n".join(stories) + "\n", encoding="utf-8")
    return directory


def short(directory: Path) -> dict[str, object]:
    """Options of a small run on such a folder."""
    return {"nsamples": 4, "seqlen": 48, "calib": directory.parent / "text.jsonl"}


def assert_cut_equals_masked(model, masked, tensors, config, moved: float) -> None:
    """Stock transformers gives the logits of the masked model from the cut tensors, and not those of the dense model.

    Args:
        model: the dense model.
        masked: the same, masked.
        tensors: of the masked model, cut.
        config: of the cut model.
        moved: the least difference that the mask makes to the logits.
    """
    smaller = type(model)(config).eval()
    smaller.load_state_dict(tensors)
    tokens = random_ids(1, 20)
    wanted = masked(tokens).logits
    assert difference(model(tokens).logits, wanted) > moved
    assert difference(smaller(tokens).logits, wanted) < 1e-5
