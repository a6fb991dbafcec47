"""The linear maps of a layer in few bits, one after the other: each on what the quantised ones before it put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ssmc.compressor.calibration.placement import device_of, samples
from ssmc.compressor.methods.channels.method import FIT_TOKENS_PER_CHANNEL
from ssmc.compressor.methods.channels.out_proj import fit_with_moment
from ssmc.compressor.methods.method import Job, Record
from ssmc.compressor.methods.quantize.awq import awq, scale_inputs
from ssmc.compressor.methods.quantize.gptq import gptq
from ssmc.compressor.methods.quantize.grid import digits_for, spanning_grid
from ssmc.compressor.methods.weights.second_moments import SecondMoment
from ssmc.compressor.methods.weights.sparsegpt import relative_error
from ssmc.compressor.options.patterns import WIDTH
from ssmc.compressor.options.quantization import AWQ, BITS, GPTQ, MAPS, RTN, SMALLEST_GROUP, W8, group_for
from ssmc.runtime.collectives import of_all
from ssmc.runtime.quantized import GridShape, Quantized


@dataclass(frozen=True)
class QuantizedModule:
    """What happened to one linear map.

    Attributes:
        name: "in_proj" of a mixer; of other maps the name within the block.
        tensor: name of its weight in the model.
        stored: its codes; None where it was left as it is.
        error: squared error of its output on the calibration text, relative to the output; None: not measured.
        left_out: why it was left as it is.
    """

    name: str
    tensor: str
    stored: Quantized | None
    error: float | None = None
    left_out: str | None = None

    def as_manifest(self) -> dict[str, Any]:
        """Without the codes."""
        if self.stored is None:
            return {"name": self.name, "tensor": self.tensor, "left_out": self.left_out}
        shape = self.stored.shape
        entry = {"name": self.name, "tensor": self.tensor, "bits": shape.bits, "group_size": shape.group}
        return entry | {"symmetric": shape.symmetric, "error": self.error}


def no_groups(name: str, tensor: str, weight: torch.Tensor) -> QuantizedModule:
    """A map that stays as it is, since its inputs cannot be divided into groups."""
    reason = f"{weight.shape[1]} inputs are no groups of {SMALLEST_GROUP} or more"
    return QuantizedModule(name, tensor, None, None, reason)


@dataclass(frozen=True)
class QuantizedRecord(Record):
    """What happened to the linear maps of a layer."""

    name = "quantized"

    modules: tuple[QuantizedModule, ...]

    def as_manifest(self) -> dict[str, Any]:
        """One entry a module."""
        return {"quantized": [module.as_manifest() for module in self.modules]}


def quantize_layer(job: Job) -> None:
    """Quantise the chosen linear maps of a layer in place, those of its mixer first."""
    chosen, done = job.config.quantized_modules, []
    if job.mixer is not None:
        for name in job.architecture.projections:
            if name in chosen:
                done.append(_quantize_projection(job, name))
    if MAPS in chosen:
        for group in _together(job, job.architecture.linears(job.work)):
            done += _quantize_linears(job, group)
    if done:
        job.note(QuantizedRecord(tuple(done)))


def may_fit(job: Job, name: str) -> bool:
    """Whether a projection is fitted to the dense model before it is quantised, to make up for what was so far.

    in_proj for what the residual stream lost on its way here, out_proj for the projections before it. Not where single
    weights of it are zero, which a fit would wake, nor where all that adds to the stream was fitted together, nor on a
    text too short to know it by.
    """
    config = job.config
    if job.stream is None or config.quantize_method != GPTQ or name not in config.quantized_modules:
        return False
    if job.plan.fits_stream or name in config.modules:
        return False
    return of_all(job.samples.shape[:2].numel()) >= FIT_TOKENS_PER_CHANNEL * job.weights[name].shape[1]


def _quantize_projection(job: Job, name: str) -> QuantizedModule:
    weight, moment = job.weights[name], None
    if name == "in_proj" and (change := job.worked_out.get("quantize")) is not None:
        weight += (weight.double() @ change).to(weight)
    if name == "out_proj" and may_fit(job, name):
        _, moment = fit_with_moment(job)
    elif job.config.quantize_method != RTN:
        moment = SecondMoment(weight.shape[1], weight.device)
        for i, sample in samples(job.samples, weight.device):
            job.report(f"quantising {name}", i, len(job.samples))
            moment.add(_read_by(job, name, sample))
        job.report(f"quantising {name}", len(job.samples), len(job.samples))
        moment.pool()
    return _quantize(job, name, getattr(job.mixer, name), moment)


def _read_by(job: Job, name: str, sample: torch.Tensor) -> torch.Tensor:
    """What a projection reads when the layer reads a sample, but for a factor: no more is computed than that needs."""
    architecture, block = job.architecture, job.work
    if name == "in_proj":
        return architecture.normed(block, sample)
    if name == "x_proj":
        return architecture.scan_inputs(
            job.mixer, *architecture.expand(job.mixer, architecture.normed(block, sample))
        ).u
    if name == "out_proj":
        return architecture.scanned(block, sample)[1]
    return architecture.module_inputs(block, sample)[0][name]


def _quantize_linears(job: Job, linears: Mapping[str, nn.Linear]) -> list[QuantizedModule]:
    """Maps that read the same, such as queries, keys and values."""
    first, linear = next(iter(linears.items()))
    moment = None
    if job.config.quantize_method != RTN:
        moment = SecondMoment(linear.in_features, linear.weight.device)
        with _hooked(linear, moment.add):
            for i, sample in samples(job.samples, linear.weight.device):
                job.report(f"quantising {first}", i, len(job.samples))
                job.architecture.run(job.work, sample)
        job.report(f"quantising {first}", len(job.samples), len(job.samples))
        moment.pool()
    return [_quantize(job, name, linear, moment) for name, linear in linears.items()]


def _quantize(job: Job, name: str, linear: nn.Linear, moment: SecondMoment | None) -> QuantizedModule:
    """One map, in place."""
    config, whole = job.config, linear.weight.data
    kept = read_inputs(whole, bool(job.units_kept) or WIDTH in config.parts)
    weight = whole[:, kept]
    group = group_for(weight.shape[1], config.group_size)
    tensor = job.architecture.block_prefix(job.index) + _name_of(job.work, linear) + ".weight"
    if group is None:
        return no_groups(name, tensor, weight)
    shape = GridShape(BITS[config.quantize or W8], group, config.symmetric)
    digits = digits_for(job.stored_dtypes.get(tensor), shape)
    if moment is None:
        stored, error = spanning_grid(weight, shape, digits).quantized(weight), None
    else:
        total = moment.total[kept][:, kept]
        if config.quantize_method == AWQ:
            total = scale_inputs(job, name, weight, total, shape, digits)
        before = weight.clone()
        stored = (awq if config.quantize_method == AWQ else gptq)(weight, total, shape, digits)
        error = relative_error(before, stored.weight().to(before), total)
    whole[:, kept] = stored.weight().to(whole)
    return QuantizedModule(name, tensor, stored, error)


def read_inputs(weight: torch.Tensor, removed: bool) -> torch.Tensor:
    """The inputs of a map (out, in) that exports do not cut out.

    Args:
        weight: of the map.
        removed: whether neurons, heads or directions of the stream were removed, whose columns are zero.
    """
    kept = weight.ne(0).any(0) if removed else torch.ones_like(weight[0], dtype=torch.bool)
    return kept.nonzero()[:, 0]


def _name_of(block: nn.Module, linear: nn.Linear) -> str:
    return next(name for name, module in block.named_modules() if module is linear)


def _together(job: Job, linears: Mapping[str, nn.Linear]) -> list[dict[str, nn.Linear]]:
    """Maps in the order they run, those that read the same in one group."""
    if job.hidden is None or job.config.quantize_method == RTN:
        return [{name: linear} for name, linear in linears.items()]
    groups: dict[tuple[Any, ...], dict[str, nn.Linear]] = {}
    read: list[torch.Tensor] = []  # kept alive: the memory of each is its own

    def note(name: str, linear: nn.Linear, x: torch.Tensor) -> None:
        read.append(x)
        groups.setdefault((x.data_ptr(), tuple(x.shape)), {})[name] = linear

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(_hooked(linear, partial(note, name, linear)))
        job.architecture.run(job.work, next(iter(samples(job.samples, device_of(job.work))))[1])
    return list(groups.values())


@contextmanager
def _hooked(linear: nn.Linear, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Show a function everything that a map reads."""
    hook = linear.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        hook.remove()
