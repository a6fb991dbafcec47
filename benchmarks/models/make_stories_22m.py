"""Train a Mamba-1 of 22 M parameters (d_model 512, 12 layers) on the stories, on a GPU in a minute and a half.

    python -m benchmarks.models.make_tiny_hybrid --tokenize tokens.npz  # once, where the stories are
    python -m benchmarks.models.make_stories_22m --tokens tokens.npz --seconds 90 --out OUT

It is not shipped: what needs a model larger than the embedded ones and still of real text is measured on it. The model
is transformers' own, computed by our scan and its gradients; OUT gets bfloat16 weights, tiny's tokenizer and log.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from benchmarks.models.make_tiny_hybrid import Plan, batches, make_optimizer, rate, read_tokens
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.tiny import TINY_DIRECTORY

PLAN = Plan(epochs=math.inf, dropout=0.0, decay=0.1, rate=1.5e-3)
SIZES = {"hidden_size": 512, "num_hidden_layers": 12, "state_size": 16, "vocab_size": 4096}
END = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@torch.no_grad()
def measure(model: nn.Module, tokens: torch.Tensor, window: int, rows: int) -> float:
    """Mean loss in nats a token over windows that do not overlap, `rows` of them at a time."""
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for some in windows.split(rows):
        logits = model(some).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    return total / (len(windows) * (window - 1))


def train(tokens: torch.Tensor, seconds: float, blocks: int, seed: int) -> tuple[MambaForCausalLM, list[list[float]]]:
    """A model trained for so long, and its curve: step, tokens, seconds, training loss."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = use_fast_scan(MambaForCausalLM(MambaConfig(**SIZES, **END)).to(tokens.device)).train()
    optimizer, curve, seen, begun = make_optimizer(model, PLAN), [], 0, time.monotonic()
    for step, (inputs, targets) in zip(count(), batches(tokens, blocks, seed), strict=False):
        part = (time.monotonic() - begun) / seconds
        if part >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = PLAN.rate * rate(part)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            logits = model(inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += inputs.numel()
        if step % 50 == 0:
            curve.append([step, seen, time.monotonic() - begun, float(loss.detach())])
            print("step {}, {:,} tokens, {:.1f} s, loss {:.4f}".format(*curve[-1]), flush=True)
    return use_stock_scan(model.eval()), curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, metavar="NPZ", help="what make_tiny_hybrid wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the model and the log go")
    parser.add_argument("--seconds", type=float, default=90, help="of training")
    parser.add_argument("--blocks", type=int, default=16, help="of 2048 tokens in a step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = read_tokens(args.tokens, device)
    model, curve = train(text["train"], args.seconds, args.blocks, args.seed)
    torch.set_float32_matmul_precision("highest")
    heldout = measure(use_fast_scan(model), text["heldout"], 1024, 8)
    use_stock_scan(model).to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(TINY_DIRECTORY).save_pretrained(args.out)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    facts = {"device": name, "torch": torch.__version__, "heldout nats": heldout, "perplexity": math.exp(heldout)}
    print(json.dumps(facts))
    (args.out / "log.json").write_text(json.dumps(facts | {"curve": curve}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
