"""The models that the consumers are given: dense and pruned, of every family, in every format."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tests.support
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.exporters.verify import with_epsilons_of
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.config_reading import read_config
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.stock_kernels import guard_kernels
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path
from tests.support.families import FAMILIES, TINY_VOCAB, roughen, with_tokenizer

LENGTH = 48  # tokens that a consumer reads
TRAINED = ("tiny", "tiny-mamba2", "tiny-hybrid")
DENSE = "dense"
LIMITED, LIMITED_AT_FIRST, UNLIMITED = "limited", "limited at first", "unlimited"
"""What may be done about time steps: what the model asks for, that in the prompt only, nothing."""
NO_LIMITS = (0.0, math.inf)
SMALL = {"nsamples": 8, "seqlen": 256}  # of the calibration: what is right does not depend on it


@dataclass(frozen=True)
class Cut:
    """A way to prune.

    Attributes:
        name: for people.
        pattern: of `compress`.
        sparsity: of each part of it.
        families: it is tried on; none: all.
    """

    name: str
    pattern: str
    sparsity: float | Mapping[str, float]
    families: tuple[str, ...] = ()


CUTS = {
    "tiny": (
        Cut("8 of 16 states", "column", 0.5),
        Cut("4 of 16 states", "column", 0.75),
        Cut("8 states, 3/4 of the channels", "column+channel", {"column": 0.5, "channel": 0.25}),
    ),
    "tiny-mamba2": (
        Cut("32 of 64 states", "column", 0.5),
        Cut("half of the heads", "channel", 0.5),
    ),
}
WORDED = json.loads((Path(tests.support.__file__).parent / "configs_457.json").read_text(encoding="utf-8"))
"""Configurations as hubs have them, in the words of transformers 4.57, which both releases read."""
CHANGED = {
    "bamba": {"hidden_size": 32, "mamba_n_heads": 8},  # rotary positions turn an even part of a head
    "falcon_h1": {"head_dim": 6},  # which the published ones say, and mlx-lm wants to read
}
_ONE = {"hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1, "mamba_n_heads": 8}
WIDE = {
    "bamba": _ONE,
    "granitemoehybrid": _ONE,
    "jamba": {name: _ONE[name] for name in _ONE if name != "mamba_n_heads"},
    "falcon_h1": {"head_dim": 32},
    "nemotron_h": {"head_dim": 32},
    "zamba2": {"hidden_size": 32, "n_mamba_heads": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    | {"attention_hidden_size": 64, "attention_head_dim": 32, "kv_channels": 16, "num_query_groups": 2},
}
"""The same with heads of attention of 32 numbers, the fewest that vLLM takes on a CPU."""
VARIANTS = {
    "falcon_h1-unscaled": ("falcon_h1", {"attention_in_multiplier": 1.0, "key_multiplier": 1.0}),
    "jamba-dense": ("jamba", {"num_experts": 1}),
}
"""Models of a family whose software does something else with others: name -> family, and what is changed."""
CALM = {"zamba2": ("in_proj", 0.5)}
"""Matrices that are multiplied by a factor, without which rounding the weights to float32 moves logits by 1e-4."""
OTHER_CUTS = (Cut("half of the states", "column", 0.5),)


def models(
    folder: Path, wanted: Collection[str] = (), changed: Mapping[str, Mapping[str, Any]] = CHANGED
) -> dict[str, str]:
    """Every model by name, and what it is loaded from; the random ones are written into a folder.

    Args:
        folder: to write to.
        wanted: their first words; none: all.
        changed: what is changed of the configurations that hubs have, by family.
    """
    found = {name: name for name in TRAINED if not wanted or name in wanted}
    for name, (family, changes) in ({family: (family, {}) for family in FAMILIES} | VARIANTS).items():
        if wanted and name not in wanted:
            continue
        directory = folder / name / "model"
        if not directory.is_dir():
            stored = WORDED[family] | {"vocab_size": TINY_VOCAB} | dict(changed.get(family, {})) | changes
            _save_random(directory, stored, *CALM.get(family, ("", 1.0)))
        found[f"{name}, random"] = str(directory)
    return found


@torch.no_grad()
def _save_random(directory: Path, stored: dict[str, Any], calm: str, factor: float) -> None:
    """A random model with a tokenizer whose config.json is exactly `stored`; matrices named `calm` take a factor."""
    model = roughen(AutoModelForCausalLM.from_config(read_config(stored, Path("config.json"))))
    for name, matrix in model.named_parameters():
        if calm and name.endswith(f"{calm}.weight"):
            matrix.mul_(factor)
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    with_tokenizer(directory)


def prune(name: str, source: str, folder: Path) -> Iterator[tuple[str, str | Path]]:
    """The dense model and the pruned ones: what was done, and what holds the masked model.

    Args:
        name: of the model.
        source: it is loaded from.
        folder: to write to, one for each cut.
    """
    yield DENSE, source
    own = {} if name in TRAINED else {"calib": Path(source).parent / "text.jsonl", "nsamples": 4, "seqlen": 48}
    for number, cut in enumerate(CUTS.get(name, OTHER_CUTS)):
        out = folder / str(number)
        if not out.is_dir():
            compress(source, out=out, pattern=cut.pattern, sparsity=cut.sparsity, **(SMALL | own))
        yield cut.name, out


def exported(masked: str | Path, cut: str, format: str, options: Mapping[str, Any], dense: bool, folder: Path) -> Path:
    """The folder of an export, made unless it is there; of a dense model that is read as it is, its own.

    Args:
        masked: an artefact, or a dense model.
        cut: what was done to it.
        format: of the export.
        options: of the format.
        dense: whether a dense model is read as it is.
        folder: to write to.

    Raises:
        SsmcError: the model does not go into this format.
    """
    if cut == DENSE and dense:
        return find_directory(str(masked))
    out = folder / "-".join([format, *options.values()])
    if not out.is_dir():
        export(masked, format=format, out=out, **options)
    return out


def read_tokens(source: str) -> list[int]:
    """The text that a model is asked about: the beginning of the held-out stories."""
    checkpoint = load_checkpoint(source)
    return tokenize(read_texts(heldout_path()), load_tokenizer(checkpoint))[:LENGTH].tolist()


@torch.inference_mode()
def reference(masked: str | Path, tokens: list[int], first: int, shrunk: Path | None = None) -> dict[str, torch.Tensor]:
    """(L, V) float64 logits of L tokens by stock transformers, in float64, by what is done about time steps.

    So what is found is a consumer's own rounding, and not the sum of two. There is no scan of ours in it.

    Args:
        masked: of the original shape.
        tokens: ids.
        first: tokens that are read as a prompt where the others are read one by one.
        shrunk: an export of it, if it is pruned: norms over fewer channels, states or coordinates of the stream have,
            in effect, another epsilon; no file can say it, so the masked model gets it.

    Returns:
        The model's under LIMITED. Where the model limits its time steps, which some consumers do not, also those of a
        model that never does, and of one that does only in the prompt.
    """
    exact = {"dtype": torch.float64, "experts_implementation": "eager"}  # another has no float64
    model = AutoModelForCausalLM.from_pretrained(find_directory(str(masked)), **exact)
    if shrunk is not None:
        with_epsilons_of(architecture_for(model.config.model_type), model, AutoConfig.from_pretrained(shrunk))
    model = guard_kernels(model).eval()
    ids = torch.tensor([tokens])
    found = {LIMITED: model(ids).logits[0].double()}
    limits = {module: module.time_step_limit for module in model.modules() if _limits(module)}
    for name, count in ((LIMITED_AT_FIRST, first), (UNLIMITED, 0)) if limits else ():
        for module, (least, most) in limits.items():
            low, high = torch.zeros(1, len(tokens), 1), torch.full((1, len(tokens), 1), math.inf)
            low[:, :count], high[:, :count] = least, most
            module.time_step_limit = low, high  # of every token, which `clamp` takes as it does numbers
        found[name] = model(ids).logits[0].double()
    return found


def _limits(module: torch.nn.Module) -> bool:
    """Whether a mixer limits its time steps."""
    return tuple(getattr(module, "time_step_limit", NO_LIMITS)) != NO_LIMITS
