"""Small random models and the directories they come in, written without ssmc: by transformers itself, or by hand.

Where mamba_ssm is installed, a stock model runs on a CPU only after `guard_kernels`.
"""

import json
import math
from pathlib import Path

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssmc.runtime.manifest import MANIFEST
from ssmc.runtime.models.stock_kernels import guard_kernels

VOCAB, PADDED = 61, 64  # mamba_ssm pads the embedding to a multiple of 8
LAYERS = 3


def random_model(dtype=torch.float32, seed=0, **changes):
    """A Mamba in which no tensor has a structure to hide behind; all sizes are different."""
    sizes = {"vocab_size": PADDED, "hidden_size": 24, "state_size": 6, "num_hidden_layers": LAYERS, "time_step_rank": 5}
    model = MambaForCausalLM(MambaConfig(**(sizes | changes)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=g)
            fan_in = math.prod(tensor.shape[1:])
            if name.endswith("A_log"):
                tensor.copy_(0.5 * noise)
            elif name.endswith("dt_proj.bias"):
                tensor.copy_(noise - 2)
            elif tensor.ndim == 1:  # norms, D and the other biases
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(noise / math.sqrt(fan_in))
    return guard_kernels(model).to(dtype).eval()


def random_mamba2(dtype=torch.float32, seed=0, **changes):
    """A Mamba-2 in which no tensor has a structure to hide behind and every part matters; all sizes are different."""
    sizes = {"vocab_size": PADDED, "hidden_size": 24, "state_size": 7, "num_hidden_layers": LAYERS, "n_groups": 2}
    sizes |= {"num_heads": 12, "head_dim": 4, "chunk_size": 16, "tie_word_embeddings": True}
    sizes |= {"bos_token_id": 0, "eos_token_id": 60, "pad_token_id": 0}
    model = Mamba2ForCausalLM(Mamba2Config(**(sizes | changes)))
    g = torch.Generator().manual_seed(seed)
    spread = {"in_proj": 1.5, "conv1d": 1.5, "out_proj": 1.5, "embeddings": 4.0}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=g)
            if name.endswith("A_log"):
                tensor.copy_(0.7 * noise)
            elif name.endswith("dt_bias"):
                tensor.copy_(noise - 1)
            elif tensor.ndim == 1:  # norms, D and the biases
                tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
            else:
                factor = next((f for part, f in spread.items() if part in name), 1.0)
                tensor.copy_(factor * noise / math.sqrt(math.prod(tensor.shape[1:])))
    return guard_kernels(model).to(dtype).eval()


def save_transformers(model, directory, **options):
    model.save_pretrained(directory, **options)
    return directory


def save_mamba_ssm(model, directory, config=None):
    """As mamba_ssm's save_pretrained does: a state dict with a shared tied head, and its own config.json."""
    directory.mkdir(parents=True)
    c = model.config
    ssm_cfg = {"d_state": c.state_size}
    if c.model_type == "mamba":
        ssm_cfg["dt_rank"] = c.time_step_rank
    else:
        ssm_cfg |= {"layer": "Mamba2", "headdim": c.head_dim, "ngroups": c.n_groups}
    raw = {"d_model": c.hidden_size, "d_intermediate": 0, "n_layer": c.num_hidden_layers, "vocab_size": VOCAB}
    raw |= {"ssm_cfg": ssm_cfg, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    raw |= {"fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": c.tie_word_embeddings}
    (directory / "config.json").write_text(json.dumps(raw | (config or {}), indent=4))
    state = {n.replace("embeddings.", "embedding."): t.detach() for n, t in model.state_dict().items()}
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def random_tokens(shape=(2, 9), seed=3):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, tokens=None):
    return model(random_tokens() if tokens is None else tokens).logits


def write_manifest(folder: Path, content: dict) -> None:
    """Make a folder an artefact, as version 0.1 of ssmc described one."""
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, **content}), encoding="utf-8")
