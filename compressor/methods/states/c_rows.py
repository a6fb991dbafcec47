"""C rows of a Mamba-2 refitted to what the removed states contributed: gradient steps on a quadratic in C alone.

The states h_t do not depend on C. Let F_t be the (N + H, D) matrix of all that is read out of a group at token t: the
states of each channel and, for each head, the input u of its skip, all times the channels' gains. Reading with C' and
D' instead of C and D changes what reaches out_proj by e_t' F_t with e_t = (C'_t - C_t, D' - D), and its square is
e_t' S_t e_t with S_t = F_t F_t'. So once the S_t of some tokens are there, the rows of in_proj and the channels of
conv1d that make C_t = silu(conv1d(W x_t)) can be fitted without running the scan again, to the dense layer and no
labels. In a Mamba-1 C is linear in x and the same objective has a closed form (`repair`).

Several processes each keep the S_t of their own samples and take every step together, with the sum of their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F

from ssmc.compressor.calibration.placement import computing, device_of
from ssmc.compressor.methods.descent import Pace, descend, root_mean_square
from ssmc.compressor.methods.method import Job
from ssmc.compressor.methods.states.statistics import Chunk, Statistic
from ssmc.runtime.collectives import of_all, own, share_of, summed, summed_each
from ssmc.runtime.models.architectures.interface import HeadReaders
from ssmc.runtime.models.families import Readers

MOST_BYTES = 256 << 20  # of the matrices S_t of a layer
STEPS = 120
BATCH = 32  # stretches of a step
HELD_OUT = 8  # one stretch of so many is kept from the steps and judges them
RATE = 0.02  # of a parameter's root mean square a step, at the highest point of the schedule


@dataclass
class ReadoutGrams(Statistic):
    """S_t of some stretches of time of every sample, token by token."""

    heads: int  # of the group
    sampling: Sampling
    kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by first token: (B, T, N + H, N + H) each
    _seen: int = 0

    def add(self, chunk: Chunk) -> None:
        """Take in the states of a few samples."""
        every, held = self.sampling.every, sum(map(len, self.kept.get(chunk.start, [])))
        most = len(chunk.after) if self.sampling.samples is None else share_of(self.sampling.samples) - held
        if self._seen % every != every // 2 or most < 1:
            return
        gain = chunk.gain()[:, :, None, :]  # (B, T, 1, D)
        skip = (chunk.inputs.u.float()[:, :, None, :] * gain).flatten(0, 1)  # (B T, 1, D)
        own = torch.eye(self.heads, device=skip.device).repeat_interleave(skip.shape[2] // self.heads, dim=1)  # (H, D)
        read = torch.cat([(chunk.after * gain).flatten(0, 1), skip * own], dim=1)  # (B T, N + H, D)
        grams = (read @ read.transpose(1, 2)).unflatten(0, chunk.after.shape[:2])
        self.kept.setdefault(chunk.start, []).append(grams[:most].clone() if most < len(grams) else grams)

    @property
    def takes_weights(self) -> bool:
        """It sums squared errors."""
        return True

    def end_of_stretch(self) -> None:
        """Every sample of this stretch of time has been added."""
        self._seen += 1

    def pool(self) -> None:
        """Each process keeps those of its own samples."""

    def stretches(self) -> tuple[list[int], torch.Tensor]:
        """First tokens, and S_t as (stretches x samples, T, N + H, N + H), those of a shorter last stretch left out."""
        length = max(grams[0].shape[1] for grams in self.kept.values())
        starts = [start for start, grams in self.kept.items() if grams[0].shape[1] == length]
        return starts, torch.cat([grams for start in starts for grams in self.kept[start]])


@dataclass(frozen=True)
class Sampling:
    """Which tokens' matrices S_t are kept.

    Attributes:
        every: of so many stretches of each sample one.
        samples: the first ones of all processes; None: all.
    """

    every: int = 1
    samples: int | None = None


def what_fits(length: int, samples: int, stretch: int, size: int) -> Sampling:
    """So few stretches that the matrices S_t fit MOST_BYTES; where one of each sample is too much, fewer samples.

    Args:
        length: tokens of a sample.
        samples: how many there are.
        stretch: tokens of a stretch.
        size: N + H, rows of a matrix S_t.
    """
    fit, of_each = max(1, MOST_BYTES // (4 * size**2)), max(1, math.ceil(length / stretch))
    every = max(1, math.ceil(length * samples / fit))
    if every <= of_each:
        return Sampling(every)
    return Sampling(of_each, max(HELD_OUT, fit // min(stretch, length)))


@dataclass(frozen=True)
class CRowsFit:
    """What fitting achieved: squared errors of the gated read-out on stretches held out, relative to its energy."""

    error: float
    error_before: float
    skip_change: torch.Tensor  # (H,) to add to D


@torch.enable_grad()
def fit_c_rows(job: Job, group: int, statistic: ReadoutGrams, kept: Sequence[int]) -> CRowsFit:
    """Fit the C rows of the states that stay, in place; never for the worse on the held-out stretches.

    Args:
        job: the layer, with all its states, and what it reads; its seed orders the stretches.
        group: whose states they are.
        statistic: filled on what the layer reads.
        kept: states of the group that stay.
    """
    readers = cast(HeadReaders, job.architecture).readers(job.mixer, group)
    starts, grams = statistic.stretches()
    every = of_all(len(job.samples))
    samples = min(every, statistic.sampling.samples or every)
    own_samples = len(grams) // len(starts)
    windows = input_windows(job, starts, grams.shape[1], readers, own_samples)
    task = CRowsTask(windows, grams, readers, kept, samples)
    index = torch.as_tensor(list(kept), device=grams.device)
    tensors = [None if t is None else t[index] for t in vars(readers).values()]
    parameters = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    skip = torch.zeros(statistic.heads, device=grams.device, requires_grad=True)
    learnt = [p for p in parameters if p is not None] + [skip]
    sizes = [root_mean_square(p) for p in learnt[:-1]] + [root_mean_square(job.mixer.D)]
    generator = torch.Generator().manual_seed(job.seed)
    order = torch.randperm(len(starts) * samples, generator=generator)
    judges = order[: max(1, len(order) // HELD_OUT)]
    rest = order[len(judges) :] if len(order) > 1 else order

    def gradients() -> Sequence[torch.Tensor]:
        rows = rest[torch.randperm(len(rest), generator=generator)[:BATCH]]
        return summed_each(torch.autograd.grad(task.loss(rows, parameters, skip), learnt))

    fit = descend(
        learnt,
        gradients,
        lambda: task.error(judges, parameters, skip),
        Pace(STEPS, [RATE * size for size in sizes]),
        job.progress,
        f"{job.label}: C rows",
    )
    with torch.no_grad():
        for tensor, value in zip((t for t in vars(readers).values() if t is not None), learnt, strict=False):
            tensor[index] = value.detach().to(tensor)
    return CRowsFit(fit.error, fit.error_before, skip.detach())


class CRowsTask:
    """Stretches of tokens: what in_proj reads, what C should be, and what a wrong C costs.

    Stretches are numbered over the samples of all processes: the first one of every sample, then the second.

    Args:
        windows: (S, T + d_conv - 1, d_model + 1) what in_proj reads, of the stretches of this process.
        grams: (S, T, N + H, N + H) their S_t.
        readers: of the dense layer.
        kept: states that stay.
        samples: how many all processes have; None: there is one process.
    """

    def __init__(
        self,
        windows: torch.Tensor,
        grams: torch.Tensor,
        readers: Readers,
        kept: Sequence[int],
        samples: int | None = None,
    ):
        self.windows, self.grams, self.samples = windows, grams, len(grams) if samples is None else samples
        self.kept = torch.as_tensor(list(kept), device=grams.device)
        with torch.no_grad():
            C = self.read(slice(None), list(vars(readers).values()))  # (S, T, N)
            self.wanted = F.pad(C, (0, grams.shape[2] - C.shape[2]))
            self.energy = self._square(self.wanted, range(len(grams)))  # (S,)

    def read(self, rows: torch.Tensor | slice, tensors: Sequence[Any]) -> torch.Tensor:
        """C of some stretches, (S, T, K): silu(conv1d(in_proj(x))), nothing before the first token."""
        weight, in_bias, taps, bias = tensors
        windows = self.windows[rows]
        drive = windows[..., :-1] @ weight.float().t()  # (S, T + d_conv - 1, K)
        if in_bias is not None:
            drive = drive + windows[..., -1:] * in_bias.float()
        length = self.grams.shape[1]
        C = sum(taps[:, k].float() * drive[:, k : k + length] for k in range(taps.shape[1]))
        return F.silu(C if bias is None else C + bias.float())

    def loss(self, rows: torch.Tensor, tensors: Sequence[torch.Tensor | None], skip: torch.Tensor) -> torch.Tensor:
        """The squared error of those of some stretches that are this process's, relative to the energy of all."""
        mine = torch.tensor(self._own(rows.tolist()), dtype=torch.long)
        C = self.read(mine, tensors)
        wrong = (-self.wanted[mine]).index_add(2, self.kept, C)  # C' - C, where C' of the removed states is 0
        wrong = torch.cat([wrong[..., : -len(skip)], skip.expand(*wrong.shape[:2], -1)], dim=2)
        energy = summed(self.energy[mine].sum())
        return self._square(wrong, mine.tolist()).sum() / energy if energy > 0 else 0 * wrong.sum()

    @torch.no_grad()
    def error(self, rows: torch.Tensor, tensors: Sequence[torch.Tensor | None], skip: torch.Tensor) -> float:
        """The same as a number, of all processes."""
        return summed(float(self.loss(rows, tensors, skip)))

    def _own(self, rows: Sequence[int]) -> list[int]:
        """Of numbered stretches those of this process, as rows of its own."""
        found = []
        for row in rows:
            stretch, sample = divmod(row, self.samples)
            found += [stretch * share_of(self.samples) + number for number in own([sample])]
        return found

    def _square(self, vectors: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """sum over the tokens of some stretches of e' S e, (S,), for e (S, T, N + H)."""
        fixed = vectors.detach()
        # one stretch after the other, as picking them out of all would copy more than is computed
        products = torch.zeros_like(fixed)
        for product, row, e in zip(products, rows, fixed, strict=True):
            product.copy_((self.grams[row] @ e[..., None]).squeeze(-1))
        # S is symmetric, so the gradient is 2 S e: autograd need not multiply by S again
        return (2 * vectors * products - fixed * products).sum((1, 2))


@torch.no_grad()
def input_windows(
    job: Job, starts: Sequence[int], length: int, readers: Readers, samples: int | None = None
) -> torch.Tensor:
    """What in_proj reads at every stretch and the d_conv - 1 tokens before it, with a last column of ones where there
    is a token: (stretches x samples, T + d_conv - 1, d_model + 1); of the first samples, or of all."""
    before, device, windows = readers.taps.shape[1] - 1, device_of(job.work), []
    for start in starts:
        first = max(0, start - before)
        part = computing(job.samples[:samples, first : start + length].to(device))
        normed = cast(HeadReaders, job.architecture).read_by_in_proj(job.work, part).float()
        normed = F.pad(normed, (0, 1), value=1.0)
        windows.append(F.pad(normed, (0, 0, before - (start - first), 0)))
    return torch.cat(windows)
