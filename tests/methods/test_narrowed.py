"""Models without what was masked, against the masked models themselves, for every family."""

import copy

import pytest
import torch

from ssmc.compressor.distillation.narrowed import Left, narrowed
from ssmc.runtime.models import families
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.families import FAMILIES
from tests.support.models import random_mamba2, random_model, random_tokens

ALL = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}


def masked(make, with_channels=True):
    """A model in which every layer lost other states, channels where that can be; and what is left of each."""
    model = use_fast_scan(make())
    architecture = architecture_for(model.config.model_type)
    sizes, layers = architecture.dimensions(model.config), []
    for index, block in enumerate(architecture.blocks(model)):
        mixer = architecture.mixer(block)
        if mixer is None:
            layers.append(Left(()))
            continue
        if hasattr(getattr(mixer, "norm", None), "variance_epsilon"):
            mixer.norm.variance_epsilon = 1e-12  # a mean over fewer channels makes another share of it
        own = [n for n in range(sizes.d_state) if (n + index) % 3]
        states = tuple(group * sizes.d_state + n for group in range(sizes.groups) for n in own)
        architecture.mask_states(mixer, states)
        channels = None
        if with_channels and families.CHANNEL not in architecture.capabilities.fixed:
            unit = sizes.head_dim if architecture.capabilities.heads else 1
            count = sizes.d_inner // unit // sizes.groups
            heads = [g * count + h for g in range(sizes.groups) for h in range(count) if (h + index) % 3]
            channels = tuple(h * unit + c for h in heads for c in range(unit))
            architecture.mask(mixer, families.CHANNEL, channels)
        layers.append(Left(states, channels))
    return architecture, model, layers


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@torch.no_grad()
def test_nothing_changes_but_the_shapes_and_new_weights_come_back(make):
    architecture, model, layers = masked(make)
    before, tokens = copy.deepcopy(model), random_tokens((2, 19))
    wanted = model(tokens).logits
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with narrowed(architecture, model, layers):
        torch.testing.assert_close(model(tokens).logits, wanted, atol=2e-4, rtol=1e-3)
        smaller = sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.parameters())
        assert smaller == architecture.capabilities.uniform  # a hybrid stays as it is
        for parameter in model.parameters():
            parameter.mul_(1.03)
        moved = model(tokens).logits
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    torch.testing.assert_close(model(tokens).logits, moved, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(moved, wanted, atol=1e-2)
    zero = {name: (p == 0) for name, p in before.named_parameters()}
    assert all(not p[zero[name]].any() for name, p in model.named_parameters())


@torch.no_grad()
def test_removed_blocks_are_not_computed():
    model, tokens = use_fast_scan(random_model()), random_tokens((2, 19))
    architecture = architecture_for("mamba")
    architecture.remove_block(architecture.blocks(model)[1])
    wanted = model(tokens).logits
    architecture.mixer(architecture.blocks(model)[1]).forward = None  # would be called
    with narrowed(architecture, model, ()):
        torch.testing.assert_close(model(tokens).logits, wanted)
