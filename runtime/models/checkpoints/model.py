"""From a configuration and tensors to transformers' model, with every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints.deferred import real
from ssmc.runtime.models.checkpoints.foreign import refuse_foreign
from ssmc.runtime.models.checkpoints.reading import HEAD, some_of
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.stock_kernels import guard_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LAYER = re.compile(r"\w+\.layers\.(\d+)\.")


def expected_shapes(config: PretrainedConfig, where: str) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a model, in the model's order, without a tied head.

    Raises:
        CheckpointError: the sizes in `config` make no model.
    """
    model = _empty_model(config, where)
    return {name: t.shape for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys}


def parameter_counter(config: PretrainedConfig) -> Callable[..., int]:
    """How many parameters a model of the same family has, as a function of (n_layer, d_inner, d_state), exactly.

    A fourth number, not 0, is another d_model.

    Models of one and of two blocks are laid out without memory and counted; a tied head counts once.
    """
    architecture = architecture_for(config.model_type)

    @cache
    def count(n_layer: int, d_inner: int, d_state: int, d_model: int = 0) -> int:
        other = architecture.with_d_model(config, d_model) if d_model else config
        other = architecture.resized(other, n_layer=n_layer, d_inner=d_inner, d_state=d_state)
        return sum(shape.numel() for shape in expected_shapes(other, "the model").values())

    if not architecture.capabilities.uniform:
        return count

    outside: dict[int, int] = {}  # of the blocks, by d_model, whatever the sizes of a block

    def of_all(n_layer: int, d_inner: int, d_state: int, d_model: int = 0) -> int:
        one = count(1, d_inner, d_state, d_model)
        if d_model not in outside:
            outside[d_model] = 2 * one - count(2, d_inner, d_state, d_model)
        return outside[d_model] + n_layer * (one - outside[d_model])

    return of_all


def check_tensors(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig, where: str) -> dict[str, torch.Tensor]:
    """Make sure that `tensors` are exactly those of the model: names, shapes, dtypes, and every number finite.

    Args:
        tensors: by transformers' names; a tied head may be among them if it equals the embedding.
        config: of the model.
        where: what to call the model in errors.

    Returns:
        The tensors in the model's order, without a tied head.

    Raises:
        CheckpointError: naming the tensors that are wrong.
    """
    check_sizes(config, where)
    _check_layer_count(tensors, config, where)
    expected = expected_shapes(config, where)
    tensors = dict(tensors)
    if config.tie_word_embeddings and HEAD in tensors:
        _check_tied(tensors.pop(HEAD), tensors.get(architecture_for(config.model_type).embedding), where)
    missing = expected.keys() - tensors.keys()
    refuse_foreign(tensors.keys() - expected.keys(), where)
    if missing == {HEAD}:
        raise CheckpointError(
            f"{where} lacks {HEAD}, and its config.json does not say that the head is the embedding: only the body of "
            "the model was saved. Save the whole language model (AutoModelForCausalLM)."
        )
    if missing:
        raise CheckpointError(f"{where} lacks the tensor{_s(missing)} {some_of(missing)}. Copy or download it again.")
    if extra := tensors.keys() - expected.keys():
        raise CheckpointError(
            f"{where} has the tensor{_s(extra)} {some_of(extra)}, which its config.json does not account for. Take the "
            "config.json and the weights from the same model."
        )
    for name, shape in expected.items():
        _check_tensor(name, tensors[name], shape, where)
    return {name: tensors[name] for name in expected}


def build_model(
    config: PretrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, where: str
) -> PreTrainedModel:
    """transformers' model around `tensors`, without initialising anything first.

    Args:
        config: of the model.
        tensors: checked by `check_tensors`; used as they are where the dtype is right. The dictionary is emptied, so
            that of a tensor that is cast only the new one stays in memory.
        dtype: of the weights in memory; None keeps each tensor's own.
        where: what to call the model in errors.
    """
    model = outline_model(config, where)
    state = {name: tensors.pop(name).to(dtype=dtype) for name in list(tensors)}
    model.load_state_dict(state, strict=False, assign=True)  # strict but for the tied head: checked before
    model.tie_weights()
    if left := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise AssertionError(f"never filled: {left}")
    return model.eval()


def outline_model(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """transformers' model with no memory behind its parameters, float32; what no file holds is computed."""
    model = _empty_model(config, where)
    _fill_buffers(model)
    return model.eval()


@torch.no_grad()
def _fill_buffers(model: PreTrainedModel) -> None:
    """Compute what no file holds, as transformers does: multipliers, frequencies of positions."""
    empty = False
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None and buffer.is_meta:
                module._buffers[name], empty = torch.empty_like(buffer, device="cpu"), True
    for module in model.modules() if empty else ():
        model._init_weights(module)  # the parameters have no memory yet, so only the buffers are written


def check_sizes(config: PretrainedConfig, where: str) -> None:
    """Make sure that all sizes are positive whole numbers.

    Raises:
        CheckpointError: naming the size that is not.
    """
    try:
        sizes = architecture_for(config.model_type, where).dimensions(config).as_dict()
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} has a size in its config.json that is no number ({error}). Correct it."
        ) from error
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise CheckpointError(f"{where} has {name} {size!r} in its config.json, not a positive number. Correct it.")


def _empty_model(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """The model with no memory behind its parameters."""
    try:
        with torch.device("meta"):
            return guard_kernels(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config))
    except Exception as error:  # transformers looks some values up only now, and raises whatever comes
        raise CheckpointError(
            f"{where} has a value in its config.json that transformers cannot use ({error}). Correct it."
        ) from error


def _check_layer_count(tensors: Mapping[str, torch.Tensor], config: PretrainedConfig, where: str) -> None:
    """One sentence instead of a hundred missing tensors, and before building a million layers."""
    found = len({match[1] for match in map(_LAYER.match, tensors) if match})
    if found and found != config.num_hidden_layers:
        raise CheckpointError(
            f"{where} has tensors of {found} layers, but its config.json says {config.num_hidden_layers}. Take the "
            "config.json and the weights from the same model."
        )


def _check_tied(head: torch.Tensor, embedding: torch.Tensor | None, where: str) -> None:
    if embedding is not None and not (head.shape == embedding.shape and torch.equal(real(head), real(embedding))):
        raise CheckpointError(
            f"{where} says its head is tied to the embedding, but {HEAD} differs from it. If the head is its own, the "
            "config.json must say so."
        )


def _check_tensor(name: str, tensor: torch.Tensor, shape: torch.Size, where: str) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where} has {name} with shape {tuple(tensor.shape)}, but its config.json asks for {tuple(shape)}. Take "
            "the config.json and the weights from the same model."
        )
    if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
        kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout).removeprefix("torch.")
        raise CheckpointError(
            f"{where} has {name} stored as {kind}; ssmc reads float32, float16 and bfloat16. Take the "
            "unquantised model."
        )
    check_finite(name, real(tensor), where)


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Make sure that every number of a tensor is finite.

    Raises:
        CheckpointError: one is not.
    """
    # NaN wins in both; unlike isfinite this makes no temporary of the tensor's size
    if not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{where} has NaN or infinity in {name}, so no result of it means anything. Copy it again or correct "
            "the model."
        )


def _s(names: object) -> str:
    return "s" if len(names) > 1 else ""  # type: ignore[arg-type]
