"""The loop over layers: each goes through the methods of the plan, on what the pruned layers before it put out.

Nothing here knows a method by name; what they do to a layer is in `methods`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import HOST, Stage, copy_samples, propagate
from ssmc.compressor.calibration.watched import stages_of
from ssmc.compressor.methods.method import Job, LayerResult, Plan, Record, Survey
from ssmc.compressor.streaming import Result
from ssmc.runtime.progress import NO_PROGRESS, Progress


@dataclass(frozen=True)
class Run:
    """A model to be pruned, and all that it is pruned with.

    Attributes:
        model: with the fast scan in use, in float32, on the CPU; it is pruned in place, without changing a shape.
        plan: what to do.
        tokens: (nsamples, seqlen) calibration samples; None when the plan needs no text.
        stored_dtypes: by tensor name, what the model will be saved as. A pruned layer is rounded to it before its
            output is propagated, so that later layers are fitted to what is really saved.
        stage: where each layer is while it is worked on; the rest of the model stays where it is.
        progress: told about the steps.
        result: where finished layers go, and come from in a run that goes on; None: they stay in the model.
        removals: which blocks go as a whole, as far as an earlier run on the same text found it out.
    """

    model: nn.Module
    plan: Plan
    tokens: torch.Tensor | None
    stored_dtypes: Mapping[str, torch.dtype]
    stage: Stage = HOST
    progress: Progress = NO_PROGRESS
    result: Result | None = None
    removals: Sequence[Any] = ()

    def survey(self, hidden: torch.Tensor | None = None) -> Survey:
        """What methods look at before a layer is touched."""
        known = (self.stored_dtypes, tuple(self.removals))
        return Survey(self.plan, self.model, self.tokens, hidden, self.stage, self.progress, *known)


@dataclass(frozen=True)
class Pruned:
    """What happened to a model."""

    layers: tuple[LayerResult, ...]  # empty when only whole layers or SSMs were removed
    removals: tuple[Any, ...] = ()  # `methods.layers.Removal`, whole layers or SSMs, in the order they were removed
    outside: tuple[Record, ...] = ()  # what happened outside the layers


@torch.no_grad()
def prune(run: Run) -> Pruned:
    """Carry out a plan: which blocks go as a whole is chosen first, then the layers that stay are pruned inside.

    Raises:
        CalibrationError: the samples do not suffice.
    """
    if run.tokens is not None:
        for step in run.plan.steps:
            step.check_text(run.tokens)
    removals: list[Any] = []
    for remover in run.plan.removers:
        # every try runs most of the model, so all of it goes to the device
        run.model.to(run.stage.device)
        tokens = None if run.tokens is None else run.tokens.to(run.stage.device)
        removals += remover.choose(replace(run, tokens=tokens).survey())
        if not run.plan.works_inside:
            for removal in removals:
                remover.remove(run.plan.architecture, run.plan.architecture.blocks(run.model)[removal.layer])
        run.model.cpu()
    found = [step.prepare_outside(run.survey()) for step in run.plan.steps]
    outside = tuple(record for record in found if record is not None)
    if not run.plan.works_inside:
        return Pruned((), tuple(removals), outside)
    layers = prune_layers(run, {removal.layer for removal in removals})
    for step in run.plan.steps:
        step.finish_outside(run.survey())
    return Pruned(tuple(layers), tuple(removals), outside)


@torch.no_grad()
def prune_layers(run: Run, removed: Collection[int] = ()) -> list[LayerResult]:
    """Prune every layer of the model in place, each on what the pruned layers before it put out.

    Args:
        run: the model and the plan.
        removed: layers that go as a whole.
    """
    walk = _Walk(run)
    results = []
    for index, block in run.stage.each(walk.blocks):
        job = walk.arrive(index, block)
        if index in removed:
            run.plan.architecture.remove_block(block)
        else:
            if run.result is None or not run.result.restore(job):
                prune_layer(job)
                if run.result is not None:
                    run.result.finished(job)
            walk.leave(job)
        results.append(job.result())
    return results


@torch.no_grad()
def each_alone(run: Run) -> Iterator[int]:
    """Prune one layer after the other, each alone in a model that is dense else.

    Yields:
        The number of the layer that is pruned just now; it is as before when the next number comes.
    """
    walk = _Walk(replace(run, progress=NO_PROGRESS), follows_dense=True)
    blocks: Any = walk.blocks  # a ModuleList
    for index, block in enumerate(blocks):
        run.progress(f"{run.plan.config.pattern} of each layer alone", index, len(blocks))
        blocks[index] = copy.deepcopy(block)
        prune_layer(walk.arrive(index, block, blocks[index]))
        yield index
        blocks[index] = block
        walk.go_on_dense()
    run.progress(f"{run.plan.config.pattern} of each layer alone", len(walk.blocks), len(walk.blocks))


def prune_layer(job: Job) -> None:
    """Take a layer through the methods of the plan, in their order, then round it to what is stored."""
    for method in job.plan.steps:
        if job.mixer is not None or method.in_every_block:
            method.prune(job)
    _round(job)
    for method in job.plan.steps:
        if job.mixer is not None or method.in_every_block:
            method.finish(job)


class _Walk:
    """A model on the way through its layers: what the next one reads, and what it put out in the dense model."""

    def __init__(self, run: Run, follows_dense: bool = False):
        self.run, self.architecture = run, run.plan.architecture
        self.blocks = self.architecture.blocks(run.model)
        self.hidden: torch.Tensor | None = None  # (nsamples, L, d_model)
        self.stream: torch.Tensor | None = None  # the one other copy of this size
        self.dense: torch.Tensor | None = None  # of a hybrid: the residual stream of the dense model
        if run.tokens is not None:
            self.architecture.record_arguments(run.model, run.tokens[:1])
            kept = getattr(torch, run.plan.config.hidden_dtype)
            self.hidden = run.stage.gather([partial(self._embed, sample) for sample in run.tokens], kept)
            if follows_dense or run.plan.follows_dense:
                self.stream = run.stage.copied(self.hidden)
            if run.plan.follows_stream:
                self.dense = run.stage.copied(self.hidden)
        survey = run.survey(self.hidden)
        self.prepared = {method.name: method.prepare(survey) for method in run.plan.steps}

    def arrive(self, index: int, block: nn.Module, work: nn.Module | None = None) -> Job:
        """The next layer as a job; what it is fitted to comes from the dense `block`, `work` is what is pruned."""
        label = f"layer {index + 1}/{len(self.blocks)}"
        progress, architecture = self.run.progress, self.architecture
        if self.hidden is not None and architecture.capabilities.shared_blocks:
            propagate(block, self.hidden, progress, f"{label}: shared block", architecture.enter)
        job = Job(
            plan=self.run.plan,
            block=block if work is None else work,
            index=index,
            hidden=self.hidden,
            stream=self.stream,
            prepared=self.prepared,
            stored_dtypes=self.run.stored_dtypes,
            label=label,
            progress=progress,
        )
        if self.stream is not None and self.hidden is not None:
            if architecture.capabilities.uniform:
                for method in self.run.plan.steps:
                    if method.follows_dense:
                        method.arrive(job, self.stream)
                propagate(block, self.stream, progress, f"{label}: dense outputs")
            elif architecture.mixer(block) is not None:
                copy_samples(self.stream, self.hidden)
                propagate(block, self.stream, progress, f"{label}: dense outputs", architecture.mixed)
        if self.dense is not None:
            if architecture.capabilities.shared_blocks:
                propagate(block, self.dense, progress, f"{label}: shared block", architecture.enter)
            for method in self.run.plan.steps:
                if method.follows_stream:
                    method.arrive(job, self.dense)
            job.targets = stages_of(architecture, block, self.dense, progress, f"{label}: dense outputs")
        return job

    def leave(self, job: Job) -> None:
        """Hand what the pruned layer puts out to the next; nobody reads the last layer's output."""
        if self.hidden is not None and job.index + 1 < len(self.blocks):
            propagate(job.work, self.hidden, self.run.progress, f"{job.label}: outputs", self.architecture.run)

    def go_on_dense(self) -> None:
        """Let the next layer read what the dense one put out."""
        if self.hidden is not None and self.stream is not None:
            copy_samples(self.hidden, self.stream)

    def _embed(self, sample: torch.Tensor) -> torch.Tensor:
        return self.architecture.embed(self.run.model, sample).float()


def _round(job: Job) -> None:
    """Round what was worked on to the types it will be stored in."""
    architecture = job.architecture
    whole = not architecture.capabilities.uniform or job.mixer is None
    module = job.work if whole else job.mixer
    prefix = architecture.block_prefix(job.index) if whole else architecture.mixer_prefix(job.index)
    for name, parameter in module.named_parameters():
        if prefix + name in job.stored_dtypes:  # what layers share is stored once
            parameter.copy_(parameter.to(job.stored_dtypes[prefix + name]))
