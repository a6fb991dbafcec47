"""The ordinary run that leaves the sizes a search found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssmc.compressor.options.config import CompressConfig, configure
from ssmc.compressor.options.patterns import CHANNEL, COLUMN, combinable, pattern_of
from ssmc.compressor.options.quantization import OPTIONS as QUANTIZATION
from ssmc.compressor.search.layer_sizes import Layerwise

if TYPE_CHECKING:
    from ssmc.runtime.models.families import Dimensions


def configured(config: CompressConfig, removed: dict[str, float], *, trial: bool = False) -> CompressConfig:
    """The ordinary run that removes these shares and is otherwise as `config` says.

    Args:
        config: with a pattern that has all parts of `removed`.
        removed: by part; parts that are not in it stay whole.
        trial: leave the gradient steps out, which take long and change little about which sizes are best.
    """
    parts = [part for part in combinable() if part in removed]
    options: dict[str, Any] = config.model_dump(exclude_unset=True)
    options["pattern"] = "+".join(parts)
    options["sparsity"] = {part: round(removed[part], 6) for part in parts}
    if trial or all(pattern_of(part).whole_blocks for part in parts):  # of whole layers nothing is left to refine
        options.pop("refine", None)
    if trial:  # codes of few bits cost as much in every size
        options = {name: value for name, value in options.items() if name not in QUANTIZATION}
    if isinstance(config.score, dict):
        options["score"] = {part: score for part, score in config.score.items() if part in parts} or None
    elif config.score is not None:
        options["score"] = {part: config.score_of(part) for part in parts}
    return configure(**options)


def configured_layerwise(config: CompressConfig, sizes: Layerwise, dense: Dimensions, *, trial: bool) -> CompressConfig:
    """As `configured`, with the sizes of each layer by itself."""
    parts = sizes.parts(dense)
    options = configured(config, dict.fromkeys(parts, 0.5), trial=trial).model_dump(exclude_unset=True)
    del options["sparsity"]
    listed = {COLUMN: ("states", sizes.states), CHANNEL: ("widths", sizes.widths)}
    return configure(**options, **dict(listed[part] for part in parts))
