"""States of a trained Mamba-3 removed by every score, with and without the repair.

    python -m benchmarks.loss.mamba3            # a minute or two; needs the package mamba3-ssm

A mixer of the package mamba3-ssm is trained on a toy task for a minute: pairs of a key and a value are shown, then the
keys alone in another order, and the value of each is asked for. It is then pruned in memory, as any torch module, and
asked again on sequences that it was neither trained nor calibrated on.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import ssmc
from benchmarks.reporting import print_conditions
from ssmc.compressor.torch_module.mamba3 import SCORES

KEYS, PAIRS, WIDTH = 24, 10, 32  # keys and values there are, pairs of a sequence, d_model
SIZES = {"d_model": WIDTH, "d_state": 32, "headdim": 16, "expand": 2}
BATCH, CALIBRATION, HELD_OUT = 64, 256, 1024  # sequences
SHARES = (0.5, 0.75)  # of the states that go


class Recaller(nn.Module):
    """Tokens (B, L, 2) of a key and a value, the last value meaning "asked", to logits of values (B, L, KEYS)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS, WIDTH), nn.Embedding(KEYS + 1, WIDTH)
        self.norm, self.mixer, self.head = nn.LayerNorm(WIDTH), mixer, nn.Linear(WIDTH, KEYS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.norm(self.key(tokens[..., 0]) + self.value(tokens[..., 1]))))


def sequences(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (count, 2 PAIRS, 2), and the values that are asked for in the second half, (count, PAIRS)."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = torch.randint(KEYS, (count, PAIRS), generator=generator)
    order = torch.rand(count, PAIRS, generator=generator).argsort(1)
    shown = torch.stack([keys, values], -1)
    asked = torch.stack([keys.gather(1, order), torch.full((count, PAIRS), KEYS)], -1)
    return torch.cat([shown, asked], 1), values.gather(1, order)


def train(seconds: float) -> tuple[nn.Module, int]:
    """A model that learned the task for so long, and its steps."""
    from mamba3_ssm import Mamba3

    torch.manual_seed(0)
    model, generator, begun, steps = Recaller(Mamba3(**SIZES)), torch.Generator().manual_seed(1), time.monotonic(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    while (part := (time.monotonic() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, 0.02 + 20 * part) * (1 - part)
        tokens, wanted = sequences(BATCH, generator)
        loss = F.cross_entropy(model(tokens)[:, PAIRS:].flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return model.eval(), steps


@torch.no_grad()
def measure(model: nn.Module, tokens: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Loss in nats an answer, and the part of answers that are right."""
    logits = model(tokens)[:, PAIRS:]
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return {"loss": float(loss), "right": float((logits.argmax(-1) == wanted).float().mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75, help="of training")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mamba3.json"))
    args = parser.parse_args()
    now, rows = print_conditions(), []
    model, steps = train(args.seconds)
    generator = torch.Generator().manual_seed(2)
    calibration = [sequences(BATCH, generator)[0] for _ in range(CALIBRATION // BATCH)]
    held_out = sequences(HELD_OUT, generator)
    dense = measure(model, *held_out)
    for share in SHARES:
        for score in SCORES:
            for repair in (False, True):
                options: dict[str, Any] = {"sparsity": share, "score": score, "repair": repair}
                result = ssmc.compress(model, calibration, **options)
                states = result.mixers[0].states[1]
                rows.append({**options, "states": states, **measure(result.module, *held_out)})
    report = {
        "task": {"keys": KEYS, "pairs": PAIRS, "calibration": CALIBRATION, "held_out": HELD_OUT},
        "mixer": SIZES,
        "steps": steps,
        "dense": dense,
        "rows": rows,
        "conditions": asdict(now),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report)


def show(report: dict[str, Any]) -> None:
    """The rows as a table."""
    dense = report["dense"]
    title = f"Mamba-3, {report['mixer']['d_state']} states: loss {dense['loss']:.3f}, {dense['right']:.1%} right"
    table = Table("states left", "score", "loss", "right", "loss, repaired", "right", title=title)
    for plain, repaired in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        figures = [text for row in (plain, repaired) for text in (f"{row['loss']:.3f}", f"{row['right']:.1%}")]
        table.add_row(str(plain["states"]), plain["score"], *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
