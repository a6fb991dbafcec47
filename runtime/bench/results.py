"""What a benchmark found out: frozen dataclasses and their JSON.

`bench.json` is `Results.to_json()`: the fields below by name, durations in seconds, sizes in bytes, losses in nats.
Ratios are dense over compressed: above 1 the compressed model is faster or smaller.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ssmc.runtime.bench.settings import Settings
from ssmc.runtime.measure.conditions import Conditions
from ssmc.runtime.measure.memory import Memory
from ssmc.runtime.measure.perplexity import ExcessLoss, Perplexity
from ssmc.runtime.measure.quality import TextInfo
from ssmc.runtime.measure.recall import KindLoss
from ssmc.runtime.measure.timing import Ratio, Timing
from ssmc.runtime.models.families import Dimensions
from ssmc.runtime.models.memory import Footprint, Room, rooms
from ssmc.runtime.sparse24 import Sparse24Report

SCHEMA = "ssmc-bench/1"


@dataclass(frozen=True)
class WeightFiles:
    """Size of the weights on disk in one format."""

    name: str
    format: str  # "transformers", "mamba-ssm" or "onnx"
    bytes: int


@dataclass(frozen=True)
class Model:
    """One model: what is exact about it, and what needs no interleaving."""

    name: str
    dense: bool
    recipe: dict[str, Any] | None  # how it was compressed, where a manifest says
    stored_dtype: str  # of the weights on disk; "mixed" if several
    dimensions: Dimensions
    parameters: int  # tied embedding once
    files: tuple[WeightFiles, ...]  # the first is the one that was timed
    state_bytes: int  # recurrent state per sequence, all layers, float32
    memory: Memory | None
    perplexity: Perplexity | None
    excess: ExcessLoss | None  # above the dense model
    runtime: str = "torch"  # what computes it: "torch" or "onnx"
    sparse24: Sparse24Report | None = None  # of an export as sparse24: which modules run sparse
    smaller: bool = False  # a plain smaller dense model, named to compare with
    footprint: Footprint | None = None  # with sequences as long as the longest prefill; None where that is not known
    recall: tuple[KindLoss, ...] = ()  # the loss by kind of token, where perplexity was measured


@dataclass(frozen=True)
class Measurement:
    """One workload timed on several models in turns.

    Attributes:
        kind: "prefill" (L tokens into a fresh cache, last logits), "decode" (one token of every sequence), "graph" (the
            same from a CUDA graph), "scan" (the first layer's selective scan alone), "part" (a module of the first
            layer, or the head), "throughput" (decoding at ever larger batches, each model alone; without those that no
            longer fit) or "stock" (the dense model's prefill, by transformers' own loop and by our scan).
        length: tokens of every sequence; 1 in decoding.
        batch: sequences at once.
        timings: name of the model (in "stock": of the loop) -> seconds per call. ONNX exports have only "prefill" and
            "decode": their graphs have no parts to time alone.
        ratios: the same names but the first -> the first's seconds over theirs, paired by round; empty in "throughput".
        part: what is timed in "part": "in_proj", "scan", ...
    """

    kind: str
    length: int
    batch: int
    timings: dict[str, Timing]
    ratios: dict[str, Ratio]
    part: str = ""

    @property
    def tokens(self) -> int:
        """Tokens a call processes."""
        return self.length * self.batch


@dataclass(frozen=True)
class Results:
    """A whole benchmark."""

    conditions: Conditions
    settings: Settings
    text: TextInfo | None
    models: tuple[Model, ...]  # the dense one first
    measurements: tuple[Measurement, ...]
    notes: tuple[str, ...]  # what was left out, and why a figure may mislead
    load_average_after: tuple[float, float, float] | None

    @property
    def dense(self) -> Model:
        """What the others are compared with."""
        return self.models[0]

    @property
    def compressed(self) -> tuple[Model, ...]:
        """Everything else."""
        return self.models[1:]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models."""
        return tuple(model.name for model in self.models)

    @property
    def rooms(self) -> tuple[Room, ...]:
        """The amounts of memory that sequences are counted for; this machine's is that of the device."""
        gpu = self.conditions.gpu
        return rooms(self.conditions.memory_bytes if gpu is None else gpu.memory_bytes)

    def of_kind(self, kind: str) -> tuple[Measurement, ...]:
        """The measurements of one kind, by batch and length."""
        found = (m for m in self.measurements if m.kind == kind)
        return tuple(sorted(found, key=lambda m: (m.batch, m.length)))

    def to_json(self) -> dict[str, Any]:
        """Everything in types JSON has, with derived figures (medians, tokens/s, verdicts) beside the samples."""
        return {
            "schema": SCHEMA,
            "conditions": asdict(self.conditions) | {"load_average_after": self.load_average_after},
            "settings": asdict(self.settings),
            "text": None if self.text is None else asdict(self.text),
            "models": [_model(model, self.rooms) for model in self.models],
            "measurements": [_measurement(m) for m in self.measurements],
            "notes": list(self.notes),
        }


def _model(model: Model, several: tuple[Room, ...]) -> dict[str, Any]:
    memory = model.memory
    return asdict(model) | {
        "footprint": None if model.footprint is None else model.footprint.to_json(several),
        "dimensions": model.dimensions.as_dict(),
        "memory": None if memory is None else asdict(memory) | {"sequences": memory.sequences},
        "perplexity": None if model.perplexity is None else asdict(model.perplexity),
        "sparse24": None if model.sparse24 is None else model.sparse24.to_json(),
    }


def _measurement(measurement: Measurement) -> dict[str, Any]:
    timings = {}
    for name, timing in measurement.timings.items():
        low, high = timing.quartiles
        timings[name] = {
            "median": timing.median,
            "quartiles": [low, high],
            "tokens_per_second": measurement.tokens / timing.median,
            "calls_per_sample": timing.calls,
            "samples": list(timing.seconds),
        }
    return {
        "kind": measurement.kind,
        "part": measurement.part,
        "length": measurement.length,
        "batch": measurement.batch,
        "timings": timings,
        "ratios": {name: asdict(ratio) | {"verdict": ratio.verdict} for name, ratio in measurement.ratios.items()},
    }
