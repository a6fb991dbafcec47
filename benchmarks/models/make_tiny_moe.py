"""Train a small hybrid with experts on the stories: Granite 4's layout, 3.9 M parameters, 25 minutes of one CPU thread.

    python -m benchmarks.models.make_tiny_hybrid --tokenize tokens.npz  # once, where the stories are
    python -m benchmarks.models.make_tiny_moe --tokens tokens.npz --seconds 300 --out OUT  # again, until it says done

It is not shipped: `benchmarks.loss.experts` measures on it what removing experts costs. The model is transformers' own,
computed by our scan and its gradients. A call trains for --seconds and leaves its state in OUT, from where the next one
goes on; after --steps steps OUT has float16 weights, tiny's tokenizer and log.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from benchmarks.models.make_stories_22m import measure
from benchmarks.models.make_tiny_hybrid import batches, rate, read_tokens
from ssmc.compressor.distillation.muon import MuonAndAdam
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.tiny import TINY_DIRECTORY

MIXERS = "MM*MM*"  # M: Mamba-2, *: attention; every layer has experts behind it
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "num_hidden_layers": len(MIXERS),
    "layer_types": [{"M": "linear_attention", "*": "full_attention"}[kind] for kind in MIXERS],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
    "num_local_experts": 12,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "shared_intermediate_size": 96,
    "attention_multiplier": 32**-0.5,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
STEP_SIZES = (1e-3, 1e-2)  # least and largest time step of a new model
PEAKS = {"matrices": 6e-3, "else": 3e-3}  # learning rates; Muon takes the steps of matrices inside the layers
STATE = "state.pt"


@torch.no_grad()
def new_model(seed: int) -> GraniteMoeHybridForCausalLM:
    """Random weights as transformers draws them, time steps log-uniform."""
    torch.manual_seed(seed)
    model = use_fast_scan(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**CONFIG)))
    low, high = map(math.log, STEP_SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            dt = (low + (high - low) * torch.rand(parameter.shape)).exp()
            parameter.copy_(dt + (-(-dt).expm1()).log())  # the inverse of softplus
    return model.train()


def optimiser_of(model: nn.Module) -> MuonAndAdam:
    """Muon for matrices inside the layers but for the routers', Adam for the rest."""
    named = dict(model.named_parameters())
    inside = {name for name, p in named.items() if p.dim() == 2 and ".layers." in name and "router" not in name}
    groups = [{"params": [p], "peak": PEAKS["matrices" if name in inside else "else"]} for name, p in named.items()]
    return MuonAndAdam(groups, [named[name] for name in inside], [None] * len(groups))


class Training:
    """A run that goes on where an earlier call stopped."""

    def __init__(self, args: argparse.Namespace, tokens: torch.Tensor):
        self.args, self.tokens = args, tokens
        self.model = new_model(args.seed)
        self.optimiser, self.done, self.seconds = optimiser_of(self.model), 0, 0.0
        self.curve: list[list[float]] = []  # step, tokens, seconds, training loss
        self.path = args.out / STATE
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.done, self.seconds, self.curve = state["done"], state["seconds"], state["curve"]

    def run(self) -> bool:
        """Train until the time of this call is over; whether all steps are done."""
        begun, earlier = time.monotonic(), self.seconds
        todo = islice(batches(self.tokens, 1, self.args.seed), self.done, self.args.steps)
        for inputs, targets in todo:
            loss = self.step(inputs, targets)
            self.done, self.seconds = self.done + 1, earlier + time.monotonic() - begun
            if self.done % 25 == 0:
                self.curve.append([self.done, self.done * inputs.numel(), self.seconds, loss])
                print("step {}, {:,} tokens, {:.0f} s, loss {:.4f}".format(*self.curve[-1]), flush=True)
            if time.monotonic() - begun > self.args.seconds:
                break
        self.save()
        return self.done >= self.args.steps

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """One step towards the next tokens and towards experts that get as many tokens as each other."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * rate(self.done / self.args.steps)
        out = self.model(inputs, output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        balance = balance_of(out.router_logits, CONFIG["num_experts_per_tok"])
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.model.zero_grad()
        return float(loss.detach())

    def save(self) -> None:
        """The state, put in place whole."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        state |= {"done": self.done, "seconds": self.seconds, "curve": self.curve}
        torch.save(state, self.path.with_suffix(".next"))
        self.path.with_suffix(".next").replace(self.path)


def balance_of(logits: tuple[torch.Tensor, ...], chosen: int) -> torch.Tensor:
    """Switch Transformers' loss (2101.03961, equations 4 to 6), mean over layers; 1 where all experts get as much."""
    total = logits[0].new_zeros(())
    for layer in logits:  # (T, E)
        weights = layer.float().softmax(-1)
        sent = F.one_hot(layer.topk(chosen).indices, layer.shape[1]).float().sum(1) / chosen
        total = total + layer.shape[1] * (sent.mean(0) * weights.mean(0)).sum()
    return total / len(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, metavar="NPZ", help="what make_tiny_hybrid wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the state, the model and the log go")
    parser.add_argument("--seconds", type=float, default=300, help="that this call trains for")
    parser.add_argument("--steps", type=int, default=1500, help="of 2048 tokens, in all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text = read_tokens(args.tokens)
    training = Training(args, text["train"])
    if not training.run():
        print(f"{training.done} of {args.steps} steps are done: call it again")
        return
    model = training.model.eval()
    heldout = measure(model, text["heldout"], 512, 8)
    use_stock_scan(model).to(torch.float16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(TINY_DIRECTORY).save_pretrained(args.out)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}
    facts |= {"seconds": training.seconds, "heldout nats": heldout, "perplexity": math.exp(heldout)}
    print(f"done: {json.dumps(facts)}")
    (args.out / "log.json").write_text(json.dumps(facts | {"curve": training.curve}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
