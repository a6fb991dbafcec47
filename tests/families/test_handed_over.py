"""Models with our scan are handed to other processes, copied, and wrapped by adapters, and compute what they should."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ssmc import compress
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.families import FAMILIES
from tests.support.layouts import model_of, series
from tests.support.models import random_mamba2, random_model, random_tokens

MODELS = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}


class Adapter(nn.Module):
    """A low-rank adapter around a module, laid out as peft's: the weight is that of the module inside."""

    def __init__(self, base: nn.Module, seed: int):
        super().__init__()
        self.base_layer = base
        weight, generator = base.weight, torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(2, weight[0].numel(), generator=generator) * 0.3)
        self.up = nn.Parameter(torch.randn(len(weight), 2, generator=generator) * 0.3)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def merged(self) -> nn.Module:
        whole = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            whole.weight += (self.up @ self.down).view_as(whole.weight)
        return whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged()(x)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_model_with_our_scan_comes_back_from_a_pickle(family):
    model, tokens = use_fast_scan(MODELS[family]()), random_tokens()
    wanted = model(tokens).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(again(tokens).logits, wanted)
        for parameter in again.parameters():
            parameter.zero_()  # what it computes with is its own
        assert not again(tokens).logits.any()
    assert torch.equal(model(tokens).logits, wanted)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
@torch.no_grad()
def test_an_adapter_around_any_part_of_a_mixer_counts(family):
    """The oracle is the stock model with the adapter merged into its weights."""
    model = MODELS[family]()
    merged = copy.deepcopy(model)
    for layer, (block, whole) in enumerate(zip(model.backbone.layers, merged.backbone.layers, strict=True)):
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            if hasattr(block.mixer, name):
                setattr(block.mixer, name, Adapter(getattr(block.mixer, name), seed=layer))
                setattr(whole.mixer, name, getattr(block.mixer, name).merged())
    tokens = random_tokens()
    wanted = merged(tokens).logits
    fast = use_fast_scan(model)
    assert float((fast(tokens).logits - wanted).abs().max() / wanted.abs().max()) < 3e-5
    first = fast(tokens[:, :5], use_cache=True)
    rest = fast(tokens[:, 5:], use_cache=True, cache_params=first.cache_params).logits
    assert float((rest - wanted[:, 5:]).abs().max() / wanted.abs().max()) < 3e-5


@pytest.mark.parametrize("kind", ["mamba_ssm", "mamba_ssm-2", "minimal"])
@pytest.mark.parametrize("part", ["in_proj", "conv1d", "out_proj"])
def test_a_module_with_an_adapter_is_refused_by_name(kind, part):
    model = model_of(kind)
    mixer = model.blocks["stage1"][0]
    setattr(mixer, part, Adapter(getattr(mixer, part), seed=0))
    with pytest.raises(CheckpointError, match=rf"{part} of blocks\.stage1\.0 is wrapped in an adapter \(.* Adapter\)"):
        compress(model, batches=series())


class Around(nn.Module):
    """A module inside another that shows nothing of it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


class Codes(nn.Module):
    """A map that keeps its weight as int8."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.register_buffer("weight", linear.weight.to(torch.int8))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (weight_norm, r"whose x_proj is parametrised \(torch.nn.utils.parametrize.remove_parametrizations"),
        (Around, r"whose x_proj \(Around\) has no weight of its own"),
        (Codes, r"whose x_proj \(Codes\) holds int8, not a parameter"),
    ],
)
def test_a_part_that_is_there_is_not_called_absent(change, named):
    model = random_model()
    for block in model.backbone.layers:
        block.mixer.x_proj = change(block.mixer.x_proj)
    with pytest.raises(CheckpointError, match=named) as refused:
        compress(model, batches=[random_tokens()])
    assert "without x_proj" not in str(refused.value)
