"""What a method is, what it is given, and what it hands back.

A method is one thing that can be done to the layers of a model: take states away, take channels away, prune single
weights, take gradient steps. It lives in one file or folder and is registered (`methods.registry`); from then on the
options know its pattern, the pipeline carries it out, and the manifest, the notes and the tables of the command line
have what it says. Built-in methods are registered by `ssmc.compressor.methods`, others by whoever imports them.

The pipeline works in this order: a `Plan` is made once the sizes of the model are known; each method may then look at
the dense model (`prepare`); then every layer goes through the methods of the plan, by their `place`, as a `Job`.

Nothing here imports torch, so that `ssmc compress --help` can ask every method for its words. Built-in methods import
their arithmetic when they run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ssmc.compressor.options.config import CompressConfig
from ssmc.compressor.options.patterns import (
    ATTENTION,
    CHANNEL,
    EXPERT,
    EXPERT_WIDTH,
    HEAD,
    HEAD_DIM,
    LAYER,
    MLP,
    Pattern,
)
from ssmc.runtime.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ssmc.compressor.calibration.draw import Calibration
    from ssmc.compressor.calibration.placement import Stage
    from ssmc.runtime.models.families import Architecture, Dimensions

R = TypeVar("R", bound="Record")

OF_STREAM = (CHANNEL, HEAD, HEAD_DIM, LAYER, MLP, ATTENTION, EXPERT, EXPERT_WIDTH)
"""Patterns that take away more than what the repair of states makes up for."""


@dataclass(frozen=True)
class KeepCounts:
    """How much stays in each layer; a layer that is removed as a whole is counted as if it stayed."""

    states: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What a run will do: worked out once, when the sizes of the model are known, and asked by everybody after.

    Attributes:
        config: what was asked for.
        architecture: adapter of the model's family.
        sizes: of the dense model.
        keep: how many states and channels stay.
        steps: the methods that are carried out in each layer, in their order.
        needs_text: whether anything is decided or fitted by running the model.
        model_config: transformers' configuration of the dense model; None where mixers are pruned by themselves.
    """

    config: CompressConfig
    architecture: Architecture
    sizes: Dimensions
    keep: KeepCounts
    steps: tuple[Method, ...] = ()
    needs_text: bool = False
    model_config: Any = None

    def carries_out(self, name: str) -> bool:
        """Whether a method of this name is among the steps."""
        return any(step.name == name for step in self.steps)

    @property
    def fits_out_proj(self) -> bool:
        """Whether out_proj is fitted to the dense model's residual stream after all else."""
        return self.carries_out("out_proj")

    @property
    def fits_stream(self) -> bool:
        """Whether a hybrid loses more than states, so that all that adds to its residual stream is fitted."""
        hybrid = self.model_config is not None and not self.architecture.capabilities.uniform
        return hybrid and any(part in self.config.parts for part in OF_STREAM)

    @property
    def has_heads(self) -> bool:
        """Whether a head has one A_log for all of its states and channels, as in a Mamba-2."""
        return self.architecture.capabilities.heads

    @property
    def mixes_c_rows(self) -> bool:
        """Whether the repair of removed states folds into their C rows, exactly: B and C are linear in x."""
        return not self.has_heads and not self.architecture.capabilities.normed_readers

    @property
    def follows_dense(self) -> bool:
        """Whether layers are pulled towards what they put out in the dense model, which then has to be known."""
        return any(step.follows_dense for step in self.steps)

    @property
    def follows_stream(self) -> bool:
        """Whether the dense model's residual stream behind every stage of a block must be known."""
        return any(step.follows_stream for step in self.steps)

    @property
    def all_states(self) -> tuple[int, ...]:
        """The states of a dense layer, numbered over all groups."""
        return tuple(range(self.sizes.groups * self.sizes.d_state))

    @property
    def removers(self) -> tuple[BlockMethod, ...]:
        """The methods that take whole blocks away, before the layers that stay are worked on."""
        return tuple(step for step in self.steps if isinstance(step, BlockMethod))

    @property
    def works_inside(self) -> bool:
        """Whether anything is done inside the layers that stay."""
        return any(step.inside for step in self.steps)


class Record:
    """What one method did to one layer; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """How `LayerResult` calls it: a record named "refined" is `layer.refined`."""

    named: ClassVar[set[str]] = set()  # all names, those of methods whose arithmetic is not loaded yet among them

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Record.named.add(cls.name)

    def as_manifest(self) -> dict[str, Any]:
        """What a manifest says of it, by key, among the entries of the layer."""
        return {}


@dataclass(frozen=True)
class LayerResult:
    """What happened to one layer.

    The records of the methods are attributes under their own names: `layer.refined`, `layer.out_proj`; None where the
    method did not work on this layer.
    """

    states_kept: tuple[int, ...]  # numbered over all groups; empty in a layer without a state-space mixer
    channels_kept: tuple[int, ...] | None = None  # None: all
    records: tuple[Record, ...] = ()
    units_kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # by kind; those not named: all

    def find(self, kind: type[R]) -> R | None:
        """The record of this type."""
        return next((record for record in self.records if isinstance(record, kind)), None)

    def __getattr__(self, name: str) -> Any:
        if name not in Record.named:
            raise AttributeError(f"LayerResult has no attribute {name!r}; there are {', '.join(sorted(Record.named))}")
        return next((record for record in self.records if record.name == name), None)

    def findings(self) -> dict[str, Any]:
        """What the methods say of the layer in a manifest; those that did not work leave theirs empty."""
        entry: dict[str, Any] = {"out_proj_error": None, "repaired": False, "error": None, "error_unrepaired": None}
        entry |= {"norm_spread": None, "a_log_zeros": None, "modules": [], "refined": None}
        for record in self.records:
            entry |= record.as_manifest()
        return {key: value for key, value in entry.items() if key != "norm_spread" or value is not None}


@dataclass
class Job:
    """One layer to be worked on, with everything a method may need.

    Attributes:
        plan: of the run.
        block: the layer, in the model.
        index: its number.
        hidden: (nsamples, L, d_model) what the layer reads in the pruned model, or an iterable of pieces of it, of any
            lengths; None when the run needs no text.
        stream: (nsamples, L, d_model) what it put out in the dense model, where the plan follows that. In a hybrid,
            where more than the mixer's output is added, what the layer reads and what its dense mixer adds.
        prepared: what methods worked out on the dense model, by the name of the method.
        stored_dtypes: by tensor name, what the model will be saved as.
        targets: the dense model's residual stream behind each stage of the layer, (nsamples, L, d_model), where the
            plan follows it.
        label: what to call the layer in progress messages.
        progress: told about the work.
        work: what the methods change: `block` itself, or a copy with fewer channels that is written back at the end.
        states_kept: the states that are not silent.
        channels_kept: the channels that are not; None: all.
        units_kept: neurons, query heads and such that are not, by kind; those not named: all.
        records: what the methods did so far.
        worked_out: what methods noted for themselves when the layer was reached, by the name of the method.
    """

    plan: Plan
    block: nn.Module
    index: int
    hidden: torch.Tensor | Iterable[torch.Tensor] | None
    stream: torch.Tensor | None = None
    prepared: Mapping[str, Any] = field(default_factory=dict)
    stored_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    targets: Sequence[torch.Tensor] = ()
    label: str = "layer"
    progress: Progress = NO_PROGRESS
    work: nn.Module = None  # type: ignore[assignment]  # the block, unless something else is given
    states_kept: tuple[int, ...] = ()
    channels_kept: tuple[int, ...] | None = None
    units_kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    worked_out: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.work is None:
            self.work = self.block
        if not self.states_kept and self.mixer is not None:
            self.states_kept = self.plan.all_states

    @property
    def config(self) -> CompressConfig:
        """What was asked for."""
        return self.plan.config

    @property
    def architecture(self) -> Architecture:
        """Adapter of the model."""
        return self.plan.architecture

    @property
    def mixer(self) -> Any:
        """The state-space mixer that is worked on; None in a layer of another kind."""
        return self.architecture.mixer(self.work)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the mixer's linear maps, (out, in), and of conv1d, (D, K), by name; views, not copies."""
        return self.architecture.module_weights(self.mixer)

    @property
    def samples(self) -> torch.Tensor:
        """The text that the layer reads, (nsamples, L, d_model), for methods that need all of it at once."""
        if not hasattr(self.hidden, "shape"):
            raise ValueError("this method needs all samples together, and text")
        return self.hidden  # type: ignore[return-value]

    @property
    def dense_output(self) -> torch.Tensor:
        """What the layer put out in the dense model, (nsamples, L, d_model)."""
        if self.stream is None:
            raise ValueError("the plan does not follow the dense model")
        return self.stream

    @property
    def seed(self) -> int:
        """A seed of this layer's own."""
        return layer_seed(self.config.seed, self.index)

    def report(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work on this layer is."""
        self.progress(f"{self.label}: {what}" if self.label else what, done, total)

    def on(self, samples: slice) -> Job:
        """The same with some of the samples only."""
        return replace(self, hidden=self.samples[samples], stream=self.dense_output[samples])

    def note(self, record: Record) -> None:
        """Add a record; one of the same type before it is replaced."""
        self.records = [*(r for r in self.records if type(r) is not type(record)), record]

    def find(self, kind: type[R]) -> R | None:
        """A record that is there already."""
        return next((record for record in self.records if isinstance(record, kind)), None)

    def result(self) -> LayerResult:
        """What happened."""
        return LayerResult(self.states_kept, self.channels_kept, tuple(self.records), dict(self.units_kept))


@dataclass(frozen=True)
class Survey:
    """The dense model, before anything is removed: what `Method.prepare` may look at.

    Unless a method says `whole_model`, layers have their weights only while they run and in their turn of `stage.each`.
    """

    plan: Plan
    model: nn.Module
    tokens: torch.Tensor | None  # (nsamples, seqlen) calibration samples
    hidden: torch.Tensor | None  # (nsamples, L, d_model) their embeddings, not to be modified
    stage: Stage  # where layers are while they run
    progress: Progress
    stored_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)  # by tensor name, what it will be saved as
    removals: Sequence[Any] = ()  # the first blocks that go as a whole, where an earlier run on the same text knows

    @property
    def text(self) -> torch.Tensor:
        """The calibration samples, where there must be some."""
        if self.tokens is None:
            raise ValueError("this needs calibration samples")
        return self.tokens


@dataclass(frozen=True)
class Outcome:
    """A run that is over: what notes and tables are made from."""

    plan: Plan
    layers: Sequence[LayerResult]
    removed: Sequence[Any] = ()  # `methods.layers.Removal`, in their order
    calibration: Calibration | None = None
    distilled: Mapping[str, Any] | None = None  # what steps on the whole model achieved; None: there were none
    outside: Sequence[Record] = ()  # what happened outside the layers


@dataclass(frozen=True)
class Table:
    """Rows for the command line.

    Attributes:
        title: what stands below it.
        columns: their headings.
        rows: as many cells each as there are columns, or fewer.
        legend: a sentence below the table that says what its numbers are.
        caption: a remark that belongs to some of the rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: str = ""
    caption: str = ""


class Method:
    """One thing that can be done to the layers of a model. Subclass it, and hand an instance to `register_method`."""

    name: ClassVar[str]
    pattern: ClassVar[Pattern | None] = None  # the word that asks for it; None: other options do
    place: ClassVar[int]  # its place among the methods of a layer: smaller numbers come first
    in_every_block: ClassVar[bool] = False  # whether it works on layers without a state-space mixer, too
    leaves: ClassVar[tuple[str, ...]] = ()  # names of the records it leaves
    follows_dense: ClassVar[bool] = False  # whether it needs `Job.dense_output`
    follows_stream: ClassVar[bool] = False  # whether it needs `Job.targets`
    whole_model: ClassVar[bool] = False  # whether it looks at more than a layer at once, see `Survey`
    inside: ClassVar[bool] = True  # whether it does anything inside the layers that stay

    def asked_for(self, plan: Plan) -> bool:
        """Whether a run has this method; `plan` has its options and sizes, not yet its steps."""
        return self.pattern is not None and self.pattern.name in plan.config.parts

    def looks_at_whole(self, plan: Plan) -> bool:
        """Whether it looks at more than a layer at once in this run."""
        return self.whole_model

    def needs_text(self, plan: Plan) -> bool:
        """Whether it decides or fits anything by running the model, where it is asked for."""
        return True

    def check(self, plan: Plan) -> None:
        """Refuse what cannot be done to this model, before any work.

        Raises:
            UsageError: with the reason, and what can be used.
        """

    def keep(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """How many states or channels of each layer it leaves, by the name in `KeepCounts`.

        Raises:
            UsageError: nothing would be removed, nothing would stay, or the numbers do not fit the model.
        """
        return {}

    def shares_samples(self, plan: Plan) -> bool:
        """Whether each of several processes may have a share of the samples (`runtime.collectives`).

        What a method does with them must then come out the same in all processes.
        """
        return False

    def check_text(self, tokens: torch.Tensor) -> None:
        """Refuse calibration samples (nsamples, seqlen) that do not suffice, before any work.

        Raises:
            CalibrationError: saying what is missing.
        """

    def prepare(self, survey: Survey) -> Any:
        """What is decided on the dense model, before any layer is touched; `Job.prepared` has it."""
        return None

    def prepare_outside(self, survey: Survey) -> Record | None:
        """Do what concerns the model outside its layers, in place, before the first of them reads anything."""
        return None

    def finish_outside(self, survey: Survey) -> None:
        """Do what concerns the model outside its layers, in place, when all of them are done."""

    def arrive(self, job: Job, dense: torch.Tensor) -> None:
        """Called when a layer is reached: of methods that follow the stream in a hybrid, the dense outputs elsewhere.

        Args:
            job: of the layer, whose dense output and targets are not known yet; `job.worked_out` takes what the method
                must keep.
            dense: (nsamples, L, d_model) what the layer reads in the dense model, not to be modified.
        """

    def prune(self, job: Job) -> None:
        """Do it to one layer, in place (`job.work`), and leave a record (`job.note`)."""

    def finish(self, job: Job) -> None:
        """Called when the layer has gone through all methods and its weights are rounded to what is stored."""

    def notes(self, outcome: Outcome) -> list[str]:
        """What the user should know besides the result, a sentence or two each."""
        return []

    def tables(self, outcome: Outcome) -> list[Table]:
        """What the command line shows."""
        return []


class BlockMethod(Method):
    """A method that takes whole blocks, or all that is in them of a kind, before the layers that stay are pruned."""

    whole_model = True
    inside = False

    def choose(self, survey: Survey) -> list[Any]:
        """Which blocks go, as `methods.layers.Removal`, in the order they go."""
        raise NotImplementedError

    def remove(self, architecture: Architecture, block: nn.Module) -> None:
        """Do it to one block, in place and without changing a shape."""
        raise NotImplementedError


def layer_seed(seed: int, layer: int) -> int:
    """A seed of its own for every layer."""
    return (seed * 1_000_003 + layer) % 2**63
