"""What a run may aim at in place of a sparsity: a share of the parameters, of the time, an increase of perplexity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmc.compressor.options.config import CompressConfig, configure, sentences
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, COMBINABLE, LAYER
from ssmc.runtime.errors import UsageError

if TYPE_CHECKING:  # options are checked before torch is loaded
    from ssmc.compressor.search.layer_sizes import Layerwise
    from ssmc.runtime.measure.latency import Workload
    from ssmc.runtime.models.families import Dimensions

GOALS = ("target_params", "target_latency", "max_ppl_increase")


class Target(BaseModel):
    """A goal. `split_target` takes it out of the options of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_params: float | None = None  # parameters, as a share of the dense model's
    target_latency: float | None = None  # time, as a share of the dense model's on this device
    max_ppl_increase: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # 0.05: five per cent
    phase: Literal["prefill", "decode"] = "prefill"
    batch: Annotated[int, Field(ge=1)] = 1
    length: Annotated[int, Field(ge=1)] = 512
    latency_table: str | None = None  # a file of an earlier run; None: measure
    per_layer: bool = False  # whether layers may have sizes of their own, which stock loaders cannot use

    @field_validator("target_params", "target_latency")
    @classmethod
    def _inside(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("it is a share of the dense model and lies between 0 and 1, both excluded, such as 0.7")
        return value

    @model_validator(mode="after")
    def _has_a_goal(self) -> Target:
        if not any(getattr(self, goal) is not None for goal in GOALS):
            given = ", ".join(sorted(self.model_fields_set))
            raise ValueError(f"there is no target that {given} could belong to: give one of {', '.join(GOALS)}")
        return self

    @property
    def workload(self) -> Workload:
        """What is timed."""
        from ssmc.runtime.measure.latency import Workload

        return Workload(self.phase, self.batch, self.length)

    @property
    def needs_time(self) -> bool:
        """Whether the search must know how long models take."""
        return self.target_latency is not None or self.target_params is None

    @property
    def most_nats(self) -> float:
        """The bound of the perplexity's increase as a loss in nats a token; infinite where there is none."""
        return math.inf if self.max_ppl_increase is None else math.log1p(self.max_ppl_increase)

    def __str__(self) -> str:
        wanted = []
        if self.target_latency is not None:
            wanted.append(f"{self.target_latency:.4g} of the dense model's time for {self.workload}")
        if self.target_params is not None:
            wanted.append(f"{self.target_params:.4g} of its parameters")
        if self.max_ppl_increase is not None:
            wanted.append(f"a perplexity at most {self.max_ppl_increase:.2%} higher")
        return ", ".join(wanted)


def split_target(options: dict[str, Any]) -> tuple[Target | None, dict[str, Any]]:
    """Take the goal out of the options of a run; what is left is that of an ordinary one.

    Returns:
        The goal, None if there is none, and the other options, the pattern that the search may use among them.

    Raises:
        UsageError: the goal makes no sense, or does not go with the other options.
    """
    own = {
        name: value
        for name, value in options.items()
        if name in Target.model_fields and value is not None and value is not False
    }
    rest = {name: value for name, value in options.items() if name not in Target.model_fields}
    if not own:
        return None, rest
    own = {name: str(value) if isinstance(value, Path) else value for name, value in own.items()}
    try:
        target = Target(**own)
    except ValidationError as error:
        raise UsageError(sentences(error, Target)) from error
    for name in ("sparsity", "states", "widths"):
        if rest.get(name) is not None:
            raise UsageError(f"{name} says what is removed, a target looks for it. Give one or the other.")
    rest["pattern"] = rest.get("pattern") or "+".join(COMBINABLE)
    config = configure(**rest)
    if unfit := [part for part in config.parts if part not in COMBINABLE] or config.modules:
        raise UsageError(
            f"A target is met by removing layers, states and channels, not by {', '.join(unfit)}. Use a pattern of "
            f"{', '.join(COMBINABLE)}, or leave it out."
        )
    return target, rest


def configured(config: CompressConfig, removed: dict[str, float], *, trial: bool = False) -> CompressConfig:
    """The ordinary run that removes these shares and is otherwise as `config` says.

    Args:
        config: with a pattern that has all parts of `removed`.
        removed: by part; parts that are not in it stay whole.
        trial: leave the gradient steps out, which take long and change little about which sizes are best.
    """
    parts = [part for part in COMBINABLE if part in removed]
    options = config.model_dump(exclude_unset=True)
    options["pattern"] = "+".join(parts)
    options["sparsity"] = {part: round(removed[part], 6) for part in parts}
    if trial or parts == [LAYER]:  # of whole layers nothing is left to refine
        options.pop("refine", None)
    if isinstance(config.score, dict):
        options["score"] = {part: score for part, score in config.score.items() if part in parts} or None
    elif config.score is not None:
        options["score"] = {part: config.judge_of(part).value for part in parts}
    return configure(**options)


def configured_layerwise(config: CompressConfig, sizes: Layerwise, dense: Dimensions, *, trial: bool) -> CompressConfig:
    """As `configured`, with the sizes of each layer by itself."""
    parts = sizes.parts(dense)
    options = configured(config, dict.fromkeys(parts, 0.5), trial=trial).model_dump(exclude_unset=True)
    del options["sparsity"]
    listed = {COLUMN: ("states", sizes.states), CHANNEL: ("widths", sizes.widths)}
    return configure(**options, **dict(listed[part] for part in parts))


def removable_layers(n_layer: int, parts: tuple[str, ...]) -> range:
    """How many layers may stay: at least half of them, since the loss of more is beyond what any curve foretells."""
    return range(n_layer - n_layer // 2 if LAYER in parts else n_layer, n_layer + 1)
