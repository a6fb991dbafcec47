"""Constructed layers on which it is known what a score should say: states that resemble each other, and a rare one.

Both studies make the inputs of a scan, let the scores of `ssmc.compressor` choose the states that stay, and hold the
choice against the truth. The errors come from the normal matrix of the layer and are those of really running the scan
without the removed states (tests/bench/test_studies.py does that).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F

from ssmc.compressor import configure
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.states.elimination import evaluate
from ssmc.compressor.methods.states.score import ScoredGroup
from ssmc.compressor.methods.states.statistics import Chunk, NormalMatrix
from ssmc.compressor.methods.states.sums import Request
from ssmc.compressor.options.patterns import COLUMN
from ssmc.runtime.scan import ScanInputs, scan_states

RARE = 0  # the state that matters now and then
WRITTEN, READ, BOTH = KINDS = ("written rarely", "read rarely", "written and read rarely")  # B, C or both are else 0
ANY = "any set (mean)"  # what a random choice loses on average


@dataclass(frozen=True)
class Constructed:
    """Sizes of a constructed layer and how often it is drawn anew."""

    d_inner: int = 16
    d_state: int = 8
    length: int = 256
    samples: int = 4
    keep: int = 4
    seeds: int = 20


@dataclass(frozen=True)
class Uniformity(Constructed):
    """States from independent (0) to nearly copies of each other."""

    knobs: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97)


@dataclass(frozen=True)
class Rare(Constructed):
    """One state that acts at a part of the steps only, but carries `energy` times the output energy of another."""

    d_inner: int = 8
    length: int = 1000
    samples: int = 8
    seeds: int = 10
    rates: tuple[float, ...] = (0.005, 0.02, 0.1, 0.5)
    energy: float = 10.0
    vote_samples: tuple[int, ...] = (1, 8, 64)  # the vote adds up samples before it votes


UNIFORMITY_SCORES = (
    "sparsessm-l2",
    "sparsessm",
    "sparsessm-vote",
    "ghost",
    "energy",
    "exact",
)
RARE_SCORES = ("magnitude", "sparsessm", "sparsessm-l2", "ghost", "energy", "exact")


def uniform_layer(study: Uniformity, knob: float, seed: int) -> ScanInputs:
    """A layer whose B rows and A columns lie at `knob` of the way from independent to one common row and column.

    C is no part of the knob: its rows have a mean of their own, as in a Mamba, where C is linear in u = silu(...) and
    the mean of u is not zero. States that are alike then add to or cancel each other in the output.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (study.samples, study.length)
    A_log = math.log(4) + 0.7 * torch.randn(study.d_inner, study.d_state, generator=g)
    common_A_log = math.log(4) + 0.7 * torch.randn(study.d_inner, 1, generator=g)
    B = torch.randn(*shape, study.d_state, generator=g)
    common_B = torch.randn(*shape, 1, generator=g)
    mean = torch.randn(study.d_state, generator=g)
    C = mean + torch.randn(*shape, study.d_state, generator=g)
    A = -torch.exp(A_log.lerp(common_A_log.expand_as(A_log), knob))
    return _inputs(g, A, B.lerp(common_B.expand_as(B), knob), C)


def rare_layer(study: Rare, rate: float, kind: str, samples: int, seed: int) -> ScanInputs:
    """A layer whose state RARE is written (B), read (C), or both at a part `rate` of the steps only, strongly then.

    All states decay alike, so |A_log| says nothing. The strength is such that at every rate the state carries about
    `study.energy` times the output energy of another one: it goes with rate^(-1/2), with rate^(-1/4) for B and C each.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (samples, study.length, study.d_state)
    A = -4 * torch.exp(0.1 * torch.randn(study.d_inner, study.d_state, generator=g))
    B, C = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    events = max(1, round(rate * study.length))  # of each sample, at steps of its own
    active = torch.rand(shape[:2], generator=g).argsort(1) < events
    strength = active * (study.energy * study.length / events) ** (0.25 if kind == BOTH else 0.5)
    for factor in {WRITTEN: (B,), READ: (C,), BOTH: (B, C)}[kind]:
        factor[..., RARE] *= strength
    return _inputs(g, A, B, C)


def _inputs(g: torch.Generator, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> ScanInputs:
    shape = (*B.shape[:2], A.shape[0])
    u = F.silu(torch.randn(shape, generator=g))
    dt = F.softplus(torch.randn(shape, generator=g) - 1)
    z = torch.randn(shape, generator=g)
    return ScanInputs(u=u, dt=dt, A=A, B=B, C=C, D=torch.ones(A.shape[0]), z=z)


def uniformity_cells(study: Uniformity) -> list[tuple[float, int]]:
    """(knob, seed) of every layer."""
    return [(knob, seed) for knob in study.knobs for seed in range(study.seeds)]


def uniformity_rows(study: Uniformity, knob: float, seed: int) -> list[dict]:
    """Every score's choice on one layer against the best of all subsets, without and with repair."""
    chunk = _chunk(uniform_layer(study, knob, seed))
    G = _normal(chunk)
    subsets = list(combinations(range(study.d_state), study.keep))
    results = {kept: evaluate(G, kept, repair=True) for kept in subsets}
    rows = []
    for repair in (False, True):
        errors = {kept: r.error if repair else r.error_unrepaired for kept, r in results.items()}
        best = min(errors, key=errors.get)
        case = {"knob": knob, "seed": seed, "repair": repair, "correlation": _correlation(chunk)}
        case["best_error"] = errors[best]
        for score in UNIFORMITY_SCORES:
            kept = _choose(_layer(score, chunk, study.keep, repair), score, study.keep, repair)
            rows.append({**case, "score": score, "kept": list(kept), "error": errors[kept]})
        rows.append({**case, "score": ANY, "kept": None, "error": sum(errors.values()) / len(errors)})
    return [row | {"ratio": row["error"] / row["best_error"]} for row in rows]


def rare_cells(study: Rare) -> list[tuple[str, float, int]]:
    """(kind, rate, seed) of every layer."""
    return [(kind, rate, seed) for kind in KINDS for rate in study.rates for seed in range(study.seeds)]


def rare_rows(study: Rare, kind: str, rate: float, seed: int) -> list[dict]:
    """Where each score ranks the rare state, 1 the dearest, and what its choice of `keep` states loses."""
    rows = []
    chunk = _chunk(rare_layer(study, rate, kind, study.samples, seed))
    G = _normal(chunk)
    others = [n for n in range(study.d_state) if n != RARE]
    case = {"kind": kind, "rate": rate, "seed": seed, "alone": evaluate(G, others, repair=False).error_unrepaired}
    for score in RARE_SCORES:
        rows.append({**case, "score": score, **_judged(score, chunk, G, study)})
    for samples in study.vote_samples:
        chunk = _chunk(rare_layer(study, rate, kind, samples, seed))
        judged = _judged("sparsessm-vote", chunk, _normal(chunk), study)
        rows.append({**case, "score": f"sparsessm-vote, samples: {samples}", **judged})
    return rows


def _judged(score: str, chunk: Chunk, G: torch.Tensor, study: Rare) -> dict:
    layer = _layer(score, chunk, study.keep, repair=False)
    sizes = range(1, study.d_state)
    rank = next((k for k in sizes if RARE in _choose(layer, score, k, repair=False)), study.d_state)
    kept = _choose(layer, score, study.keep, repair=False)
    return {"rank": rank, "kept": list(kept), "error": evaluate(G, kept, repair=False).error_unrepaired}


def _chunk(inputs: ScanInputs) -> Chunk:
    return Chunk(0, inputs, scan_states(inputs))


def _normal(chunk: Chunk) -> torch.Tensor:
    normal = NormalMatrix()
    normal.add(chunk)
    return normal.dense()


def _layer(score: str, chunk: Chunk, keep: int, repair: bool) -> ScoredGroup:
    """What the score may look at, collected as `compress` does."""
    config = configure(model="constructed", score=score, repair=repair)
    A_log = torch.log(-chunk.inputs.A)
    sums = registered(COLUMN, score).statistics(Request(config, A_log, keep, chunk.inputs.length))
    for statistic in sums.values():
        statistic.add(chunk)
        statistic.end_of_stretch()
    return ScoredGroup(0, A_log, sums, repair)


def _choose(layer: ScoredGroup, score: str, keep: int, repair: bool) -> tuple[int, ...]:
    return tuple(registered(COLUMN, score).choose(replace(layer, repair=repair), keep))


def _correlation(chunk: Chunk) -> float:
    """Mean |correlation| of two states over samples, time and channels."""
    h = chunk.after.transpose(2, 3).flatten(0, 2).double()  # (B T D, N)
    c = torch.corrcoef(h.t())
    n = len(c)
    return float((c.abs().sum() - n) / (n * (n - 1)))
