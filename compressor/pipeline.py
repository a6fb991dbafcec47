"""Layer by layer: collect statistics, decide, apply, and hand the pruned layer's output to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ssmc.compressor.calibration.placement import HOST, Stage, ahead, device_of, put, samples, settle
from ssmc.compressor.counts import Kept, kept
from ssmc.compressor.methods.channels.prune import Fitted, fit_out_proj, prune_channels
from ssmc.compressor.methods.refine import Refinement, check_samples, refine, stepped_on
from ssmc.compressor.methods.states.contributions import Loss, loss_of
from ssmc.compressor.methods.states.elimination import evaluate
from ssmc.compressor.methods.states.normed import remove_states
from ssmc.compressor.methods.states.readers import fit_readers
from ssmc.compressor.methods.states.scores import (
    Layer,
    choose_states,
    layer_seed,
    prune_entries,
    prune_heads,
    statistics_for,
)
from ssmc.compressor.methods.states.statistics import STRETCH, Chunk, Statistic
from ssmc.compressor.methods.weights.masks import Target
from ssmc.compressor.methods.weights.projections import ModuleResult, module_targets, prune_linears, prune_modules
from ssmc.compressor.options.config import SSM, CompressConfig
from ssmc.compressor.options.patterns import CHANNEL, COLUMN
from ssmc.runtime.models import families
from ssmc.runtime.models.families import Architecture, Dimensions
from ssmc.runtime.progress import Progress, silent
from ssmc.runtime.scan import accelerator, scan_states

PROJECTED = {"cpu": 512, "cuda": 8192}  # tokens that pass in_proj together: enough to keep the matrix product busy
SUMMED = 8192  # tokens together where a GPU sums over the states without keeping them
STATE_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # hidden states kept at once: what fits a cache; what fills a GPU


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer."""

    kept: tuple[int, ...]  # states that stay
    error: float | None = None  # relative squared error of the gated output; None when nothing was measured
    error_unrepaired: float | None = None
    repaired: bool = False
    norm_spread: float | None = None  # how far the norms of B and C vary from token to token; None: there are none
    channels: tuple[int, ...] | None = None  # channels that stay; None: all
    fitted: Fitted | None = None  # what fitting out_proj to the dense model achieved; None: it was not
    a_log_zeros: float | None = None  # part of A_log set to 0 by an entry-wise pattern
    modules: tuple[ModuleResult, ...] = ()
    refined: Refinement | None = None  # what the gradient steps achieved; None: there were none


@torch.no_grad()
def prune_layers(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor | None,
    config: CompressConfig,
    stored_dtypes: Mapping[str, torch.dtype],
    progress: Progress = silent,
    removed: Collection[int] = (),
    stage: Stage = HOST,
) -> list[LayerResult]:
    """Prune every layer of `model` in place, each on what the pruned layers before it put out.

    Args:
        model: with the fast scan in use, in float32 on a CPU.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples; None when the run needs no text.
        config: what is pruned and how.
        stored_dtypes: by tensor name, what the model will be saved as; a pruned layer is rounded to it before its
            output is propagated, so that later layers are fitted to what is really saved.
        progress: told about layers and samples.
        removed: layers that go as a whole.
        stage: where each layer is while it is worked on; the rest of the model stays where it is.

    Raises:
        UsageError: the counts asked for do not fit the model.
        CalibrationError: there is no sample left to judge the refinement by.
    """
    sizes = architecture.dimensions(model.config)
    if config.refine:
        check_samples(tokens)
    hidden = None
    if tokens is not None:
        architecture.record_arguments(model, tokens[:1])
        hidden = stage.place(_embed(architecture, model, tokens))  # (nsamples, L, d_model)
    fits = hidden is not None and config.fits_out_proj(_mixes_readers(architecture))
    run = Run(
        architecture,
        config,
        sizes,
        counts=kept(config, sizes),
        hidden=hidden,
        stream=stage.place(hidden.clone()) if fits or config.refine else None,
        fits=fits,
        targets=module_targets(architecture, model, hidden, config, progress, stage),
        stored_dtypes=stored_dtypes,
        progress=progress,
    )
    blocks = architecture.blocks(model)
    results = []
    for index, block in stage.each(blocks):
        label = f"layer {index + 1}/{len(blocks)}"
        if hidden is not None and architecture.capabilities.shared_blocks:
            propagate(block, hidden, progress, f"{label}: shared block", architecture.enter)
        if run.stream is not None:
            _next_target(run, block, f"{label}: dense outputs")
        if index in removed:
            architecture.remove_block(block)
            results.append(LayerResult(kept=tuple(range(run.states))))
            continue
        if architecture.mixer(block) is None:
            result, work = _prune_other(run, block, index, label), block
        else:
            result, work = prune_layer(run, block, index, label)
        if hidden is not None and index + 1 < len(blocks):  # nobody reads the last layer's output
            propagate(work, hidden, progress, f"{label}: outputs", architecture.run)
        results.append(result)
    return results


def _mixes_readers(architecture: Architecture) -> bool:
    """Whether the repair of removed states folds into their C rows, exactly."""
    return not (architecture.capabilities.heads or architecture.capabilities.normed_readers)


@torch.no_grad()
def each_alone(
    model: nn.Module,
    architecture: Architecture,
    tokens: torch.Tensor,
    config: CompressConfig,
    stored_dtypes: Mapping[str, torch.dtype],
    progress: Progress = silent,
) -> Iterator[int]:
    """Prune one layer after the other, each alone in a model that is dense else.

    Args:
        model: with the fast scan in use, in float32; a layer is pruned during its turn, and as before after it.
        architecture: its adapter.
        tokens: (nsamples, seqlen) calibration samples.
        config: what is pruned and how: states, channels or both.
        stored_dtypes: as `prune_layers` takes them.
        progress: told about layers and samples.

    Yields:
        The number of the layer that is pruned just now.
    """
    sizes = architecture.dimensions(model.config)
    hidden, blocks = _embed(architecture, model, tokens), architecture.blocks(model)
    run = Run(
        architecture,
        config,
        sizes,
        counts=kept(config, sizes),
        hidden=hidden,
        stream=hidden.clone(),
        fits=config.fits_out_proj(_mixes_readers(architecture)),
        targets=[],
        stored_dtypes=stored_dtypes,
        progress=silent,
    )
    label = f"{config.pattern} of each layer alone"
    for index, block in enumerate(blocks):
        progress(label, index, len(blocks))
        _next_target(run, block, "")
        blocks[index] = copy.deepcopy(block)
        prune_layer(run, blocks[index], index, "")
        yield index
        blocks[index] = block
        hidden.copy_(run.stream)  # the next layer reads what the dense one put out
    progress(label, len(blocks), len(blocks))


@dataclass(frozen=True)
class Run:
    """What the layers of one run have in common."""

    architecture: Architecture
    config: CompressConfig
    sizes: Dimensions  # of the dense model
    counts: Kept
    # (nsamples, L, d_model) what the next layer reads in the pruned model, or pieces of it, see `collect`
    hidden: torch.Tensor | Iterable[torch.Tensor] | None
    # what the last layer put out in the dense model, when layers are fitted to it: the one other copy of this size; in
    # a hybrid, where more than the mixer's output is added, what the layer reads and what its dense mixer adds
    stream: torch.Tensor | None
    fits: bool  # whether out_proj is fitted to it
    targets: list[dict[str, Target]]  # of each layer's modules
    stored_dtypes: Mapping[str, torch.dtype]
    progress: Progress

    @property
    def states(self) -> int:
        """Of a dense layer, all groups together."""
        return self.sizes.groups * self.sizes.d_state


def prune_layer(run: Run, block: nn.Module, index: int, label: str) -> tuple[LayerResult, nn.Module]:
    """Prune one layer in place: channels, states, out_proj, the weights of modules, gradient steps, in this order.

    Where a layer keeps all of its channels or states, that step is left out.

    Returns:
        What happened, and a block that computes what `block` now does, faster if channels went.
    """
    architecture, config, progress = run.architecture, run.config, run.progress
    channels, work, seed = None, block, layer_seed(config.seed, index)
    if CHANNEL in config.parts and run.counts.channels[index] < run.sizes.d_inner:
        keep, score = run.counts.channels[index], config.judge_of(CHANNEL)
        channels = prune_channels(
            architecture, block, run.hidden, score, keep, config.repair, seed, progress, f"{label}: channels"
        )
        work = architecture.narrow(block, families.CHANNEL, channels)  # what follows costs only what is left
    mixer, result = architecture.mixer(work), LayerResult(kept=tuple(range(run.states)))
    keep = run.counts.states[index]
    if SSM in config.targets and (COLUMN not in config.parts or keep < run.sizes.d_state):
        prune = _prune_states if COLUMN in config.parts else _prune_entries
        result = prune(architecture, work, run.hidden, index, config, keep, progress, label)
    if run.fits:
        fitted = fit_out_proj(architecture, work, run.hidden, run.stream, progress, f"{label}: out_proj")
        result = replace(result, fitted=fitted)
    if config.modules:
        # after the states, so that x_proj and out_proj are fitted to the pruned scan
        modules = prune_modules(
            architecture, work, run.hidden, run.targets[index], config.ffn_score, progress, f"{label}: Hessians"
        )
        if COLUMN in config.parts and SSM in config.targets:
            architecture.mask_states(mixer, result.kept)  # an update may have woken a silent row
        result = replace(result, modules=tuple(modules))
    if config.refine:
        refined = _refine(run, work, result, seed, f"{label}: refining")
        result = replace(result, refined=refined)
    if not architecture.capabilities.uniform:
        others = prune_linears(architecture, work, run.hidden, config, progress, f"{label}: Hessians of the others")
        result = replace(result, modules=(*result.modules, *others))
        _round(work, run.stored_dtypes, architecture.block_prefix(index))
    else:
        _round(mixer, run.stored_dtypes, architecture.mixer_prefix(index))
    if channels is not None:
        architecture.widen(block, work, families.CHANNEL, channels)
        result = replace(result, channels=tuple(channels))
    return result, work


def _next_target(run: Run, block: nn.Module, label: str) -> None:
    """Take `run.stream` to what the next layer is fitted to; `block` is dense."""
    if run.architecture.capabilities.uniform:
        propagate(block, run.stream, run.progress, label)
    elif run.architecture.mixer(block) is not None:
        run.stream.copy_(run.hidden)
        propagate(block, run.stream, run.progress, label, run.architecture.mixed)


def _prune_other(run: Run, block: nn.Module, index: int, label: str) -> LayerResult:
    """Prune the weights of a layer without a mixer, if weights are pruned at all."""
    modules = prune_linears(run.architecture, block, run.hidden, run.config, run.progress, f"{label}: Hessians")
    _round(block, run.stored_dtypes, run.architecture.block_prefix(index))
    return LayerResult(kept=(), modules=tuple(modules))


def _refine(run: Run, block: nn.Module, result: LayerResult, seed: int, label: str) -> Refinement:
    """Take gradient steps on a layer; one that they do not make better stays as it is."""
    architecture, zeros = run.architecture, result.a_log_zeros is not None
    mixer = architecture.mixer(block)
    before = copy.deepcopy(mixer.state_dict())
    if run.fits:  # what judges must not have been seen: a fit on all samples would look better than any step
        seen = stepped_on(len(run.hidden))
        fit_out_proj(architecture, block, run.hidden[:seen], run.stream[:seen], run.progress, f"{label}, out_proj")
    steps, progress = run.config.refine, run.progress
    refined = refine(architecture, block, run.hidden, run.stream, steps, seed, result.kept, zeros, progress, label)
    if refined.best_step == 0:
        mixer.load_state_dict(before)
    return refined


def _prune_states(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | Iterable[torch.Tensor] | None,
    index: int,
    config: CompressConfig,
    keep: int,
    progress: Progress,
    label: str,
) -> LayerResult:
    """Prune the states of one layer, of each of its groups by itself, and repair what folds into its weights."""
    mixer = architecture.mixer(block)
    kept, mixing, loss, errors = [], None, Loss(), {}
    for group in range(len(architecture.rates(mixer))):
        layer = _judged(architecture, block, hidden, index, group, config, keep, progress, label)
        chosen = choose_states(config.judge_of(COLUMN), layer, keep, config.repair, config.seed)
        states = layer.A_log.shape[1]
        kept += [group * states + state for state in chosen]
        if normal := layer.statistics.normal:
            repair = evaluate(normal.dense(), chosen, config.repair)
            mixing, errors = repair.mixing, {"error": repair.error, "error_unrepaired": repair.error_unrepaired}
        if sums := layer.statistics.contributions:
            removed = sorted(set(range(states)) - set(chosen))
            part = loss_of(sums, removed, config.repair)
            if readouts := layer.statistics.readouts:
                seed = layer_seed(config.seed, index)
                note = f"{label}: C rows"
                fit = fit_readers(architecture, block, hidden, group, readouts, chosen, seed, progress, note)
                architecture.change_skip(mixer, group, fit.skip_change)
                # both on the same held-out stretches
                part = Loss(fit.error * part.energy, fit.error_before * part.energy, part.energy)
            loss += part
            errors = dict(zip(("error", "error_unrepaired"), loss.relative(), strict=True))
    if architecture.capabilities.normed_readers and hidden is not None:
        fit = remove_states(architecture, block, hidden, kept, mixing, config.repair)
        return LayerResult(tuple(kept), fit.error, fit.error_unrepaired, config.repair, fit.spread)
    architecture.mask_states(mixer, kept, mixing)
    return LayerResult(tuple(kept), **errors, repaired=config.repair and bool(errors))


def _prune_entries(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | Iterable[torch.Tensor] | None,
    index: int,
    config: CompressConfig,
    keep: int,
    progress: Progress,
    label: str,
) -> LayerResult:
    """Prune the entries of A_log of one layer."""
    mixer, target = architecture.mixer(block), config.nm or config.sparsity
    A_log, rates = mixer.A_log, architecture.rates(mixer)
    groups = [
        _judged(architecture, block, hidden, index, group, config, keep, progress, label) for group in range(len(rates))
    ]
    if architecture.capabilities.heads:
        A_log.copy_(prune_heads(config.judge, groups, A_log, target, config.seed))
    else:
        A_log.copy_(prune_entries(config.judge, groups[0], target, config.seed))
    zeros = float((A_log == 0).sum()) / A_log.numel()
    return LayerResult(kept=tuple(range(len(rates) * rates[0].shape[1])), a_log_zeros=zeros)


def _judged(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | Iterable[torch.Tensor] | None,
    index: int,
    group: int,
    config: CompressConfig,
    keep: int,
    progress: Progress,
    label: str,
) -> Layer:
    """One group of a layer with what its score wants to know."""
    mixer = architecture.mixer(block)
    rates = architecture.rates(mixer)
    heads = len(mixer.A_log) // len(rates) if architecture.capabilities.heads else None
    count, length = hidden.shape[:2] if isinstance(hidden, torch.Tensor) else (0, 0)
    statistics = statistics_for(config, rates[group], keep, length, heads, count)
    if hidden is not None:
        collect(architecture, block, hidden, statistics.wanted(), progress, f"{label}: statistics", group)
    return Layer(index, rates[group].detach().clone(), statistics)


def _embed(architecture: Architecture, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([architecture.embed(model, sample) for sample in tokens]).float()


def _round(mixer: nn.Module, dtypes: Mapping[str, torch.dtype], prefix: str) -> None:
    for name, parameter in mixer.named_parameters():
        if prefix + name in dtypes:  # what layers share is stored once
            parameter.copy_(parameter.to(dtypes[prefix + name]))


def propagate(
    block: nn.Module,
    hidden: torch.Tensor,
    progress: Progress = silent,
    label: str = "outputs",
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = nn.Module.__call__,
) -> None:
    """Replace every sample of `hidden` (nsamples, L, d_model) by what `block` makes of it, run by `run`."""
    device = device_of(block)
    for i, sample in samples(hidden, device):
        progress(label, i, len(hidden))
        put(hidden, i, run(block, sample))
    settle(hidden, device)
    progress(label, len(hidden), len(hidden))


def collect(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor | Iterable[torch.Tensor],
    statistics: Sequence[Statistic],
    progress: Progress = silent,
    label: str = "statistics",
    group: int = 0,
    backend: str = "auto",
) -> None:
    """Run a layer over all samples, a stretch of time after the other, and feed its hidden states to `statistics`.

    Time is the outer loop because two scores need all samples' states of a time step together. Between stretches a
    sample carries its state (D, N) and the convolution's window, so no stretch is computed twice.

    Args:
        architecture: adapter of the model.
        block: the layer.
        hidden: (nsamples, L, d_model) what the layer reads. Pieces of it, of any lengths, serve for statistics that do
            not need all samples of a time step together.
        statistics: sums to fill; nothing runs when there are none.
        progress: told about tokens.
        label: what to call the work.
        group: the one whose states are wanted, where channels have several B and C.
        backend: of the scan. One that runs on a GPU hands over sums instead of states if nobody needs more.
    """
    if not statistics:
        return
    if not isinstance(hidden, torch.Tensor):
        for piece in hidden:
            collect(architecture, block, piece, statistics, silent, label, group, backend)
        return
    if _sums_suffice(architecture, block, statistics, backend):
        _collect_sums(architecture, block, hidden, statistics, progress, label, group, backend)
        return
    nsamples, length, _ = hidden.shape
    carried, device = _Carried(nsamples), device_of(block)
    groups = list(_slices(nsamples, max(1, PROJECTED[device.type] // STRETCH)))
    stretches = (hidden[rows, start : start + STRETCH] for start in range(0, length, STRETCH) for rows in groups)
    stretches = ahead(stretches, device)
    for start in range(0, length, STRETCH):
        progress(label, start, length)
        for rows in groups:
            for chunk in _chunks(architecture, block, next(stretches), carried, rows, start, group):
                for statistic in statistics:
                    statistic.add(chunk)
        for statistic in statistics:
            statistic.end_of_stretch()
    progress(label, length, length)


def _sums_suffice(architecture: Architecture, block: nn.Module, statistics: Sequence[Statistic], backend: str) -> bool:
    """Whether the layer is where a kernel can sum over its states, and the sums are all that is wanted."""
    if not (architecture.capabilities.gpu_sums and all(statistic.takes_moments for statistic in statistics)):
        return False
    return accelerator(backend, list(block.parameters())) is not None


def _collect_sums(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    statistics: Sequence[Statistic],
    progress: Progress,
    label: str,
    group: int,
    backend: str,
) -> None:
    """As `collect`, a few whole samples at a time, without the states themselves."""
    mixer = architecture.mixer(block)
    nsamples, length, _ = hidden.shape
    groups = list(_slices(nsamples, max(1, SUMMED // length)))
    pieces = ahead((hidden[rows] for rows in groups), device_of(block))
    for rows, piece in zip(groups, pieces, strict=True):
        progress(label, rows.start, nsamples)
        x, z = architecture.expand(mixer, architecture.normed(block, piece))
        moments = architecture.moments(mixer, architecture.scan_inputs(mixer, x, z, fused=True), group, backend)
        for statistic in statistics:
            statistic.add_moments(moments)
    progress(label, nsamples, nsamples)


class _Carried:
    """What each sample takes from one stretch of time to the next; allocated when the shapes are known."""

    def __init__(self, nsamples: int):
        self.nsamples = nsamples
        self.states: torch.Tensor | None = None  # (nsamples, D, N)
        self.history: torch.Tensor | None = None  # (nsamples, d_conv - 1, D)

    def allocate(self, x: torch.Tensor, rates: torch.Tensor, d_conv: int) -> None:
        if self.states is None:
            self.states = x.new_zeros(self.nsamples, *rates.shape, dtype=torch.float32)
            self.history = x.new_zeros(self.nsamples, d_conv - 1, x.shape[2])


def _chunks(
    architecture: Architecture,
    block: nn.Module,
    hidden: torch.Tensor,
    carried: _Carried,
    rows: slice,
    start: int,
    group: int,
) -> Iterator[Chunk]:
    """Hidden states of a group over a stretch (rows, T, d_model), a few samples at a time."""
    mixer = architecture.mixer(block)
    x, z = architecture.expand(mixer, architecture.normed(block, hidden))
    rates = architecture.rates(mixer)[group]  # (D, N)
    carried.allocate(x, rates, mixer.conv_kernel_size)
    history = carried.history[rows]
    inputs = architecture.scan_groups(mixer, architecture.scan_inputs(mixer, x, z, history))[group]
    carried.history[rows] = torch.cat([history, x], dim=1)[:, x.shape[1] :]
    per_sample = (x.shape[1] + 1) * rates.numel() * 4  # bytes of hidden states
    for few in _slices(inputs.batch, max(1, STATE_BYTES[x.device.type] // per_sample)):
        here = slice(rows.start + few.start, rows.start + few.stop)
        part = inputs.sequences(few)
        states = scan_states(part, carried.states[here])
        carried.states[here] = states[:, -1].transpose(1, 2)
        yield Chunk(start, part, states, architecture.gains(mixer, group, part, states[:, 1:]))


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
