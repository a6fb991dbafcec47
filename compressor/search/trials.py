"""Meet a target: measure what each part costs, list the likeliest combinations, try those, take the best.

The text that losses are measured on here is calibration text that no trial is fitted to; test text is never read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import nn

from ssmc.compressor.calibration.split import Samples
from ssmc.compressor.counts import default_multiple
from ssmc.compressor.options.config import POWER_OF_TWO, CompressConfig
from ssmc.compressor.options.goal import Target, configured, configured_layerwise, removable_layers
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, COMBINABLE, LAYER
from ssmc.compressor.prune import prune
from ssmc.compressor.search.allocation import (
    ROUNDS,
    Curve,
    Limit,
    LossModel,
    Sizes,
    cheapest_within,
    enumerate_sizes,
    frontier,
    shortlist,
)
from ssmc.compressor.search.layer_sizes import LayerLosses, Layerwise
from ssmc.compressor.search.per_layer import find_layerwise
from ssmc.runtime.bench import LatencyTable, Ratio, measure_latency, read_latency_table, time_sizes
from ssmc.runtime.errors import UsageError, VerificationError
from ssmc.runtime.measure.perplexity import Perplexity, excess_loss, perplexity
from ssmc.runtime.models.checkpoints import Checkpoint, parameter_counter
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import Progress, silent

TRIALS = 3  # combinations that are tried for real
SWEEP = {COLUMN: (0.5, 0.75, 0.875), CHANNEL: (0.25, 0.5)}  # where the parts' curves are measured, roughly
LAYERS = 2  # and up to how many layers
TOLERANCE = 0.10  # how far the time may miss its target


@dataclass(frozen=True)
class Found:
    """What the search decided."""

    sizes: Sizes | Layerwise
    config: CompressConfig
    expected: dict[str, float]
    record: dict[str, Any]  # for the manifest: everything it was decided on


@dataclass
class Search:
    """One search; `run` carries it out, `outcome` says afterwards what came of it.

    Attributes:
        checkpoint: the dense model, with the fast scan in use, on the device; it is not changed.
        config: what may be removed and how, its sparsity aside.
        target: what to meet.
        samples: calibration text.
        progress: told about the steps.
    """

    checkpoint: Checkpoint
    config: CompressConfig
    target: Target
    samples: Samples
    progress: Progress = silent
    table: LatencyTable | None = None
    base: Perplexity | None = None  # of the dense model
    trials: dict[Sizes | Layerwise, float] = field(default_factory=dict)  # excess loss on held-out text, nats a token
    clocked: dict[Sizes | Layerwise, Ratio] = field(default_factory=dict)  # time over the dense model's, measured

    @property
    def correction(self) -> float:
        """Clocked over foretold time, the median of what was clocked."""
        factors = [clock.median / self.table.ratio(sizes.blocks()) for sizes, clock in self.clocked.items()]
        return median(factors) if factors else 1.0

    def __post_init__(self) -> None:
        self.dense = self.checkpoint.dimensions
        self._count = parameter_counter(self.checkpoint.config)
        self.parameters = self._count(*asdict(Sizes.of(self.dense)).values())
        self.parameters_outside = self._count(0, self.dense.d_inner, self.dense.d_state)

    def run(self) -> Found:
        """Find the sizes that meet the target with the least loss.

        Raises:
            UsageError: nothing meets it, by the latency table and by counting.
            VerificationError: what meets it loses more than the bound.
        """
        if self.target.needs_time and self.table is None:
            self.table = self._latency_table()
        candidates = self._candidates()
        limits = self._limits()
        self._require_one(candidates, limits)
        if self.base is None:
            self.progress("loss of the dense model", 0, 1)
            self.base = self._loss(self.checkpoint.model)
        model = LossModel(self.dense, {part: self._curve(part) for part in self.config.parts})
        if self.target.target_latency is None and self.target.target_params is None:
            best = self._fastest(candidates, model)
        else:
            best = self._least_loss(candidates, limits, model)
        losses = None
        if self.target.per_layer:
            best, losses = find_layerwise(self, best, limits, model)
        return self._found(best, model, losses)

    def share_of_parameters(self, sizes: Sizes | Layerwise) -> float:
        """Parameters over the dense model's, exactly."""
        blocks = sizes.blocks()
        return (self.parameters_outside + sum(self.parameters_of(*block) for block in blocks)) / self.parameters

    def parameters_of(self, d_inner: int, d_state: int) -> int:
        """Of one block."""
        return self._count(1, d_inner, d_state) - self.parameters_outside

    def share_of_time(self, sizes: Sizes | Layerwise) -> float:
        """Expected time over the dense model's: by the table, set right by what was clocked so far.

        Where the model itself was clocked, the expectation stays within the confidence interval of that: on a quiet
        machine the clock decides, on a busy one the table does, which many more models were timed for. A table that the
        user gave is taken at its word, so that the search comes to the same end again.
        """
        if self.target.latency_table is not None:
            return self.table.ratio(sizes.blocks())
        expected = self.table.ratio(sizes.blocks()) * self.correction
        clocked = self.clocked.get(sizes)
        return expected if clocked is None else min(max(expected, clocked.low), clocked.high)

    def try_out(self, sizes: Sizes | Layerwise) -> float:
        """Prune a copy of the model on a few samples and measure its excess loss on held-out ones, nats a token."""
        if sizes not in self.trials:
            config = self._configured(sizes, trial=True)
            name = f"trial {len(self.trials) + 1}"
            self.trials[sizes] = self._excess(config, lambda _, done, total: self.progress(name, done, total))
        return self.trials[sizes]

    def outcome(self, pruned: nn.Module, found: Found) -> dict[str, Any]:
        """What came out: the loss of the pruned model, and its time beside the dense one's in the same run."""
        self.progress("measuring what came out", 0, 1)
        loss = excess_loss(self._loss(use_fast_scan(pruned)), self.base)
        result = {
            "parameters": self.share_of_parameters(found.sizes),
            "excess_nats": loss.nats,
            "excess_stderr": loss.stderr,
            "ppl_increase": math.expm1(loss.nats),
        }
        self.trials[found.sizes] = loss.nats  # should the search go on, it knows better than from a trial
        if self.table is not None:
            ratio = self.clock([found.sizes])[found.sizes]
            result |= {"time": ratio.median, "time_low": ratio.low, "time_high": ratio.high}
        return result

    def missed(self, outcome: dict[str, Any]) -> list[str]:
        """In what the outcome is not what was asked for, in sentences; empty: it is."""
        target = self.target
        if outcome["excess_nats"] > target.most_nats:
            return [
                f"The perplexity on held-out calibration text rose by {outcome['ppl_increase']:.2%}, more than the "
                f"{target.max_ppl_increase:.2%} allowed."
            ]
        if target.target_latency is not None and outcome["time"] > target.target_latency * (1 + TOLERANCE):
            return [
                f"The target was missed: the model takes {outcome['time']:.3f} of the dense one's time, "
                f"{target.target_latency:.3f} were asked for."
            ]
        return []

    def _latency_table(self) -> LatencyTable:
        if self.target.latency_table is None:
            return measure_latency(
                self.checkpoint.model,
                self.checkpoint.architecture,
                self.target.workload,
                widths=None if CHANNEL in self.config.parts else (self.dense.d_inner,),
                states=None if COLUMN in self.config.parts else (self.dense.d_state,),
                progress=self.progress,
            )
        table = read_latency_table(self.target.latency_table)
        device = self.checkpoint.model.device.type
        for what, has, wanted in (
            ("a model of", table.dimensions.as_dict(), self.dense.as_dict()),
            ("", str(table.workload), str(self.target.workload)),
            ("the device", table.device, device),
        ):
            if has != wanted:
                raise UsageError(
                    f"The latency table {self.target.latency_table} is for {what} {has}, this run is for {wanted}. "
                    "Leave it out, and a new one is measured."
                )
        return table

    def _configured(self, sizes: Sizes | Layerwise, *, trial: bool = False) -> CompressConfig:
        """The ordinary run that leaves these sizes."""
        if isinstance(sizes, Layerwise):
            return configured_layerwise(self.config, sizes, self.dense, trial=trial)
        return configured(self.config, sizes.removed(self.dense), trial=trial)

    def allowed(self) -> tuple[list[int], list[int]]:
        """The widths and the numbers of states that the pattern may leave, rising, the dense model's last."""
        config, dense = self.config, self.dense
        states, widths = [dense.d_state], [dense.d_inner]
        if COLUMN in config.parts:
            step = config.round_to
            powers = step == POWER_OF_TWO
            states = [n for n in range(1, dense.d_state + 1) if (n & (n - 1) == 0 if powers else n % step == 0)]
            least = self.table.states[0] if self.table else 1
            states = sorted({*(n for n in states if n >= least), dense.d_state})
        if CHANNEL in config.parts:
            step = config.round_channels or default_multiple(dense.d_inner)
            least = self.table.widths[0] if self.table else dense.d_inner // 4
            widths = sorted({*(w for w in range(step, dense.d_inner, step) if w >= least), dense.d_inner})
        return widths, states

    def _candidates(self) -> list[Sizes]:
        """Every combination of what the pattern may remove, the dense model left out."""
        config, dense = self.config, self.dense
        widths, states = self.allowed()
        every = enumerate_sizes(removable_layers(dense.n_layer, config.parts), widths, states)
        return [sizes for sizes in every if sizes != Sizes.of(dense)]

    def _limits(self) -> list[Limit]:
        limits = []
        if self.target.target_params is not None:
            limits.append(Limit("parameters", self.share_of_parameters, self.target.target_params))
        if self.target.target_latency is not None:
            limits.append(Limit("time", self.share_of_time, self.target.target_latency))
        return limits

    def _require_one(self, candidates: Sequence[Sizes], limits: Sequence[Limit]) -> None:
        if not candidates:
            raise UsageError(f"The pattern {self.config.pattern} leaves nothing to choose from for this model.")
        if any(all(limit.allows(sizes) for limit in limits) for sizes in candidates):
            return
        reach = [
            f"{limit.most:.4g} of the {limit.name} (the least is {min(map(limit.cost, candidates)):.3f})"
            for limit in limits
        ]
        whole = set(self.config.parts) == set(COMBINABLE)
        raise UsageError(
            f"The pattern {self.config.pattern} cannot reach {' and '.join(reach)} of this model here. Ask for less"
            + ("." if whole else f", or allow more with --pattern {'+'.join(COMBINABLE)}.")
        )

    def _curve(self, part: str) -> Curve:
        """The loss of removing one part alone, measured at two or three shares."""
        dense, full = self.dense, Sizes.of(self.dense)
        if part == LAYER:
            most = min(LAYERS, dense.n_layer // 2)
            points = [Sizes(dense.n_layer - gone, full.d_inner, full.d_state) for gone in range(1, most + 1)]
        else:
            points = []
            for share in SWEEP[part]:
                allowed = {s for s in self._candidates() if s.removed(dense).keys() == {part}}
                if allowed:
                    points.append(min(allowed, key=lambda s: (abs(s.removed(dense)[part] - share), s)))
        if not points:
            return Curve((0.5,), (math.inf,))
        return Curve.through({sizes.removed(dense)[part]: self.try_out(sizes) for sizes in dict.fromkeys(points)})

    def _least_loss(self, candidates: Sequence[Sizes], limits: Sequence[Limit], model: LossModel) -> Sizes:
        chosen = shortlist(candidates, limits, model, TRIALS)
        if self.target.target_latency is not None and self.target.latency_table is None:
            chosen = self._set_right(candidates, limits, model, chosen)
        best = min(chosen, key=lambda sizes: (self.try_out(sizes), sizes))
        if self.try_out(best) > self.target.most_nats:
            raise VerificationError(
                f"What meets the target with the least loss found raises the perplexity by "
                f"{math.expm1(self.try_out(best)):.1%} on held-out calibration text, more than the "
                f"{self.target.max_ppl_increase:.1%} allowed, so nothing was written. Ask for less, or allow more."
            )
        return best

    def _set_right(
        self, candidates: Sequence[Sizes], limits: Sequence[Limit], model: LossModel, chosen: list[Sizes]
    ) -> list[Sizes]:
        """Time what was chosen before anything is pruned, correct the table by what shows, and choose once more."""
        for _ in range(ROUNDS):
            new = [sizes for sizes in chosen if sizes not in self.clocked]
            if not new:
                break
            self.clock(new)
            chosen = shortlist(candidates, limits, model, TRIALS)
            if not chosen:
                raise UsageError(
                    f"The pattern {self.config.pattern} cannot reach {self.target.target_latency:.4g} of the dense "
                    f"model's time here: models took {self.correction:.2f} times what the latency table says. Ask for "
                    "less."
                )
        return chosen

    def _fastest(self, candidates: Sequence[Sizes], model: LossModel) -> Sizes:
        """The fastest within the bound of the loss, by bisection along what nothing beats in both."""
        ordered = frontier(candidates, self.share_of_time, model)
        bound = self.target.most_nats
        start = next((i for i, sizes in enumerate(ordered) if model(sizes) <= bound), len(ordered) - 1)
        best = cheapest_within(ordered, self.try_out, bound, start)
        if best is None:
            least = min(self.trials.values())
            raise VerificationError(
                f"Nothing that was tried keeps the perplexity within {self.target.max_ppl_increase:.2%} of the dense "
                f"model's on held-out calibration text (the least was {math.expm1(least):.2%}), so nothing was "
                "written. Allow more."
            )
        return best

    def _found(self, sizes: Sizes | Layerwise, model: LossModel, losses: LayerLosses | None) -> Found:
        expected = {"parameters": self.share_of_parameters(sizes), "excess_nats": self.try_out(sizes)}
        if self.table is not None:
            expected["time"] = self.share_of_time(sizes)
        record = {
            "asked": self.target.model_dump(mode="json", exclude={"latency_table"}),
            "sizes": asdict(sizes),
            "expected": expected,
            "curves": {part: asdict(curve) for part, curve in model.curves.items()},
            "trials": [
                {**asdict(s), "added_up_nats": (model if isinstance(s, Sizes) else losses)(s), "excess_nats": loss}
                for s, loss in self.trials.items()
            ],
            "clocked": [{**asdict(s), "time": asdict(ratio)} for s, ratio in self.clocked.items()],
            "correction": self.correction,
            "held_out_seen": self.samples.seen,
            "latency_table": None if self.table is None else self.table.to_json(),
        }
        if losses is not None:
            record["layer_weights"] = losses.weights
        return Found(sizes, self._configured(sizes), expected, record)

    def clock(self, several: Sequence[Sizes | Layerwise]) -> dict[Sizes | Layerwise, Ratio]:
        """Time over the dense model's, measured in turns with it."""
        checkpoint = self.checkpoint
        blocks = [sizes.blocks() for sizes in several]
        ratios = time_sizes(
            checkpoint.model, checkpoint.architecture, blocks, self.target.workload, progress=self.progress
        )
        found = dict(zip(several, ratios, strict=True))
        self.clocked |= found
        return found

    def _excess(self, config: CompressConfig, progress: Progress) -> float:
        checkpoint = self.checkpoint
        device = checkpoint.model.device
        model = use_fast_scan(copy.deepcopy(checkpoint.model).cpu())
        prune(model, checkpoint.architecture, self.samples.fit, config, checkpoint.dtypes, device, progress)
        return excess_loss(self._loss(model), self.base).nats

    def _loss(self, model: nn.Module) -> Perplexity:
        held = self.samples.held_out
        return perplexity(model.to(self.checkpoint.model.device), held.reshape(-1), held.shape[1])
