"""Mamba-Shedder: the greedy search against trying everything with stock transformers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ssmc.compressor import configure
from ssmc.compressor.methods.layers.method import removal_count
from ssmc.compressor.methods.layers.score import Removal
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.pipeline.test_pipeline import ARCHITECTURE, random_model
from tests.support.pruning import shed


@pytest.fixture
def model():
    return random_model(layers=4, d_state=4)


@pytest.fixture
def tokens():
    return torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def loss(model, tokens):
    logits = use_stock_scan(model)(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@torch.no_grad()
def without(model, layers, pattern):
    """The model without some blocks (taken out of the list) or without their SSM (x_proj's B and C rows zero)."""
    model = copy.deepcopy(model)
    if pattern == "layer":
        rest = [b for i, b in enumerate(model.backbone.layers) if i not in layers]
        model.backbone.layers = torch.nn.ModuleList(rest)
    else:
        for i in layers:
            mixer = model.backbone.layers[i].mixer
            mixer.x_proj.weight[mixer.time_step_rank :] = 0
    return model


@pytest.mark.parametrize("pattern", ["layer", "ssm-module"])
def test_each_step_makes_the_removal_that_costs_least(model, tokens, pattern):
    config = configure(model="test", pattern=pattern, sparsity=0.5, repair=False)
    pruned = use_fast_scan(copy.deepcopy(model))
    removals = shed(pruned, ARCHITECTURE, tokens, config)
    gone = []
    for removal in removals:
        losses = {i: loss(without(model, [*gone, i], pattern), tokens) for i in range(4) if i not in gone}
        assert removal.layer == min(losses, key=losses.get)
        assert removal.loss == pytest.approx(losses[removal.layer], rel=1e-4)
        gone.append(removal.layer)
    assert len(gone) == 2
    assert loss(pruned, tokens) == pytest.approx(removals[-1].loss, rel=1e-4)


def test_a_search_goes_on_behind_removals_that_are_known(model, tokens):
    """To the same end; what is known is not asked again, so a known removal that nobody would make stays."""
    config = configure(model="test", pattern="layer", sparsity=0.75, repair=False)
    whole = shed(copy.deepcopy(model), ARCHITECTURE, tokens, config)
    assert [shed(copy.deepcopy(model), ARCHITECTURE, tokens, config, whole[:n]) for n in (1, 2, 3)] == [whole] * 3
    other = next(i for i in range(4) if i != whole[0].layer)
    assert shed(copy.deepcopy(model), ARCHITECTURE, tokens, config, [Removal(other)])[0] == Removal(other)


def test_random_removal_needs_no_text_and_follows_the_seed(model):
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        config = configure(model="test", pattern="layer", score="random", seed=seed, repair=False)
        chosen.append(tuple(r.layer for r in shed(copy.deepcopy(model), ARCHITECTURE, None, config)))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


@torch.no_grad()
def test_similarity_takes_the_blocks_that_turn_their_input_least(model, tokens):
    """Block Influence on transformers' own hidden states: 1 - the mean cosine over all tokens."""
    influence = []

    def judge(module, arguments, after):
        before = arguments[0]
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        influence.append(1 - cosine.mean().item())

    stock = use_stock_scan(copy.deepcopy(model))
    for block in stock.backbone.layers:
        block.register_forward_hook(judge)
    stock(tokens)
    config = configure(model="test", pattern="layer", score="similarity", sparsity=0.5, repair=False)
    pruned = use_fast_scan(copy.deepcopy(model))
    removals = shed(pruned, ARCHITECTURE, tokens, config)
    order = sorted(range(4), key=lambda layer: influence[layer])
    assert [removal.layer for removal in removals] == order[:2]
    for removal in removals:
        assert removal.influence == pytest.approx(influence[removal.layer], rel=1e-3)
        assert ARCHITECTURE.is_removed(pruned.backbone.layers[removal.layer])
    assert not ARCHITECTURE.is_removed(pruned.backbone.layers[order[2]])


@pytest.mark.parametrize(("layers", "sparsity", "count"), [(24, 0.5, 12), (6, 0.01, 1), (6, 0.99, 5), (1, 0.5, 0)])
def test_at_least_one_goes_and_one_stays(layers, sparsity, count):
    assert removal_count(layers, sparsity) == count
