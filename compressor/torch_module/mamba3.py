"""States of Mamba-3 mixers: which go, and what makes up for them.

What is read out of a Mamba-3 is a sum over states, so Q[n, m] = sum over tokens and channels of what states n and m add
to the gated output gives the error of removing any set, as for a Mamba-2. States that turn together go together. Then

- rows of B and C are scaled against each other, as in a Falcon-Mamba, so that the mean squares that are left under the
  norms follow those of all states, and the norms' weights take the constant part of what remains;
- the read-out of each pair, and of each state that stands still, is scaled by least squares, by its weight of C's norm
  and its bias of C;
- out_proj is fitted to what the dense mixer puts out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ssmc.compressor.methods.method import LayerResult
from ssmc.compressor.methods.ridge import fit, ridged, solve
from ssmc.compressor.methods.states.counts import states_to_keep
from ssmc.compressor.methods.states.elimination import SCALED_RIDGE
from ssmc.compressor.methods.states.normed import TOKENS, fit_scales
from ssmc.compressor.methods.states.prune import StatesRecord
from ssmc.compressor.methods.states.ranking import random_importance
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import COLUMN
from ssmc.compressor.torch_module.forward import SEQUENCES, Call, Use, WatchedModule, close, same
from ssmc.compressor.torch_module.mixer import SHARES, MixerResult, in_order, sharing
from ssmc.compressor.torch_module.restore import Restorer
from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.models.mamba3 import (
    FAMILY,
    RULES,
    Mamba3Mixer,
    Rules,
    Sizes,
    Step,
    cut_states,
    put_out,
    raw_readers,
    read_sizes,
    steps,
)
from ssmc.runtime.progress import NO_PROGRESS, Progress

SCORES = ("exact", "energy", "ghost", "random")
"""Scores of states that say something of a Mamba-3, whose A comes from the data."""

_OTHERWISE = (
    "has the parameters of a Mamba-3, but its forward computes something else than mamba_ssm or mamba3-ssm (a norm "
    "before out_proj, for one)"
)


def check_options(config: CompressConfig) -> None:
    """Refuse what does not go with Mamba-3 mixers, before any work.

    Raises:
        UsageError: naming what can be used.
    """
    if config.parts != (COLUMN,):
        raise UsageError(f"Of Mamba-3 mixers only states are removed, not {config.pattern}. Use the pattern column.")
    if config.score_of(COLUMN) not in SCORES:
        raise UsageError(
            f"The score {config.score_of(COLUMN)} goes by A_log, and a Mamba-3 has none: its A comes from the "
            f"data. Use {', '.join(SCORES)}."
        )
    if config.refine:
        raise UsageError("There are no gradient steps for Mamba-3 mixers. Leave refine out.")


@torch.no_grad()
def prune_mamba3(
    watched: WatchedModule,
    mixers: Sequence[Mamba3Mixer],
    config: CompressConfig,
    restorer: Restorer | None,
    first: int = 0,
) -> list[MixerResult]:
    """Prune Mamba-3 mixers in place, in the order they are first called.

    Args:
        watched: the module and its batches.
        mixers: in it.
        config: the run.
        restorer: told how to take changes of shape back.
        first: number of the first of them among all mixers of the module.
    """
    agreed: dict[str, list[Rules]] = {mixer.name: list(RULES) for mixer in mixers}
    uses = watched.look(mixers, lambda mixer: _agreement(mixer, agreed[mixer.name]))
    order, shared = in_order(mixers, uses), sharing(mixers)
    for index, mixer in enumerate(order):
        if agreed[mixer.name]:
            _Pruner(mixer, agreed[mixer.name][0], config, (), first + index).check()
    done = []
    for index, mixer in enumerate(order):
        use = uses.get(mixer.name, Use())
        note = use.reason_to_leave(SEQUENCES, _OTHERWISE)
        if note is None and mixer.name in shared:
            note = SHARES
        if note is not None:
            size = (mixer.sizes.states,) * 2
            done.append(MixerResult(mixer.name, FAMILY, size, (mixer.sizes.d_inner,) * 2, note=note))
            continue
        label = f"mixer {index + 1}/{len(order)}"
        pieces = list(watched.inputs(mixer, use.calls, f"{label}: inputs"))
        pruner = _Pruner(mixer, agreed[mixer.name][0], config, pieces, first + index, label, watched.progress)
        done.append(pruner.prune(watched, use.calls, restorer))
    return done


def _agreement(mixer: Mamba3Mixer, rules: list[Rules]) -> Callable[[Call, torch.Tensor], bool]:
    """Leaves those rules by which a mixer computes what it puts out."""

    def agrees(call: Call, own: torch.Tensor) -> bool:
        if hasattr(mixer.module, "norm"):  # before out_proj: what states add is no sum then
            rules.clear()
        rules[:] = [rule for rule in rules if close(own, put_out(mixer.module, mixer.sizes, rule, call.hidden))]
        return bool(rules)

    return agrees


@dataclass(frozen=True)
class Units:
    """Pairs of states that turn together, and states that stand still, each a unit.

    Attributes:
        members: the states of each unit; pairs come first.
        pairs: how many are pairs.
    """

    members: tuple[tuple[int, ...], ...]
    pairs: int

    @classmethod
    def of(cls, sizes: Sizes, rules: Rules) -> Units:
        """Of a mixer."""
        pairs = rules.pairs(sizes)
        still = sorted(set(range(sizes.states)) - {state for pair in pairs for state in pair})
        return cls((*pairs, *((state,) for state in still)), len(pairs))

    def summing(self, states: int) -> torch.Tensor:
        """(units, N) that sums states up to their units."""
        out = torch.zeros(len(self.members), states, dtype=torch.float64)
        for unit, members in enumerate(self.members):
            out[unit, list(members)] = 1
        return out

    def counts(self, keep: int) -> tuple[int, int]:
        """Pairs and single states that stay where about `keep` states do: the same share of both, at least one pair.

        Implementations know the part that turns as a share of the states, a half or all.
        """
        pairs = max(1, round(keep * self.pairs / (len(self.members) + self.pairs)))
        return pairs, self.singles(pairs)

    def singles(self, pairs: int) -> int:
        """Single states that stay beside so many pairs."""
        return round((len(self.members) - self.pairs) * pairs / self.pairs)


def choose(units: Units, quota: tuple[int, int], Q: torch.Tensor, scaled: bool) -> list[int]:
    """The units that stay, ascending, by backward elimination within pairs and within single states.

    Args:
        units: of the mixer.
        quota: how many pairs and how many single states stay.
        Q: (units, units) as `states.elimination.eliminate_scaled` has it.
        scaled: whether the units that stay are scaled to make up for the others.
    """
    left: list[int] = list(range(len(Q)))
    gone: list[int] = []
    H, a = torch.linalg.inv(ridged(Q, SCALED_RIDGE)), torch.ones(len(Q), dtype=Q.dtype)
    while True:
        of_pairs = [unit for unit in left if unit < units.pairs]
        single = [unit for unit in left if unit >= units.pairs]
        able = (of_pairs if len(of_pairs) > quota[0] else []) + (single if len(single) > quota[1] else [])
        if not able:
            return left
        costs = a.square() / H.diagonal() if scaled else Q.diagonal() + 2 * Q[:, gone].sum(1)
        # a pair is two states: what one costs counts
        j = min(able, key=lambda unit: (float(costs[unit]) / len(units.members[unit]), unit))
        left.remove(j)
        gone.append(j)
        if scaled:
            column = H[:, j] / H[j, j]
            a, H = a - column * a[j], H - torch.outer(column, H[j])


@dataclass(frozen=True)
class _Pruner:
    """One mixer, and what it reads: sequences (n, L, d_model)."""

    mixer: Mamba3Mixer
    rules: Rules
    config: CompressConfig
    pieces: Sequence[torch.Tensor]
    index: int
    label: str = ""
    progress: Progress = NO_PROGRESS

    def prune(self, watched: WatchedModule, calls: int, restorer: Restorer | None) -> MixerResult:
        """Choose, cut, repair; leave the mixer as it was where its own forward then fails."""
        own, sizes = self.mixer.module, self.mixer.sizes
        units = Units.of(sizes, self.rules)
        quota = units.counts(self._wanted())
        dense = copy.deepcopy(own)
        stay = self._choose(units, quota)
        kept = self.rules.in_order([units.members[unit] for unit in stay])
        left = len(kept)
        result = MixerResult(self.mixer.name, FAMILY, (sizes.states,) * 2, (sizes.d_inner,) * 2)
        try:
            undo = cut_states(self.mixer, self.rules, kept)
        except (AttributeError, TypeError) as error:
            return replace(result, note=f"cannot be told that it has {left} states ({error}), so it is left as it is")
        record = self._make_up(dense, kept)
        try:
            outputs = watched.outputs(self.mixer, calls)
            smaller = read_sizes(own)
            agree = smaller is not None and same(outputs[:1], [put_out(own, smaller, self.rules, self.pieces[0])])
            problem = None if agree else "puts out something else"
        except CalibrationError as error:
            problem = f"fails ({error.__cause__})"
        if problem is not None:
            undo()
            own.load_state_dict(dense.state_dict())
            return replace(result, note=f"its own forward {problem} with {left} states, so it is left as it is")
        if restorer is not None:
            restorer.remember(undo)
        layer = LayerResult(tuple(sorted(kept)), None, (record,))
        return replace(result, states=(sizes.states, left), layer=layer, cuts=undo.cuts)

    def check(self) -> None:
        """Refuse to remove nothing.

        Raises:
            UsageError: with the least that can go.
        """
        units, states = Units.of(self.mixer.sizes, self.rules), self.mixer.sizes.states
        if self.config.states or units.counts(self._wanted())[0] < units.pairs:
            return
        least = 1 - (2 * units.pairs - 2 + units.singles(units.pairs - 1)) / states
        able = f"the least that can go is a sparsity of {least:.3g}" if units.pairs > 1 else "there is one pair"
        raise UsageError(
            f"sparsity {self.config.sparsity_of(COLUMN):g} of {states} states removes none: those that turn go in "
            f"pairs, and as large a part of the others; {able}."
        )

    def _wanted(self) -> int:
        """About how many states stay."""
        wanted = self.config.states[self.index] if self.config.states else None
        return wanted or states_to_keep(self.mixer.sizes.states, self.config.sparsity_of(COLUMN), self.config.round_to)

    def _choose(self, units: Units, quota: tuple[int, int]) -> list[int]:
        """The units that stay."""
        sizes, name = self.mixer.sizes, self.config.score_of(COLUMN)
        summing = units.summing(sizes.states)
        if name == "random":
            importance = random_importance((len(units.members),), self.index, self.config.seed).double()
        else:
            Q, h, c = self._sums()
            if name == "exact":
                return choose(units, quota, summing @ Q @ summing.t(), self.config.repair)
            importance = summing @ (Q.diagonal() if name == "energy" else h * c)
        order = importance.argsort(descending=True, stable=True).tolist()
        of_pairs = [unit for unit in order if unit < units.pairs][: quota[0]]
        return sorted(of_pairs + [unit for unit in order if unit >= units.pairs][: quota[1]])

    def _sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Q (N, N), and sums of squares of states and of C, (N,) each."""
        N = self.mixer.sizes.states
        Q, h, c = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N).double(), torch.zeros(N).double()
        for i, piece in enumerate(self.pieces):
            self.progress(f"{self.label}: states", i, len(self.pieces))
            for step in steps(self.mixer.module, self.mixer.sizes, self.rules, piece):
                read = step.read.flatten(0, 2)
                Q += (read.t() @ read).double().cpu()
                h += step.states.square().sum((0, 1, 2)).double().cpu()
                c += step.C.square().sum((0, 1, 2)).double().cpu()
        return Q, h, c

    def _make_up(self, dense: nn.Module, kept: Sequence[int]) -> StatesRecord:
        """Make up for the states that went, in the mixer that is cut already."""
        smaller = read_sizes(self.mixer.module)
        assert smaller is not None
        unrepaired = self._error(dense, smaller)
        if not self.config.repair:
            return StatesRecord(unrepaired, unrepaired)
        spread = self._follow_norms(dense, smaller, kept)
        self._scale(dense, smaller)
        error = self._error(dense, smaller)
        self._fit_out_proj(dense, smaller)
        return StatesRecord(error, unrepaired, True, spread)

    def _both(self, dense: nn.Module, smaller: Sizes) -> Iterator[tuple[Step, Step]]:
        """Steps of the dense mixer and of the smaller one."""
        for i, piece in enumerate(self.pieces):
            self.progress(f"{self.label}: repair", i, len(self.pieces))
            yield from zip(
                steps(dense, self.mixer.sizes, self.rules, piece),
                steps(self.mixer.module, smaller, self.rules, piece),
                strict=True,
            )

    def _error(self, dense: nn.Module, smaller: Sizes) -> float:
        """Squared error of what is read out of the states and gated, relative to its energy."""
        error = energy = 0.0
        for whole, part in self._both(dense, smaller):
            target = whole.read.sum(-1)
            error += float((target - part.read.sum(-1)).double().square().sum())
            energy += float(target.double().square().sum())
        return error / energy if energy > 0 else 0.0

    def _follow_norms(self, dense: nn.Module, smaller: Sizes, kept: Sequence[int]) -> float:
        """Scale rows of B and C so that the norms' means follow those of all states; how far they still vary."""
        own, sizes = self.mixer.module, self.mixer.sizes
        hidden = torch.cat([piece.flatten(0, 1) for piece in self.pieces])[None]
        hidden = hidden[:, :: max(1, hidden.shape[1] // TOKENS)]
        squares = [raw.flatten(0, -2).double().square() for raw in raw_readers(dense, sizes, hidden)]
        stay = [square[:, list(kept)] for square in squares]
        changes = []
        scales = fit_scales(stay[0], stay[1], squares[0], squares[1], tied=False)
        rows = [own.in_proj.weight.split(smaller.splits)[place] for place in (2, 3)]
        for row, norm, scale, part, whole in zip(rows, (own.B_norm, own.C_norm), scales, stay, squares, strict=True):
            row.unflatten(0, (-1, len(kept))).mul_(scale[:, None].to(row))
            ratio = (part * scale.square()).mean(1) / whole.mean(1)
            change = ratio.clamp_min(torch.finfo(torch.float32).tiny).log() / 2
            norm.weight *= (change.mean().exp() / scale).to(norm.weight)
            changes.append(change)
        return float((changes[0] + changes[1]).std(correction=0))

    def _scale(self, dense: nn.Module, smaller: Sizes) -> None:
        """Scale what is read out of each unit, by least squares."""
        own, units = self.mixer.module, Units.of(smaller, self.rules)
        summing = units.summing(smaller.states)
        moment = torch.zeros(len(units.members), len(units.members), dtype=torch.float64)
        pull = torch.zeros(len(units.members), dtype=torch.float64)
        for whole, part in self._both(dense, smaller):
            read = part.read.flatten(0, 2).double().cpu() @ summing.t()  # (B H P, units)
            moment += read.t() @ read
            pull += read.t() @ (whole.read.sum(-1).flatten().double().cpu() - read.sum(1))
        factors = summing.t() @ (1 + solve(ridged(moment, SCALED_RIDGE), pull[:, None])[:, 0])
        own.C_norm.weight *= factors.to(own.C_norm.weight)
        own.C_bias *= factors.to(own.C_bias)

    def _fit_out_proj(self, dense: nn.Module, smaller: Sizes) -> None:
        """Fit out_proj to what the dense mixer puts out."""
        own, width = self.mixer.module, smaller.d_inner
        weight = own.out_proj.weight
        moment, cross = SecondMoment(width, weight.device), torch.zeros(len(weight), width, dtype=torch.float64)
        for whole, part in self._both(dense, smaller):
            y, target = ((step.read.sum(-1) + step.skip).flatten(1) for step in (part, whole))  # (B, d_inner)
            missing = target @ dense.out_proj.weight.float().t() - y @ weight.float().t()
            moment.add(y)
            cross += (missing.t() @ y).double().cpu()
        weight += fit(cross.to(weight.device), moment.total).to(weight)
