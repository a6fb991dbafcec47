"""Train small models that solve multi-query associative recall (MQAR), on one core in minutes.

    python -m benchmarks.models.make_mqar mamba --out work/mqar-mamba
    python -m benchmarks.models.make_mqar mamba2 --out work/mqar-mamba2

The task is `ssmc.runtime.measure.mqar`: pairs of keys and values, then queries. Each batch has a number of pairs of its
own, as a model that can recall two pairs learns eight sooner than one that starts with eight. Every other batch asks at
every place, which teaches more a token. The Mamba-2 solves the task (99.8 % of the questions); for the Mamba-1 no
setting was found yet that does so within minutes. The seed decides the initial weights and the sequences; a run repeats
on the same machine.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import logging

from ssmc.runtime.measure.losses import IGNORED
from ssmc.runtime.measure.mqar import Mqar, ask, right_answers, summarised
from ssmc.runtime.models.fast import use_fast_scan

VOCAB, PAIRS, LENGTH = 64, 8, 64
BATCH = 16
STEPS = {"mamba": 1500, "mamba2": 1500}
PEAK, FLAT, WARM_UP = 4e-3, 0.7, 0.03  # learning rate; parts of the run that it stays up, and rises
D_MODEL, LAYERS = 64, 2
TASK = Mqar.of_vocabulary(VOCAB, PAIRS, LENGTH)


def new_model(kind: str, seed: int) -> nn.Module:
    """Random weights that recall a little from the start.

    A value stands behind its key. So what is written at a value must be labelled with the token before, and what is
    read at a query with the token itself. In the Mamba-2, conv1d adds up the last tokens, and C reads as B writes: a
    query finds the place behind its key more alike than others. From transformers' own initial weights it answered a
    third of the questions after 1,160 steps; from these, most after 420. In the Mamba-1 the two halves of the channels
    start with the same features, one half of the token, the other of the token before; C reads from the first as B
    writes from the second. Without these halves it did not solve the task within 3,000 steps; with them, most within
    200. Linear maps are drawn by their fan-in.

    Args:
        kind: "mamba" (16 states) or "mamba2" (32 states, 8 heads).
        seed: of the weights.
    """
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS}
    shared |= {"tie_word_embeddings": True, "rescale_prenorm_residual": False}
    shared |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(state_size=16, time_step_rank=4, **shared))
    else:
        sizes = {"state_size": 32, "head_dim": 16, "num_heads": 8, "n_groups": 1, "expand": 2, "chunk_size": LENGTH}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes, **shared))
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_(std=D_MODEL**-0.5)
        for block in model.backbone.layers:
            mixer = block.mixer
            for part in (mixer.in_proj, mixer.out_proj):
                part.weight.normal_(std=part.in_features**-0.5)
            if kind == "mamba":
                _recall_by_halves(mixer)
            else:
                mixer.conv1d.weight.abs_()
                first = 2 * mixer.intermediate_size  # behind the gate and the input
                B, C = mixer.in_proj.weight[first : first + 2 * mixer.ssm_state_size].chunk(2)
                C.copy_(B)
    return model


def _recall_by_halves(mixer: nn.Module) -> None:
    """Let one half of the channels of a Mamba-1 carry the token and the other the same features of the one before."""
    rank, channels = mixer.time_step_rank, mixer.intermediate_size
    half = channels // 2
    mixer.in_proj.weight[half:channels] = mixer.in_proj.weight[:half]
    taps = mixer.conv1d.weight[:, 0].mul_(0.1)  # (D, 4), the last of the token itself
    taps[:half, -1] += 1
    taps[half:, -2] += 1
    B, C = mixer.x_proj.weight[rank:].chunk(2)  # (16, D) each
    B.zero_()[:, half:].normal_(std=2 * half**-0.5)
    C.zero_()[:, :half] = B[:, half:]
    mixer.x_proj.weight[:rank] *= 0.1
    # the list is up to 60 tokens back, and what is read out of the states is to weigh as much as the skip
    mixer.A_log -= math.log(64)
    mixer.dt_proj.bias.fill_(math.log(math.expm1(0.1)))
    mixer.D.fill_(0.1)


def rate(part: float) -> float:
    """The learning rate when `part` of the run is over: a short warm-up, a flat stretch, half a cosine."""
    falling = max(0.0, (part - FLAT) / (1 - FLAT))
    return PEAK * min(1.0, part / WARM_UP) * 0.5 * (1 + math.cos(math.pi * falling))


def train(kind: str, seed: int = 0, steps: int | None = None, show: bool = False) -> nn.Module:
    """A model that was trained on the task."""
    model, steps = use_fast_scan(new_model(kind, seed)).train(), steps or STEPS[kind]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95))
    generator, start = torch.Generator().manual_seed(seed + 1), time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        pairs = int(torch.randint(2, PAIRS + 1, (1,), generator=generator))
        queries = None if step % 2 else LENGTH
        questions = ask(Mqar(TASK.keys, TASK.values, pairs, LENGTH * pairs // PAIRS), BATCH, generator, queries)
        asked = questions.targets != IGNORED
        logits = model.lm_head(model.backbone(questions.tokens).last_hidden_state[asked])
        loss = nn.functional.cross_entropy(logits.float(), questions.targets[asked])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if show and step % 250 == 0:
            print(f"{kind}: step {step}, {time.process_time() - start:.0f} s, loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    start = time.process_time()
    model = train(args.kind, args.seed, args.steps, show=True)
    seconds = time.process_time() - start
    questions = ask(TASK, 512, torch.Generator().manual_seed(args.seed + 1000))
    answers = summarised(questions, right_answers(model, questions))[0]
    print(f"{answers.accuracy:.2%} of {answers.asked:,} questions answered after {seconds:.0f} s of CPU time")
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
