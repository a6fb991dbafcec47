"""A report in words and in formatted tables, shared by the command line and the page: no numbers are made here."""

# ruff: noqa: RUF001 (typographic dashes and multiplication signs are meant)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmc.runtime.bench.results import Measurement, Model, Results
from ssmc.runtime.measure.memory import Memory
from ssmc.runtime.measure.recall import FAR, KindLoss, of_kind
from ssmc.runtime.measure.timing import MIN_ROUNDS, Ratio, Timing
from ssmc.runtime.models.memory import format_bytes

KINDS = {
    "prefill": "Prefill",
    "decode": "Decode",
    "graph": "Decode with a CUDA graph",
    "throughput": "Decode, each model alone",
    "scan": "Scan alone, one layer",
    "stock": "Prefill, dense",
}
DECODING = ("decode", "graph", "throughput")
VERDICTS = {
    "no difference": "no difference beyond the noise of this run",
    "unclear": f"but fewer than {MIN_ROUNDS} rounds cannot tell",
}
SPARSE24_COLUMNS = ("shape", "dense", "sparse", "ratio", "used")  # of `sparse24_rows`

KIND_NAMES = {
    "far": f"tokens seen more than {FAR} back",
    "repeated": "tokens seen before",
    "rare": "rare tokens seen before",
    "new": "new tokens",
}
"""Kinds of tokens in words; see `ssmc.runtime.measure.recall`."""

SHOWN_KINDS = tuple(KIND_NAMES)

WORTH_SAYING = 1.005
"""A size that differs by less than this factor is called the same."""

MEMORY_NOISE = 1.03
"""Peak memory is read once and wanders by about a percent between runs."""

MIN_WINDOWS = 8
"""Fewer windows give no standard error to judge by; of 8, 2.4 of them hold the mean with 95 % (Student's t)."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a figure for every model, and for every model but the first how it compares."""

    metric: str
    values: tuple[str, ...]
    changes: tuple[str, ...]
    verdicts: tuple[str, ...]  # "better", "worse", "same" or "" for each change


def summary_rows(report: Results) -> list[Row]:
    """What matters at a glance: sequences in memory, sizes, the longest prefill, decode, scan, perplexity, recall."""
    rows = [*footprint_rows(report), *size_rows(report), *memory_rows(report)[-1:]]
    for kind in ("prefill", "decode", "graph", "scan"):
        found = report.of_kind(kind)
        if kind in DECODING:
            rows += [timing_row(m, report.names) for m in found]
        elif found:
            smallest = [m for m in found if m.batch == found[0].batch]
            rows.append(timing_row(smallest[-1], report.names))
    return rows + perplexity_rows(report) + recall_rows(report, SHOWN_KINDS[:1])


def footprint_rows(report: Results) -> list[Row]:
    """What a sequence as long as the longest prefill keeps, and how many fit beside the weights; counted."""
    models, rows = report.models, []
    known = [model.footprint.sequence.total if model.footprint else None for model in models]
    shown = tuple("" if count is None else format_bytes(count) for count in known)
    rows.append(_counted(f"One sequence of {max(report.settings.lengths):,} tokens", shown, known, less=True))
    for room in report.rooms:
        counts = [model.footprint.fitting(room) if model.footprint else None for model in models]
        absent = ["weights do not fit" if model.footprint else "" for model in models]
        shown = tuple(no if count is None else f"{count:,}" for count, no in zip(counts, absent, strict=True))
        rows.append(_counted(f"Sequences, {room.name}", shown, counts))
    return rows


def _counted(metric: str, shown: tuple[str, ...], counts: Sequence[int | None], less: bool = False) -> Row:
    """A row of exact counts, of which some may be missing; more is better, or less."""
    first, changes, verdicts = counts[0], [], []
    for count in counts[1:]:
        if not count or not first:
            changes.append("")
            verdicts.append("")
            continue
        factor = first / count if less else count / first
        changes.append(f"{factor:.2f}×")
        verdicts.append("better" if factor > WORTH_SAYING else "worse" if factor < 1 / WORTH_SAYING else "same")
    return Row(metric, shown, tuple(changes), tuple(verdicts))


def size_rows(report: Results) -> list[Row]:
    """Exact figures: parameters, weights on disk, recurrent state."""
    return [
        _size_row(report, "Parameters", lambda m: m.parameters, lambda n: f"{n:,}"),
        _size_row(report, "Weights on disk", lambda m: m.files[0].bytes, format_bytes),
        _size_row(report, "Recurrent state per sequence", lambda m: m.state_bytes, format_bytes),
        _size_row(report, "d_state", lambda m: m.dimensions.d_state, str),
    ]


def memory_rows(report: Results) -> list[Row]:
    """High-water marks; empty where a process gave no answer."""
    if any(model.memory is None for model in report.models):
        return []
    gpu = report.conditions.device == "cuda"
    rows = [] if gpu else [_memory_row(report, "Python and libraries, no model", lambda m: m.libraries)]
    rows.append(_memory_row(report, "Peak while loading", lambda m: m.loaded))
    if gpu:
        rows.append(_memory_row(report, "Reserved by the allocator", lambda m: m.reserved))
    else:
        rows.append(_memory_row(report, "Peak without the libraries", lambda m: m.above_libraries))
    steady = "Allocated between steps of decoding" if gpu else "Resident between steps of decoding"
    rows.append(_memory_row(report, steady, lambda m: m.steady))
    if gpu:
        rows.append(_memory_row(report, "The same, reserved by the allocator", lambda m: m.steady_reserved))
    return [*rows, _memory_row(report, "Peak GPU memory" if gpu else "Peak memory of the process", lambda m: m.peak)]


def sequence_rows(report: Results) -> list[Row]:
    """What a sequence takes while decoding and how many fit; empty where a process gave no answer."""
    if any(model.memory is None for model in report.models):
        return []
    gpu = report.conditions.device == "cuda"
    rows = [_memory_row(report, "Recurrent state of a sequence, in memory", lambda m: m.state)]
    if gpu:
        rows.append(_memory_row(report, "One more sequence, with activations", lambda m: m.sequence))
    counts = [model.memory.sequences for model in report.models]
    factors = [count / counts[0] if counts[0] else 1.0 for count in counts[1:]]
    verdicts = tuple("better" if f > MEMORY_NOISE else "worse" if f < 1 / MEMORY_NOISE else "same" for f in factors)
    name = "Sequences that fit in GPU memory" if gpu else "Sequences whose recurrent states fit in free memory"
    return [*rows, Row(name, tuple(f"{n:,}" for n in counts), tuple(f"{f:.2f}×" for f in factors), verdicts)]


def part_rows(report: Results) -> list[Row]:
    """The parts of the first layer, and the head; all of one length and batch."""
    return [replace(timing_row(m, report.names), metric=m.part) for m in report.of_kind("part")]


def token_rows(report: Results) -> list[Row]:
    """Tokens per second of every prefill and of decoding at every batch size."""
    names, rows = report.names, []
    absent = tuple("does not fit" if model.runtime == "torch" else "" for model in report.models)
    for measurement in (m for kind in ("prefill", *DECODING) for m in report.of_kind(kind)):
        timings = [measurement.timings.get(name) for name in names]
        speeds = tuple(
            no if t is None else f"{measurement.tokens / t.median:,.0f}" for t, no in zip(timings, absent, strict=True)
        )
        ratios = [measurement.ratios.get(name) for name in names[1:]]
        changes = tuple("" if r is None else format_ratio(r) for r in ratios)
        rows.append(
            Row(workload_name(measurement), speeds, changes, tuple("" if r is None else _better(r) for r in ratios))
        )
    return rows


def sparse24_rows(report: Results) -> list[Row]:
    """Every 2:4 linear map of every model: shape, dense and sparse time, their ratio, and which one is used; none where
    there are no sparse tensor cores, which a note of the report says."""
    rows = []
    for model in report.models:
        measured = model.sparse24 is not None and not model.sparse24.reason
        for m in model.sparse24.modules if measured else ():
            times = ("", "", "")
            if m.ratio is not None:
                times = (format_timing(m.dense), format_timing(m.sparse), format_ratio(m.ratio))
            used = f"sparse, {m.backend}" if m.kept else f"dense{m.reason and ': '}{m.reason}"
            rows.append(Row(m.name.removeprefix("backbone."), (" x ".join(map(str, m.shape)), *times, used), (), ()))
    return rows


def timing_row(measurement: Measurement, names: Sequence[str] | None = None) -> Row:
    """One workload: median and quartiles for each, and the paired ratio.

    Args:
        measurement: the workload.
        names: the columns; those that were not timed stay empty. None: those that were.
    """
    names = tuple(measurement.timings) if names is None else names
    timings = [measurement.timings.get(name) for name in names]
    ratios = [measurement.ratios.get(name) for name in names[1:]]
    return Row(
        metric=workload_name(measurement),
        values=tuple("" if timing is None else format_timing(timing) for timing in timings),
        changes=tuple("" if ratio is None else format_ratio(ratio) for ratio in ratios),
        verdicts=tuple("" if ratio is None else _better(ratio) for ratio in ratios),
    )


def perplexity_rows(report: Results) -> list[Row]:
    """Perplexity, and the loss above the dense model in nats; empty if it was not measured."""
    if report.dense.perplexity is None:
        return []
    values, changes, verdicts = [], [], []
    for model in report.models:
        stderr = model.perplexity.stderr
        spread = "" if stderr is None else f" (±{_digits(model.perplexity.ppl * stderr)})"
        values.append(f"{model.perplexity.ppl:.5g}{spread}")
        if model.excess is not None:
            error = "" if model.excess.stderr is None else f", ±{model.excess.stderr:.4f}"
            changes.append(f"{model.excess.nats:+.4f} (nats{error})")
            verdicts.append(_excess_verdict(model))
    return [Row("Perplexity", tuple(values), tuple(changes), tuple(verdicts))]


def recall_rows(report: Results, kinds: Sequence[str] = SHOWN_KINDS) -> list[Row]:
    """Loss by kind of token in nats, and what is lost above the dense model; nothing of kinds that the text lacks."""
    rows, few = [], report.dense.perplexity is None or report.dense.perplexity.windows < MIN_WINDOWS
    for kind in kinds:
        losses = [of_kind(model.recall, kind) for model in report.models]
        found = [loss for loss in losses if loss is not None]
        if len(found) < len(losses):
            continue
        values = tuple(f"{loss.nll:.4f}{_error(loss.stderr)}" for loss in found)
        changes = tuple(f"{loss.excess:+.4f}{_error(loss.excess_stderr)}" for loss in found if loss.excess is not None)
        verdicts = tuple("" if few else _kind_verdict(loss) for loss in found[1:])
        rows.append(Row(f"Loss on {KIND_NAMES[kind]}", values, changes, verdicts))
    return rows


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" (±{stderr:.4f})"


def _kind_verdict(loss: KindLoss) -> str:
    if loss.excess is None or not loss.excess_stderr:
        return ""
    return "same" if abs(loss.excess) <= 2.4 * loss.excess_stderr else "worse" if loss.excess > 0 else "better"


def findings(report: Results) -> list[str]:
    """The outcome in plain sentences, what does not help included; one list for every compressed model."""
    sentences = []
    for model in report.compressed:
        several = len(report.compressed) > 1
        who = model.name if several else "The compressed model"
        prefix = f"{model.name} at " if several else ""
        sentences += _sequences_sentence(report, who, model)
        sentences.append(_sizes_sentence(who, report.dense, model))
        for kind in ("prefill", "decode"):
            measured = [m for m in _extremes(report.of_kind(kind), kind) if model.name in m.ratios]
            sentences += [_speed_sentence(prefix, model, m) for m in measured]
        sentences += _scan_sentence(report, model)
        sentences += _loss_sentence(prefix, model)
    return sentences


def workload_name(measurement: Measurement) -> str:
    """ "Prefill, 512 tokens, batch 8"."""
    name = measurement.part or KINDS[measurement.kind]
    if measurement.kind not in DECODING:
        name += f", {measurement.length} tokens"
    return f"{name}, batch {measurement.batch}"


def format_timing(timing: Timing) -> str:
    """Median and quartiles, "12.3 ms (12.1–12.9)"."""
    low, high = timing.quartiles
    unit, factor = ("s", 1) if timing.median >= 10 else ("ms", 1e3) if timing.median >= 1e-4 else ("µs", 1e6)
    return f"{_digits(timing.median * factor)} {unit} ({_digits(low * factor)}–{_digits(high * factor)})"


def format_ratio(ratio: Ratio) -> str:
    """ "1.08× (1.05–1.10)"; the brackets hold the median's confidence interval."""
    return f"{ratio.median:.2f}× ({ratio.low:.2f}–{ratio.high:.2f})"


def format_excess(model: Model) -> str:
    """A difference in loss, "+0.0031 nats (±0.0004)"; the brackets hold its standard error."""
    stderr = "" if model.excess.stderr is None else f" (±{model.excess.stderr:.4f})"
    return f"{model.excess.nats:+.4f} nats{stderr}"


def _digits(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _memory_row(report: Results, metric: str, read: Callable[[Memory], int | None]) -> Row:
    return _size_row(
        report, metric, lambda model: model.memory and read(model.memory), format_bytes, noise=MEMORY_NOISE
    )


def _size_row(
    report: Results, metric: str, read: Callable[[Model], Any], show: Callable[[Any], str], noise: float = WORTH_SAYING
) -> Row:
    sizes = [read(model) for model in report.models]
    factors = [sizes[0] / size if size else 1.0 for size in sizes[1:]]
    verdicts = ["better" if f > noise else "worse" if f < 1 / noise else "same" for f in factors]
    return Row(metric, tuple(show(s) for s in sizes), tuple(f"{f:.2f}×" for f in factors), tuple(verdicts))


def _better(ratio: Ratio) -> str:
    return {"faster": "better", "slower": "worse", "no difference": "same", "unclear": ""}[ratio.verdict]


def _excess_verdict(model: Model) -> str:
    nats, stderr = model.excess.nats, model.excess.stderr
    if stderr is None or model.perplexity.windows < MIN_WINDOWS:
        return ""
    return "same" if abs(nats) <= 2.4 * stderr else "worse" if nats > 0 else "better"


def _extremes(measurements: tuple[Measurement, ...], kind: str) -> list[Measurement]:
    """The longest prefill of a single small batch; every batch of decoding."""
    if kind == "decode":
        return list(measurements)
    return [max(measurements, key=lambda m: (-m.batch, m.length))] if measurements else []


def _sequences_sentence(report: Results, who: str, model: Model) -> list[str]:
    """How many sequences a GiB holds, which is what a smaller state is worth."""
    room, dense = report.rooms[0], report.dense.footprint
    if dense is None or model.footprint is None:
        return []
    before, after = (found.fitting(room) or 0 for found in (dense, model.footprint))
    length = dense.sequence.length
    factor = f", {after / before:.2f}× as many" if before else ""
    return [
        f"{room.name}: {who} has room for {after:,} sequences of {length:,} tokens, the dense model for "
        f"{before:,}{factor}."
    ]


def _sizes_sentence(who: str, dense: Model, model: Model) -> str:
    parameters = _change(dense.parameters, model.parameters, "fewer", "more")
    state = _change(dense.state_bytes, model.state_bytes, "less", "more")
    text = f"{who} has {parameters} parameters and {state} recurrent state per sequence"
    if model.stored_dtype != dense.stored_dtype:
        return f"{text}; its weights are stored as {model.stored_dtype}, the dense ones as {dense.stored_dtype}."
    return f"{text}; its weights take {_change(dense.files[0].bytes, model.files[0].bytes, 'less', 'more')} disk."


def _change(before: int, after: int, less: str, more: str) -> str:
    return f"{abs(1 - after / before):.1%} {less if after <= before else more}"


def _speed_sentence(who: str, model: Model, measurement: Measurement) -> str:
    ratio = measurement.ratios[model.name]
    verdict = VERDICTS.get(ratio.verdict, ratio.verdict)
    return f"{workload_name(measurement)}: {who}{format_ratio(ratio)} the dense model's speed, {verdict}."


def _scan_sentence(report: Results, model: Model) -> list[str]:
    """How much of the scan's gain is left end to end, at the longest prefill both were timed at."""
    scans = {(m.length, m.batch): m for m in report.of_kind("scan")}
    both = [m for m in report.of_kind("prefill") if (m.length, m.batch) in scans]
    if not both:
        return []
    prefill = max(both, key=lambda m: m.length)
    scan = scans[prefill.length, prefill.batch]
    if not {report.dense.name, model.name} <= set(scan.timings):
        return []
    share = scan.timings[report.dense.name].median * report.dense.dimensions.n_layer
    share /= prefill.timings[report.dense.name].median
    sure = prefill.ratios[model.name].verdict in ("faster", "slower")
    noise = "" if sure else ", which this run cannot tell from no gain"
    return [
        f"The scan alone runs {scan.ratios[model.name].median:.2f} times as fast at {scan.length} tokens. It takes "
        f"about {min(share, 1):.0%} of the dense model's prefill, so the whole prefill runs "
        f"{prefill.ratios[model.name].median:.2f}× as fast{noise}."
    ]


def _loss_sentence(who: str, model: Model) -> list[str]:
    if model.excess is None:
        return []
    remarks = {"same": ", within the noise of this text", "": ""}
    remarks |= dict.fromkeys(("better", "worse"), ", beyond the noise of this text")
    remark = remarks[_excess_verdict(model)]
    text = f"Loss per token on this text: {who}{format_excess(model)} more than the dense model{remark}"
    far = of_kind(model.recall, "far")
    if far is not None and far.excess is not None:
        text += f"; on {KIND_NAMES['far']} (recall) {far.excess:+.4f}{_error(far.excess_stderr)}"
    return [text + "."]
