"""Does the saliency hold where there is no language? A small vision Mamba on handwritten digits, pruned.

    python -m benchmarks.loss.digits  # needs scikit-learn, which comes with ssmc[eval]
    python -m benchmarks.loss.digits --seeds 0 --epochs 4 --out digits.json

scikit-learn's digits: 8 x 8 pixels, read two by two from top to bottom (32 tokens), forwards and backwards by the same
layers: transformers' own Mamba mixers, each called twice a forward, then a mean over the tokens and a linear head. Each
seed trains its own model on its own split; its mixers are pruned by `ssmc.compress(module, batches)` on training images
and no labels, and judged on images neither training nor calibration saw: accuracy, and excess cross-entropy in nats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

from benchmarks.reporting import print_conditions
from ssmc import compress
from ssmc.runtime.models.fast import use_fast_scan

SCORES = ("exact", "ghost", "energy", "sparsessm", "sparsessm-vote", "random", "magnitude")
TRAIN, CALIBRATION = 1200, 128  # images; the others, 597, judge. Calibration images are training images.


class PixelMamba(nn.Module):
    """Digits from pixels: no words, no causal head, two directions; of Mamba-1 mixers, or of Mamba-2 mixers."""

    def __init__(self, kind: str = "mamba"):
        super().__init__()
        sizes = {"hidden_size": 48, "state_size": 16, "num_hidden_layers": 4, "vocab_size": 1, "use_cache": False}
        self.patch, self.position = nn.Linear(2, 48), nn.Parameter(0.02 * torch.randn(32, 48))
        if kind == "mamba2":
            heads = {"num_heads": 12, "head_dim": 8, "n_groups": 1, "chunk_size": 32}
            self.backbone = Mamba2Model(Mamba2Config(**sizes, **heads))
        else:
            self.backbone = MambaModel(MambaConfig(**sizes, time_step_rank=3))
        self.config = self.backbone.config
        self.head = nn.Linear(48, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) from images (B, 64) in [0, 1]."""
        tokens = self.patch(images.unflatten(1, (32, 2))) + self.position  # (B, 32, 48)
        both = [self.backbone(inputs_embeds=t).last_hidden_state for t in (tokens, tokens.flip(1))]
        return self.head(sum(both).mean(1) / 2)


@dataclass(frozen=True)
class Split:
    """Images (n, 64) and labels (n,)."""

    images: torch.Tensor
    labels: torch.Tensor
    unseen: torch.Tensor
    unseen_labels: torch.Tensor

    @classmethod
    def drawn(cls, seed: int) -> Split:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
        images, labels = torch.tensor(data.data).float()[order] / 16, torch.tensor(data.target)[order]
        return cls(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])

    def calibration(self) -> list[torch.Tensor]:
        return list(self.images[:CALIBRATION].split(64))


def train(split: Split, seed: int, epochs: int, kind: str = "mamba") -> PixelMamba:
    torch.manual_seed(seed)
    model = use_fast_scan(PixelMamba(kind)).train()
    steps = epochs * -(-TRAIN // 48)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=6e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(48):
            loss = F.cross_entropy(model(split.images[rows]), split.labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def judged(model: nn.Module, split: Split) -> dict[str, float]:
    logits = torch.cat([model(batch) for batch in split.unseen.split(100)])
    right = (logits.argmax(1) == split.unseen_labels).float().mean()
    return {"accuracy": float(right), "nats": float(F.cross_entropy(logits, split.unseen_labels))}


def pruned(model: PixelMamba, split: Split, seed: int, sparsities: list[float]) -> Iterator[dict]:
    dense = judged(model, split)
    yield {"seed": seed, "score": None, "sparsity": 0.0, "repair": False, **dense, "excess_nats": 0.0}
    cases = [(score, part, repair) for score in SCORES for part in sparsities for repair in (False, True)]
    for score, sparsity, repair in cases:
        result = compress(model, split.calibration(), score=score, sparsity=sparsity, repair=repair, seed=seed)
        assert not result.notes, result.notes
        got = judged(result.module, split)
        row = {"seed": seed, "score": score, "sparsity": sparsity, "repair": repair, **got}
        errors = [mixer.layer.error for mixer in result.mixers]
        yield row | {"excess_nats": got["nats"] - dense["nats"], "states": result.mixers[0].states[1], "errors": errors}


def one_model(seed: int, epochs: int, sparsities: list[float]) -> dict:
    """Train, prune and judge the model of one seed."""
    torch.set_num_threads(1)
    split, start = Split.drawn(seed), time.process_time()
    model = train(split, seed, epochs)
    seconds, sizes = time.process_time() - start, sum(p.numel() for p in model.parameters())
    print(
        f"seed {seed}: {seconds:.0f} s of processor time, unseen digits {judged(model, split)['accuracy']:.1%}",
        flush=True,
    )
    rows = list(pruned(model, split, seed, sparsities))
    return {"rows": rows, "training_s": seconds, "parameters": sizes, "unseen": len(split.unseen)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.25, 0.5, 0.75, 0.875])
    parser.add_argument("--processes", type=int, default=1, help="seeds that are worked on together")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/digits.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    now = print_conditions()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        work = partial(one_model, epochs=args.epochs, sparsities=args.sparsities)
        parts = list(pool.map(work, args.seeds))
    rows = [row for part in parts for row in part["rows"]]
    settings = {
        "seeds": args.seeds,
        "epochs": args.epochs,
        "train": TRAIN,
        "calibration": CALIBRATION,
        "processes": args.processes,
    }
    settings |= {"training_s": [part["training_s"] for part in parts]}
    settings |= {name: parts[0][name] for name in ("parameters", "unseen")}
    report = {"conditions": asdict(now), "settings": settings, "rows": rows}
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for field, title, form in (
        ("accuracy", "accuracy on unseen digits", "{:.1%}"),
        ("excess_nats", "excess cross-entropy, nats", "{:.3f}"),
    ):
        print_table(
            rows, args.sparsities, field, f"{title}, mean of {len(args.seeds)} models (lowest to highest)", form
        )


def print_table(rows: list[dict], sparsities: list[float], field: str, title: str, form: str) -> None:
    dense = [row[field] for row in rows if row["score"] is None]
    table = Table(title=f"{title}; dense {form.format(statistics.mean(dense))}")
    for heading in ("score", *(f"{s:.1%}{way}" for s in sparsities for way in ("", " + repair"))):
        table.add_column(heading)
    for score in SCORES:
        cells = []
        for sparsity in sparsities:
            for repair in (False, True):
                key = {"score": score, "sparsity": sparsity, "repair": repair}
                values = [row[field] for row in rows if key.items() <= row.items()]
                cells.append(
                    f"{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})"
                )
        table.add_row(score, *cells)
    Console(width=220).print(table)


if __name__ == "__main__":
    main()
