"""What the sections of gpu.py share: sizes, rows, random models, and timing from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.bench import summary
from ssmc.runtime.measure.timing import Timing, interleave, paired_ratio
from ssmc.runtime.models.generation.cuda_graphs import capture
from ssmc.runtime.sparse24.cuda import first_line


@dataclass(frozen=True)
class Row:
    """One line of the table; `before` and `after` are what `ratio` compares."""

    what: str
    before: str = ""
    after: str = ""
    ratio: str = ""
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults are the real sizes."""

    d_model: int = 2560  # of the 2:4 sections
    layers: int = 8  # of the 2:4 model: enough to see a layer's share, few enough for any GPU
    tokens: int = 4096
    steps: tuple[int, ...] = (1, 8, 64, 256)  # sequences decoded at once
    small_d_model: int = 768
    small_layers: int = 24
    vocab: int = 50280
    nsamples: int = 64
    seqlen: int = 2048
    lengths: tuple[int, ...] = (512, 2048)
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    max_batch: int | None = None
    repeats: int = 15
    budget: float = 120.0
    decode_d_model: int = 512  # a 22 M Mamba
    decode_layers: int = 12
    decode_vocab: int = 4096
    decode_batches: tuple[int, ...] = (1, 64, 256)
    decode_tokens: int = 100
    refine_steps: int = 3


TOY = Sizes(64, 2, 64, (1, 8), 64, 2, 4096, 2, 64, (16,), (1,), 2, 6, 0.5, 32, 2, 64, (1, 8), 4, 2)


def mamba(d_model: int, layers: int, vocab: int, d_state: int = 16) -> MambaForCausalLM:
    """A stock Mamba of random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab, "hidden_size": d_model, "num_hidden_layers": layers, "state_size": d_state}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def timed(
    ways: dict[str, list[Callable[[], torch.Tensor]]], device: torch.device, sizes: Sizes, refused: dict[str, str]
) -> tuple[dict[str, Timing], str]:
    """Time the calls of every way one after the other; seconds a call, and what to note.

    A way that does not run goes to `refused`. Unless all can be recorded as CUDA graphs, none is.
    """
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for way, calls in ways.items():
        try:
            runs[way] = in_a_row(calls)
            runs[way]()
        except (RuntimeError, NotImplementedError) as error:
            refused[way] = first_line(error)
            del runs[way]
    note = ""
    if device.type == "cuda":
        try:
            runs = {way: capture(run, device) for way, run in runs.items()}
        except RuntimeError as error:
            note = f"launches included: {first_line(error)}"
    timings = interleave(runs, device, sizes.repeats, sizes.budget / 60)
    return {way: per_call(timing, len(ways[way])) for way, timing in timings.items()}, note


def in_a_row(calls: list[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    @torch.inference_mode()
    def run() -> torch.Tensor:
        return [call() for call in calls][-1]

    return run


def per_call(timing: Timing, count: int) -> Timing:
    return Timing(tuple(seconds / count for seconds in timing.seconds), timing.calls * count)


def compared(what: str, before: Timing, after: Timing, note: str = "") -> Row:
    """Interleaved timings."""
    ratio = summary.format_ratio(paired_ratio(before, after))
    return Row(what, summary.format_timing(before), summary.format_timing(after), ratio, note)


@torch.no_grad()
def make_24(linear: nn.Linear) -> nn.Linear:
    """Keep the two largest of every four weights."""
    groups = linear.weight.view(-1, 4)
    lowest = groups.abs().topk(2, dim=1, largest=False).indices
    groups.scatter_(1, lowest, 0)
    return linear
