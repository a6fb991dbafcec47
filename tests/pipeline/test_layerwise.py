"""Sizes of each layer by itself: the allocation against brute force, the measurement of layers against pruning them."""

import copy
import itertools
import random
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from ssmc.compressor import configure
from ssmc.compressor.pipeline import each_alone
from ssmc.compressor.search.allocation import Curve
from ssmc.compressor.search.configured import configured_layerwise
from ssmc.compressor.search.layer_sizes import BlockLimit, LayerLosses, Layerwise, allocate, shared_out
from ssmc.runtime.measure.latency import cut_to_blocks
from ssmc.runtime.measure.losses import divergence, last_hidden
from ssmc.runtime.models.families import Dimensions, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.models import random_model
from tests.support.pruning import prune_layers, run_of

MAMBA = architecture_for("mamba")
DENSE = Dimensions(3, 16, 64, 4, 3, 4, 100)
WIDTHS, STATES = (16, 32, 48, 64), (1, 2, 4)


def losses(seed):
    """Layers that differ, on curves that do not."""
    draw = random.Random(seed)
    weights = {part: shared_out([draw.uniform(0.1, 3) for _ in range(3)]) for part in ("column", "channel")}
    curves = {"column": Curve((0.5, 0.75), (0.01, 0.04)), "channel": Curve((0.25, 0.5), (0.2, 0.7))}
    return LayerLosses(DENSE, curves, weights)


def cost(width, states):
    return width * (20 + states)


def test_the_allocation_is_near_the_best_there_is():
    """Steps of a quarter of the width are coarse: the greedy choice cannot always use all that is allowed."""
    over_best, over_uniform = [], []
    for seed, most in itertools.product(range(6), (0.9, 0.7, 0.5)):
        loss, bound = losses(seed), most * 3 * cost(64, 4)
        found = allocate(DENSE, WIDTHS, STATES, loss.of_block, [BlockLimit(cost, bound)])
        assert sum(cost(*block) for block in found.blocks()) <= bound
        choices = itertools.product(itertools.product(WIDTHS, STATES), repeat=3)
        every = (Layerwise(*zip(*blocks, strict=True)) for blocks in choices)
        allowed = [sizes for sizes in every if sum(cost(*block) for block in sizes.blocks()) <= bound]
        uniform = min(loss(sizes) for sizes in allowed if len(set(sizes.blocks())) == 1)
        over_best.append(loss(found) / min(map(loss, allowed)))
        over_uniform.append(loss(found) / uniform)
    assert max(over_best) < 1.6
    assert median(over_best) < 1.05
    assert median(over_uniform) < 0.8


def test_two_limits_are_both_met_or_nothing_is_found():
    loss, whole = losses(0), [3 * cost(64, 4), 3 * 64]
    limits = [BlockLimit(cost, 0.8 * whole[0]), BlockLimit(lambda width, states: width, 0.6 * whole[1])]
    found = allocate(DENSE, WIDTHS, STATES, loss.of_block, limits)
    assert all(sum(limit.cost(*block) for block in found.blocks()) <= limit.most for limit in limits)
    assert allocate(DENSE, WIDTHS, STATES, loss.of_block, [BlockLimit(cost, 0.1 * whole[0])]) is None


def test_layers_that_cost_nothing_still_count_a_little():
    weights = shared_out([0.0, 1.0, 3.0])
    assert sum(weights) == pytest.approx(1)
    assert 0 < weights[0] < weights[1] == pytest.approx(weights[2] / 3)
    assert shared_out([0.0, 0.0]) == [0.5, 0.5]


def test_the_divergence_is_that_of_the_formula():
    dense, other = random_model(seed=1), random_model(seed=1)
    with torch.no_grad():
        other.backbone.layers[0].mixer.D.mul_(1.5)
    inputs = torch.randint(0, dense.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (F.softmax(model(inputs).logits.double(), dim=-1) for model in (dense, other))
    wanted = (p * (p.log() - q.log())).sum(dim=-1).mean()
    assert wanted > 1e-5
    assert divergence(last_hidden(dense, inputs), other, inputs) == pytest.approx(float(wanted), rel=1e-3)
    assert divergence(last_hidden(dense, inputs), dense, inputs) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("pattern", ["column", "channel"])
def test_each_layer_alone_is_what_pruning_only_that_layer_gives(pattern):
    model = use_fast_scan(random_model(num_hidden_layers=3))
    before = copy.deepcopy(model.state_dict())
    sizes, tokens = MAMBA.dimensions(model.config), torch.arange(48).reshape(3, 16)
    dtypes = dict.fromkeys(before, torch.float32)
    keep = sizes.d_state // 2 if pattern == "column" else sizes.d_inner // 2
    listed = "states" if pattern == "column" else "widths"
    whole = sizes.d_state if pattern == "column" else sizes.d_inner
    options = {"model": "m", "pattern": pattern, "round_channels": 1, "nsamples": 3}
    config, seen = configure(**options, sparsity=0.5), 0
    for index in each_alone(run_of(model, MAMBA, tokens, config, dtypes)):
        counts = tuple(keep if layer == index else whole for layer in range(3))
        alone = use_fast_scan(random_model(num_hidden_layers=3))
        prune_layers(alone, MAMBA, tokens, configure(**options, **{listed: counts}), dtypes)
        block = MAMBA.blocks(alone)[index].state_dict()
        for name, tensor in MAMBA.blocks(model)[index].state_dict().items():
            torch.testing.assert_close(tensor, block[name], rtol=1e-3, atol=1e-4)
        assert not all(torch.equal(block[name], before[f"backbone.layers.{index}.{name}"]) for name in block)
        seen += 1
    assert seen == 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_that_keeps_everything_stays_as_it_is():
    model = use_fast_scan(random_model(num_hidden_layers=2))
    sizes, before = MAMBA.dimensions(model.config), copy.deepcopy(model.state_dict())
    states = (sizes.d_state, 1)
    config = configure(model="m", pattern="column", states=states, nsamples=2)
    tokens = torch.arange(24).reshape(2, 12)
    results = prune_layers(model, MAMBA, tokens, config, dict.fromkeys(before, torch.float32))
    assert [len(result.states_kept) for result in results] == list(states)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("backbone.layers.1.") for name in changed)


def test_a_model_for_the_clock_has_each_blocks_own_size():
    model = random_model(num_hidden_layers=3)
    dense = MAMBA.dimensions(model.config)
    blocks = [(dense.d_inner, dense.d_state), (dense.d_inner // 2, 1), (dense.d_inner, 2)]
    cut = cut_to_blocks(model, MAMBA, blocks)
    assert [tuple(block.mixer.A_log.shape) for block in MAMBA.blocks(cut)] == blocks
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        out = cut(tokens, use_cache=True)
        step = cut(tokens[:, :1], cache_params=out.cache_params)
        same = cut_to_blocks(model, MAMBA, [blocks[0]] * 3)(tokens).logits
        torch.testing.assert_close(same, model(tokens).logits, rtol=1e-3, atol=1e-4)
    assert out.logits.isfinite().all()
    assert step.logits.isfinite().all()


def test_what_was_found_is_an_ordinary_run():
    config = configure(model="m", pattern="layer+column+channel", nsamples=3)
    sizes = Layerwise((64, 32, 64), (4, 4, 4))
    found = configured_layerwise(config, sizes, DENSE, trial=False)
    assert found.pattern == "channel"
    assert found.widths == (64, 32, 64)
    assert found.states is None
    assert found.nsamples == 3
    both = configured_layerwise(config, Layerwise((64, 32, 64), (4, 1, 4)), DENSE, trial=True)
    assert both.pattern == "column+channel"
    assert both.states == (4, 1, 4)
