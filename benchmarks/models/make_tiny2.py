"""Train `tiny-mamba2`, the embedded Mamba-2, on the project's stories and put it where ssmc looks for it.

    python -m benchmarks.models.make_tiny2 --steps 4000 --work work/tiny2  # the same schedule on every machine
    python -m benchmarks.models.make_tiny2 --until 22:55 --work work/tiny2  # as many steps as fit, by the clock
    python -m benchmarks.models.make_tiny2 --pack --work work/tiny2  # runtime/tiny2 out of the last checkpoint

It shares the tokenizer and the texts of `tiny`, and trains in one thread with the scan of ssmc itself. The order of
the text and the initial weights come from --seed; with --steps a run repeats on the same machine, with --until the
learning rate follows the clock instead. --lock names a file: while somebody holds it exclusively (flock), training
waits.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

from ssmc.runtime.models.fast import use_fast_scan

ROOT = Path(__file__).parents[2]
BATCH, LENGTH = 4, 512
PEAK, FLOOR, WARM_UP = 2.5e-3, 0.05, 0.02  # learning rate; the rest as parts of it and of the run
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_heads": 12,
    "head_dim": 32,
    "state_size": 64,
    "n_groups": 1,
    "expand": 2,
    "intermediate_size": 384,
    "conv_kernel": 4,
    "chunk_size": 64,
    # defaults, which mlx-lm has not
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 12,
    "time_step_limit": (0.0, float("inf")),
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def new_model(seed: int) -> Mamba2ForCausalLM:
    """Random weights: transformers' own for A, dt and conv1d, linear maps by their fan-in, a small embedding."""
    torch.manual_seed(seed)
    model = Mamba2ForCausalLM(Mamba2Config(**CONFIG, rescale_prenorm_residual=False))
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(std=0.02)
        for block in model.backbone.layers:
            for part, scale in (
                (block.mixer.in_proj, 1.0),
                (block.mixer.out_proj, CONFIG["num_hidden_layers"] ** -0.5),
            ):
                part.weight.normal_(std=0.6 * scale * part.in_features**-0.5)
    return model


def read_tokens(path: Path, tokenizer: Tokenizer) -> torch.Tensor:
    """All stories in a row, each followed by the end token."""
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return torch.tensor([i for text in tokenizer.encode_batch(texts) for i in (*text.ids, 0)], dtype=torch.int32)


def batches(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Windows of LENGTH + 1 tokens (BATCH, LENGTH + 1) in a new order, from a new start, in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        first = int(torch.randint(LENGTH, (1,), generator=generator))
        windows = tokens[first:][: (len(tokens) - first - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
        order = torch.randperm(len(windows), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield windows[rows].long()


def rate(part: float) -> float:
    """The learning rate when `part` of the run is over: a short warm-up, then a cosine."""
    if part < WARM_UP:
        return PEAK * (0.05 + 0.95 * part / WARM_UP)
    return PEAK * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, (part - WARM_UP) / (1 - WARM_UP)))))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))


@torch.no_grad()
def heldout_loss(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean loss in nats a token over (n, LENGTH + 1) held-out tokens."""
    model.eval()
    losses = [model(row[None, :-1].long(), labels=None).logits[0].log_softmax(-1) for row in windows]
    picked = [loss.gather(1, row[1:, None].long()).mean() for loss, row in zip(losses, windows, strict=True)]
    model.train()
    return float(-torch.stack(picked).mean())


def wait_for(lock: Path | None) -> None:
    """Return when nobody holds the lock exclusively."""
    if lock is None or not lock.exists():
        return
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    args.work.mkdir(parents=True, exist_ok=True)
    stories, tokenizer = (
        args.shared / "data" / "stories",
        Tokenizer.from_file(str(ROOT / "runtime/tiny/tokenizer.json")),
    )
    tokens = read_tokens(stories / "train.jsonl", tokenizer)
    heldout = read_tokens(stories / "valid.jsonl", tokenizer)[: 16 * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    model = use_fast_scan(new_model(args.seed)).train()
    optimizer = make_optimizer(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens", flush=True)
    begun, ends = time.time(), None if args.until is None else clock(args.until)
    mean, saved, seen = 0.0, begun, 0
    for step, window in enumerate(batches(tokens, args.seed)):
        part = step / args.steps if ends is None else (time.time() - begun) / (ends - begun)
        if part >= 1:
            break
        wait_for(args.lock)
        for group in optimizer.param_groups:
            group["lr"] = rate(part)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.lm_head(model.backbone(window[:, :-1]).last_hidden_state)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += window.shape[0] * LENGTH
        mean = float(loss.detach()) if step == 0 else 0.98 * mean + 0.02 * float(loss.detach())
        if step % 50 == 0:
            print(f"step {step}, {part:.1%}, {seen:,} tokens, {time.time() - begun:.0f} s, loss {mean:.3f}", flush=True)
        if time.time() - saved > args.every:
            saved = time.time()
            save(model, args.work)
            print(f"  held out: perplexity {math.exp(heldout_loss(model, heldout)):.2f}", flush=True)
    save(model, args.work)
    print(f"done: {step} steps, held-out perplexity {math.exp(heldout_loss(model, heldout)):.3f}", flush=True)


def clock(text: str) -> float:
    """The moment today that a time like 22:55 stands for."""
    hour, minute = map(int, text.split(":"))
    return datetime.now().astimezone().replace(hour=hour, minute=minute, second=0).timestamp()


def save(model: nn.Module, work: Path) -> None:
    """The weights, written beside and put in place whole."""
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(tensors, work / "next.safetensors")
    (work / "next.safetensors").replace(work / "model.safetensors")


def pack(work: Path, out: Path) -> None:
    """The embedded model: float16 weights and a configuration."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(work / "model.safetensors").items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise SystemExit("a weight does not fit into float16")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", **CONFIG, "dtype": "float16"}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in sorted(out.glob("*.json")) + sorted(out.glob("*.safetensors")):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.stat().st_size:9,d}  {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints of the training go")
    parser.add_argument("--out", type=Path, default=ROOT / "runtime" / "tiny2")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--until", help="end at this time of today, like 22:55, instead of after --steps")
    parser.add_argument("--every", type=float, default=300, help="seconds between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lock", type=Path, help="wait while another process holds this file's lock exclusively")
    parser.add_argument("--pack", action="store_true", help="do not train: make the embedded model")
    args = parser.parse_args()
    pack(args.work, args.out) if args.pack else train(args)


if __name__ == "__main__":
    main()
