"""The residual stream: all that reads it and adds to it, in any basis, and a model whose stream is narrower.

An RMSNorm without weights commutes with rotations. So where the weights of the norms are folded into the maps behind
them, a model computes the same in any orthonormal basis of its stream (SliceGPT, 2401.15024). In a masked model only
the first coordinates of the basis are in use: the embedding and all that adds to the stream leave the others at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssmc.runtime.later import nn, torch
from ssmc.runtime.models.architectures.plan import Cut, Place, cut_tensors

if TYPE_CHECKING:
    from ssmc.runtime.models.architectures.interface import Architecture
    from ssmc.runtime.models.architectures.units import Writer

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Site:
    """A norm that reads the residual stream, by names in the model.

    Attributes:
        norm: the module.
        readers: the weights (..., d_model) that read what it puts out.
        writers: the linear maps and the experts, as modules, that have added to the stream since the norm before;
            before the first there is the embedding.
    """

    norm: str
    readers: tuple[str, ...]
    writers: tuple[str, ...] = ()


def sites(architecture: Architecture, model: nn.Module) -> list[Site]:
    """The norms of the residual stream in the order they run; the last is the one before the head."""
    found: list[Site] = []
    since: tuple[str, ...] = ()
    for index, block in enumerate(architecture.blocks(model)):
        prefix, norms = architecture.block_prefix(index), architecture.norms_in(block)
        for stage, norm in enumerate(norms):
            readers = tuple(prefix + name for name in architecture.reading(block, stage))
            found.append(Site(prefix + norm, readers, since))
            writers = [*architecture.writers_in(block), *_experts_in(architecture, block)]
            own = [writer for writer in writers if min(writer.stage, len(norms) - 1) == stage]
            since = tuple(prefix + writer.name for writer in own)
    return [*found, Site(architecture.last_norm, (HEAD,), since)]


@dataclass(frozen=True)
class Basis:
    """A new basis of a residual stream of D coordinates, of which the first K are in use.

    Attributes:
        read: (D, K) for each site: what its norm puts out is this times what it is in the new basis, or nearly so;
            orthonormal columns, the same for all, where nothing makes up for what is lost.
        write: (K, D) for each site, what its writers put out in the new basis, and for the first what the embedding
            does; `read` transposed likewise.
        last: (K,) weight of the last norm; None: the head takes it, which is a matrix of its own then.
    """

    read: tuple[torch.Tensor, ...]
    write: tuple[torch.Tensor, ...]
    last: torch.Tensor | None = None


def change_basis(architecture: Architecture, model: nn.Module, basis: Basis) -> None:
    """Write a model in a new basis of its residual stream, in place and without changing a shape.

    The coordinates of the basis that are not in use are zero wherever the stream is written and read.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        places = sites(architecture, model)
        for number, (site, read, write) in enumerate(zip(places, basis.read, basis.write, strict=True)):
            norm: Any = model.get_submodule(site.norm)
            last = number + 1 == len(places)
            if not (last and basis.last is not None):  # a tied head is written with the embedding
                for reader in site.readers:
                    weight = model.get_parameter(reader).detach()
                    weight.copy_(_padded((weight.double() * norm.weight.double()) @ read, -1, weight.shape[-1]))
            norm.weight.fill_(1)
            if last and basis.last is not None:
                norm.weight[: len(basis.last)] = basis.last.to(norm.weight)
            for writer in site.writers:
                for name, axis in written(model, writer).items():
                    tensor = model.get_parameter(name).detach()
                    tensor.copy_(_padded(write @ tensor.double(), axis, tensor.shape[axis]))
        rows = embedding.weight
        rows.copy_(_padded(rows.double() @ basis.write[0].t(), 1, rows.shape[1]))


def silent_places(architecture: Architecture, model: nn.Module, kept: int, d_model: int) -> Iterator[Place]:
    """Where the stream of a masked model is written in coordinates that are not in use: zeros, by the model's names."""
    beyond = torch.arange(kept, d_model)
    yield Place(architecture.embedding, 1, beyond)
    for site in sites(architecture, model):
        for writer in site.writers:
            yield from (Place(name, axis, beyond) for name, axis in written(model, writer).items())


def cut_width(
    architecture: Architecture, model: nn.Module, tensors: Mapping[str, torch.Tensor], config: Any, kept: int
) -> tuple[dict[str, torch.Tensor], Any, list[Cut]]:
    """Remove all but the first `kept` coordinates of the stream from a whole state dict and its configuration.

    Norms take the mean over fewer coordinates then, for which their weights make up, in float32 whatever they were.
    """
    out, cuts, stay = dict(tensors), [], torch.arange(kept)
    places, whole = [Place(architecture.embedding, 1, stay)], architecture.dimensions(config).d_model
    for site in sites(architecture, model):
        norm = f"{site.norm}.weight"
        out[norm] = out[norm].float() * (whole / kept) ** 0.5
        places.append(Place(norm, 0, stay))
        readers = [reader for reader in site.readers if reader in tensors]  # but for a tied head
        places += [Place(reader, out[reader].dim() - 1, stay) for reader in readers]
        for writer in site.writers:
            places += [Place(name, axis, stay) for name, axis in written(model, writer).items()]
    cut_tensors(out, cuts, places)
    return out, architecture.with_d_model(config, kept), cuts


def with_epsilons_of_width(architecture: Architecture, model: nn.Module, kept: int) -> None:
    """Make the norms of a masked stream compute what those over its first `kept` coordinates do.

    w f x / sqrt(S / K + eps) with f = sqrt(D / K) is w x / sqrt(S / D + eps K / D), S the sum of squares.
    """
    whole = architecture.dimensions(model.config).d_model
    for site in sites(architecture, model):
        norm: Any = model.get_submodule(site.norm)
        norm.variance_epsilon *= kept / whole


def written(model: nn.Module, writer: str) -> dict[str, int]:
    """The tensors of a writer, by the model's names, each with the axis that is the stream."""
    module: Any = model.get_submodule(writer)
    if not isinstance(module, nn.Linear):  # experts, (experts, d_model, neurons)
        return {f"{writer}.down_proj": 1}
    return {f"{writer}.{own}": 0 for own in ("weight", "bias") if getattr(module, own) is not None}


def _experts_in(architecture: Architecture, block: nn.Module) -> list[Writer]:
    """The experts of a block that add to the stream themselves, not through another map."""
    found = []
    for part, writer in architecture.mixtures_in(block):
        if not isinstance(getattr(part.inside(block), part.behind or "-", None), nn.Linear):
            found.append(writer)
    return found


def _padded(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A tensor with zeros up to a size along an axis."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
