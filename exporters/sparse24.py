"""What is special about an export as 2:4: half precision with exact zeros, its modules, and what rounding did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ssmc.exporters.cutting import Shrunk
from ssmc.exporters.format import Job
from ssmc.exporters.runtimes import Runtime
from ssmc.exporters.source import Source
from ssmc.exporters.verify import Comparison, compare
from ssmc.runtime.errors import CheckpointError, UsageError, VerificationError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.sparse24 import HALF, backends_for, is_24, obstacle

FORMAT = "sparse24"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PATTERN = "2:4"
MARGIN = 4  # how often the effect of random changes of half precision's size rounding to it may have


@dataclass(frozen=True)
class Sparse24Module:
    """A module whose weight is 2:4."""

    name: str  # "backbone.layers.0.mixer.in_proj"
    shape: tuple[int, ...]  # (out, in); (D, K) for conv1d
    backends: tuple[str, ...]  # that take it
    remark: str | None  # why none does


@dataclass(frozen=True)
class Rounding:
    """What rounding to half precision did to the logits of the masked model."""

    max_difference: float
    tolerance: float
    scale: float  # largest logit


@dataclass(frozen=True)
class Half:
    """What is special about an export as sparse24."""

    dtype: torch.dtype
    modules: tuple[Sparse24Module, ...]
    rounding: Rounding | None = None  # once it is written


def round_to_half(source: Source, shrunk: Shrunk, dtype: str | None) -> tuple[Shrunk, Half]:
    """All tensors in half precision, with plain zeros in the 2:4 modules (a mask leaves negative ones).

    Args:
        source: what it comes from.
        shrunk: what is to be written.
        dtype: one of DTYPES; None: the model's own if all of it is a half one, else bfloat16.

    Raises:
        UsageError: no module is 2:4, or a number is too large for the dtype.
        CheckpointError: a module the manifest calls 2:4 is not.
    """
    own = set(source.checkpoint.dtypes.values())
    half = DTYPES[dtype] if dtype else own.pop() if len(own) == 1 and own <= set(HALF) else torch.bfloat16
    modules = _modules(source, shrunk)
    tensors = {name: tensor.to(half) for name, tensor in shrunk.tensors.items()}
    if large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UsageError(f"{large[0]} holds numbers too large for {_name(half)}. Use --dtype bfloat16.")
    for module in modules:
        name = f"{module.name}.weight"
        tensors[name] = torch.where(tensors[name] == 0, 0, tensors[name])
        if not is_24(tensors[name].view(module.shape)):
            raise CheckpointError(
                f"{module.name} of the model in {source.checkpoint.source} is not 2:4 although the manifest says so; "
                "its weights were changed after compressing. Compress again."
            )
    return replace(shrunk, tensors=tensors), Half(half, tuple(modules))


def _modules(source: Source, shrunk: Shrunk) -> list[Sparse24Module]:
    """The modules the manifest calls 2:4, with the sizes they have in `shrunk`."""
    manifest, found = source.manifest, []
    if manifest is None:
        raise UsageError(f"{source.checkpoint.source} is a dense model. Compress it with --pattern 2:4 first.")
    for layer, entry in enumerate(manifest.layers):
        for name in (module.name for module in entry.modules if module.target == PATTERN):
            full_name = source.checkpoint.architecture.mixer_prefix(layer) + name
            shape = tuple(shrunk.tensors[f"{full_name}.weight"].flatten(1).shape)
            reason = obstacle(name, shape)
            found.append(Sparse24Module(full_name, shape, () if reason else backends_for(*shape), reason))
    if not found:
        raise UsageError(
            f"{source.checkpoint.source} has no 2:4 modules (it was compressed with --pattern "
            f"{manifest.config['pattern']}), so "
            "there is nothing for sparse tensor cores. Run `ssmc compress MODEL --pattern 2:4 --scope ffn` first."
        )
    return found


@torch.no_grad()
def compare_half(job: Job, folder: Path) -> tuple[Comparison, Rounding]:
    """Prove that `folder` holds the masked model in half precision, and that rounding did no more than it must.

    All run in float32. The first comparison is with the masked model's weights, rounded here, and allows the noise of
    float32 sums. The second is with its unrounded weights, and allows MARGIN times what random changes of every weight
    by up to half a unit in the last place do.

    The weights of the masked model are changed in place.

    Raises:
        VerificationError: one of the comparisons fails, or a module is not 2:4.
    """
    masked, half, tokens = job.source.checkpoint, job.extra, job.tokens.sample
    written = load_checkpoint(folder, dtype=torch.float32)
    weights = dict(written.model.named_parameters())
    for module in half.modules:
        if not is_24(weights[f"{module.name}.weight"].view(module.shape)):
            raise VerificationError(
                f"{module.name} is not 2:4 in the written files, so nothing was kept. This is a bug in ssmc; please "
                "report it with the manifest."
            )
    parameters = list(masked.model.parameters())
    full = use_fast_scan(masked.model)(tokens).logits
    for parameter in parameters:
        parameter.copy_(parameter.to(half.dtype))
    comparison = compare(masked.model, written.model, tokens, job.tokens.real)
    rounded = masked.model(tokens).logits
    _shake(parameters, torch.finfo(half.dtype).eps / 2)
    noise = float((masked.model(tokens).logits - rounded).abs().max())
    rounding = Rounding(float((rounded - full).abs().max()), MARGIN * noise, float(full.abs().max()))
    if not rounding.max_difference <= rounding.tolerance:  # also when it is NaN
        raise VerificationError(
            f"In {_name(half.dtype)} a logit moves by {rounding.max_difference:.3g}, more than rounding explains "
            f"({rounding.tolerance:.3g}), so nothing was written: its range does not hold these weights. Use the other "
            "--dtype."
        )
    return comparison, rounding


def _shake(parameters: list[torch.Tensor], size: float) -> None:
    """Change every number in place by a random part of itself, up to `size`."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        parameter.mul_(1 + size * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def section(half: Half, rounding: Rounding, packed: bool) -> dict[str, Any]:
    """What a manifest says about the format."""
    return {
        "dtype": _name(half.dtype),
        "storage": "packed: values and 2-bit positions, which only ssmc reads" if packed else "dense, zeros stored",
        "rounding": asdict(rounding),
        "modules": [asdict(m) | {"shape": list(m.shape), "backends": list(m.backends)} for m in half.modules],
    }


def where_it_runs(runtimes: Sequence[Runtime], packed: bool) -> list[Runtime]:
    """The table of the same export as safetensors, read for a 2:4 one."""
    ours = [
        Runtime("ssmc, CPU", FORMAT, True, "dense; nothing gets faster"),
        Runtime("ssmc, CUDA sm_80 and later", FORMAT, True, "sparse where that measures faster, module by module"),
    ]
    others = [r for r in runtimes if r.reads == "safetensors" and not r.name.startswith("ssmc")]
    if packed:
        return ours + [replace(r, reads=FORMAT, runs=False, remark="the packed file is ssmc's own") for r in others]
    return ours + [replace(r, reads=FORMAT, remark="dense" if r.runs else r.remark) for r in others]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
