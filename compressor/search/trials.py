"""Trials: what a model of other sizes loses and how long it takes, by measuring, and by what was measured.

The text that losses are measured on here is calibration text that no trial is fitted to; test text is never read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import Stage
from ssmc.compressor.calibration.split import TRIAL_TOKENS, Samples
from ssmc.compressor.methods.layers.choose import decides_on
from ssmc.compressor.methods.method import LayerResult, Plan
from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, LAYER
from ssmc.compressor.pipeline import Run, prune
from ssmc.compressor.plan import make_plan
from ssmc.compressor.search.allocation import Sizes
from ssmc.compressor.search.configured import configured, configured_layerwise
from ssmc.compressor.search.counting import Counting
from ssmc.compressor.search.given_table import require_same
from ssmc.compressor.search.layer_sizes import Layerwise
from ssmc.compressor.search.outcome import TOLERANCE, Losses, above
from ssmc.compressor.search.teaching import Teaching
from ssmc.runtime.half_precision import half_precision
from ssmc.runtime.measure.latency import LatencyTable, Workload, measure_latency, read_latency_table, time_sizes
from ssmc.runtime.measure.perplexity import losses_of_tokens, summarise
from ssmc.runtime.measure.timing import Ratio
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.progress import NO_PROGRESS, Progress

TIMED = 15.0  # seconds of timing for a latency table, and for candidates beside the dense model, a guide


@dataclass
class Trials(Counting):
    """The models that were tried on the way to a goal; the checkpoint has the fast scan in use, on the device.

    Attributes:
        samples: calibration text.
        progress: told about the steps.
    """

    samples: Samples
    progress: Progress = NO_PROGRESS
    measured_table: LatencyTable | None = None
    measured_base: Losses | None = None  # of the dense model
    losses: dict[Sizes | Layerwise, float] = field(default_factory=dict)  # excess loss on held-out text, nats a token
    taught: dict[Sizes | Layerwise, float] = field(default_factory=dict)  # the same after a few steps of distillation
    clocked: dict[Sizes | Layerwise, Ratio] = field(default_factory=dict)  # time over the dense model's, measured

    def __post_init__(self) -> None:
        super().__post_init__()
        self.workload = Workload(self.goal.phase, self.goal.batch, self.goal.length)
        self._order: list[Any] = []  # layers in the order they are removed, as far as it is known
        self._teach: Teaching | None = None
        self._few: Sequence[float] = ()  # losses of the dense model, where trials' are measured
        if self.config.distill:
            checkpoint, samples = self.checkpoint, self.samples
            self._teach = Teaching(checkpoint.architecture, checkpoint.model, samples.taught, self.config.seed)

    @property
    def table(self) -> LatencyTable:
        """What parts of the model take, measured when it is first asked for."""
        if self.measured_table is None:
            self.measured_table = self._latency_table()
        return self.measured_table

    @property
    def base(self) -> Losses:
        """The losses of the dense model, measured when it is first asked for."""
        if self.measured_base is None:
            self.progress("loss of the dense model", 0, 1)
            self.measured_base = self._losses(self.checkpoint.model)
        return self.measured_base

    @property
    def correction(self) -> float:
        """Clocked over foretold time, the median of what was clocked."""
        factors = [clock.median / self.table.ratio(sizes.blocks()) for sizes, clock in self.clocked.items()]
        return median(factors) if factors else 1.0

    @property
    def teaches(self) -> bool:
        """Whether gradient steps on the whole model follow, and candidates are judged after a few of them."""
        return self._teach is not None

    def share_of_time(self, sizes: Sizes | Layerwise) -> float:
        """Expected time over the dense model's: by the table, set right by what was clocked so far.

        Where the model itself was clocked, the expectation stays within the confidence interval of that: on a quiet
        machine the clock decides, on a busy one the table does, which many more models were timed for. A table that the
        user gave is taken at its word, so that the search comes to the same end again.
        """
        if self.goal.latency_table is not None:
            return self.table.ratio(sizes.blocks())
        expected = self.table.ratio(sizes.blocks()) * self.correction
        clocked = self.clocked.get(sizes)
        return expected if clocked is None else min(max(expected, clocked.low), clocked.high)

    def try_out(self, sizes: Sizes | Layerwise) -> float:
        """Prune a copy of the model on a few samples and measure its excess loss on held-out ones, nats a token."""
        if sizes not in self.losses:
            model, _ = self._pruned(sizes, f"trial {len(self.losses) + 1}")
            self.losses[sizes] = self._excess(model)
        return self.losses[sizes]

    def judge(self, sizes: Sizes | Layerwise) -> float:
        """What decides between candidates: the loss that is left at once, or after a short distillation if the run has
        one."""
        if self._teach is None:
            return self.try_out(sizes)
        if sizes not in self.taught:
            name = f"trial {len(self.taught) + 1} with steps"
            model, layers = self._pruned(sizes, name)
            if sizes not in self.losses:
                self.losses[sizes] = self._excess(model)
            lost = self.losses[sizes]
            self._teach(model, layers, lost, lambda _, done, total: self.progress(name, done, total))
            self.taught[sizes] = self._excess(model)
        return self.taught[sizes]

    def outcome(self, pruned: nn.Module, sizes: Sizes | Layerwise) -> dict[str, Any]:
        """What came out: the loss of the pruned model, and its time beside the dense one's in the same run."""
        self.progress("measuring what came out", 0, 1)
        result: dict[str, Any] = {
            "parameters": self.share_of_parameters(sizes),
            "memory": self.memory(sizes),
            **above(self._losses(use_fast_scan(pruned)), self.base),
        }
        self.losses[sizes] = result["excess_nats"]  # should the search go on, it knows better than from a trial
        if self.goal.needs_time:
            ratio = self.clock([sizes])[sizes]
            result |= {"time": ratio.median, "time_low": ratio.low, "time_high": ratio.high}
        return result

    def shortfall(self, outcome: dict[str, Any], most_nats: float) -> tuple[float, float, float]:
        """How far an outcome is from the goal: nats above the bound, time above what was asked for, then the loss."""
        above = max(0.0, outcome["excess_nats"] - most_nats)
        late = 0.0
        if self.goal.target_latency is not None:
            late = max(0.0, outcome["time"] / (self.goal.target_latency * (1 + TOLERANCE)) - 1)
        return above, late, outcome["excess_nats"]

    def _latency_table(self) -> LatencyTable:
        if self.goal.latency_table is None:
            states = None if self.goal.phase == "prefill" else (1, self.dense.d_state)  # a step is linear in them
            return measure_latency(
                self.checkpoint.model,
                self.checkpoint.architecture,
                self.workload,
                widths=None if CHANNEL in self.config.parts else (self.dense.d_inner,),
                states=states if COLUMN in self.config.parts else (self.dense.d_state,),
                budget=TIMED,
                progress=self.progress,
            )
        table = read_latency_table(self.goal.latency_table)
        require_same(
            self.goal.latency_table,
            ("a model of", table.dimensions.as_dict(), self.dense.as_dict()),
            ("", str(table.workload), str(self.workload)),
            ("the device", table.device, self.checkpoint.model.device.type),
        )
        return table

    def configured(self, sizes: Sizes | Layerwise, *, trial: bool = False) -> CompressConfig:
        """The ordinary run that leaves these sizes."""
        if isinstance(sizes, Layerwise):
            return configured_layerwise(self.config, sizes, self.dense, trial=trial)
        return configured(self.config, sizes.removed(self.dense), trial=trial)

    def allowed(self, least_width: int | None = None, least_states: int = 1) -> tuple[list[int], list[int]]:
        """As counted, but nothing smaller than what the latency table was measured for."""
        if self.goal.needs_time:
            least_width, least_states = self.table.widths[0], self.table.states[0]
        return super().allowed(least_width, least_states)

    def clock(self, several: Sequence[Sizes | Layerwise]) -> dict[Sizes | Layerwise, Ratio]:
        """Time over the dense model's, measured in turns with it."""
        checkpoint = self.checkpoint
        blocks = [sizes.blocks() for sizes in several]
        ratios = time_sizes(
            checkpoint.model, checkpoint.architecture, blocks, self.workload, budget=TIMED, progress=self.progress
        )
        found = dict(zip(several, ratios, strict=True))
        self.clocked |= found
        return found

    def run_of(self, model: nn.Module, plan: Plan, text: torch.Tensor | None, progress: Progress) -> Run:
        """A run on a copy of the dense model; which layers go is known where trials on the same text found it out."""
        stage = Stage(self.checkpoint.model.device)
        order: tuple[Any, ...] = ()
        if LAYER in self.config.parts and LAYER in plan.config.parts and text is not None:
            same = text is self.samples.fit or decides_on(text) <= self.samples.fit.numel()
            order = tuple(self._order) if same else ()
        return Run(model, plan, text, self.checkpoint.dtypes, stage, progress, removals=order)

    def _pruned(self, sizes: Sizes | Layerwise, name: str) -> tuple[nn.Module, Sequence[LayerResult]]:
        """A copy of the model that is pruned on a few samples, and what happened to its layers."""
        checkpoint = self.checkpoint
        config = self.configured(sizes, trial=True)
        plan = make_plan(config, checkpoint.architecture, self.dense, checkpoint.config)
        model = self.copy_of_dense()
        run = self.run_of(model, plan, self.samples.fit, lambda _, done, total: self.progress(name, done, total))
        # which layers go is decided once, for the run that is carried out in float32 as well
        whole = LAYER in config.parts
        with nullcontext() if whole else half_precision(self.checkpoint.model.device):
            pruned = prune(run)
        if len(pruned.removals) > len(self._order):
            self._order = list(pruned.removals)
        return model, pruned.layers

    def _excess(self, model: nn.Module) -> float:
        """Of a trial, on as many held-out tokens as it is fitted to; what comes out is measured on all, and in
        float32."""
        if not self._few:
            self.progress("loss of the dense model", 0, 1)
            self._few = self._few_losses(self.checkpoint.model)
        return fmean(ours - dense for ours, dense in zip(self._few_losses(model), self._few, strict=True))

    def _few_losses(self, model: nn.Module) -> Sequence[float]:
        with half_precision(self.checkpoint.model.device):
            few = math.ceil(TRIAL_TOKENS / self.samples.held_out.shape[1])
            return summarise(*self._losses(model, few)).window_nll

    def copy_of_dense(self) -> nn.Module:
        """The dense model once more, on the CPU, to be pruned."""
        return use_fast_scan(copy.deepcopy(self.checkpoint.model).cpu())

    def _losses(self, model: nn.Module, windows: int | None = None) -> Losses:
        held = self.samples.held_out[:windows]
        return losses_of_tokens(model.to(self.checkpoint.model.device), held.reshape(-1), held.shape[1])
