"""The search for sizes, against enumeration by brute force on made-up figures; and the goals it is given."""

import copy
import itertools
import math
import random

import pytest
import torch
from transformers import MambaForCausalLM

from ssmc.compressor import configure, make_plan, split_goal
from ssmc.compressor.search.allocation import (
    Curve,
    Limit,
    LossModel,
    Sizes,
    cheapest_within,
    enumerate_sizes,
    frontier,
    shortlist,
)
from ssmc.compressor.search.configured import configured
from ssmc.compressor.search.outcome import above
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import parameter_counter
from ssmc.runtime.models.families import Dimensions, architecture_for
from tests.support.models import random_mamba2, random_model

DENSE = Dimensions(6, 256, 512, 16, 16, 4, 4096)
CANDIDATES = enumerate_sizes(range(3, 7), range(128, 513, 64), range(1, 17))


def tables(seed):
    """A loss and a cost for every candidate, monotone in every size, drawn at random."""
    draw = random.Random(seed)
    loss, cost = {}, {}
    for sizes in sorted(CANDIDATES, reverse=True):
        smaller = [
            Sizes(sizes.n_layer + 1, sizes.d_inner, sizes.d_state),
            Sizes(sizes.n_layer, sizes.d_inner + 64, sizes.d_state),
            Sizes(sizes.n_layer, sizes.d_inner, sizes.d_state + 1),
        ]
        above = [s for s in smaller if s in loss]
        loss[sizes] = max((loss[s] for s in above), default=0.0) + draw.random()
        cost[sizes] = min((cost[s] for s in above), default=1.0) * draw.uniform(0.9, 1)
    return loss, cost


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [0.9, 0.5, 0.2])
def test_the_shortlist_begins_with_what_brute_force_finds(seed, most):
    loss, cost = tables(seed)
    _, second = tables(seed + 100)
    limits = [Limit("time", cost.__getitem__, most), Limit("parameters", second.__getitem__, 0.8)]
    allowed = [s for s in CANDIDATES if cost[s] <= most and second[s] <= 0.8]
    found = shortlist(CANDIDATES, limits, loss.__getitem__, 3)
    assert found[0] == min(allowed, key=loss.__getitem__)
    assert len({(s.n_layer, s.d_inner) for s in found}) == len(found) == 3
    others = [s for s in allowed if (s.n_layer, s.d_inner) != (found[0].n_layer, found[0].d_inner)]
    assert found[1] == min(others, key=loss.__getitem__)


def test_a_limit_nothing_meets_leaves_nothing():
    loss, cost = tables(0)
    assert shortlist(CANDIDATES, [Limit("time", cost.__getitem__, 1e-9)], loss.__getitem__, 3) == []


@pytest.mark.parametrize("seed", range(4))
def test_the_frontier_is_what_nothing_beats_in_both(seed):
    loss, cost = tables(seed)
    wanted = {
        s for s in CANDIDATES if not any(cost[o] <= cost[s] and loss[o] <= loss[s] and o != s for o in CANDIDATES)
    }
    found = frontier(CANDIDATES, cost.__getitem__, loss.__getitem__)
    assert set(found) == wanted
    assert [cost[s] for s in found] == sorted(cost[s] for s in found)


@pytest.mark.parametrize("start", [0, 3, 9])
@pytest.mark.parametrize("bound", [0.05, 0.31, 0.9, 1.0])
def test_bisection_finds_the_first_within_the_bound(start, bound):
    candidates = list(range(10))
    measured = []

    def measure(candidate):
        measured.append(candidate)
        return 1 - candidate / 10

    found = cheapest_within(candidates, measure, bound, start)
    assert found == next((c for c in candidates if 1 - c / 10 <= bound), None)
    assert len(measured) <= 6


def test_a_curve_goes_through_its_points_and_follows_a_power_law():
    curve = Curve.through({0.5: 0.02 * 0.5**3, 0.25: 0.02 * 0.25**3, 0.75: 0.02 * 0.75**3})
    for share in (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9):
        assert curve.at(share) == pytest.approx(0.02 * share**3)
    assert curve.at(0) == 0


def test_a_curve_never_falls_and_begins_at_nothing():
    curve = Curve.through({0.25: 0.01, 0.5: 0.002, 0.75: 0.05})  # 0.5 by chance below 0.25
    values = [curve.at(k / 100) for k in range(101)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[25] == pytest.approx(0.01) == values[50]
    flat = Curve.through({0.25: -0.001, 0.5: -0.002})
    assert 0 < flat.at(0.01) < flat.at(0.25) <= 1e-6


def test_one_point_makes_a_parabola():
    assert Curve.through({0.5: 0.1}).at(0.25) == pytest.approx(0.025)


def test_losses_of_the_parts_add_up():
    curves = {
        "layer": Curve.through({1 / 6: 0.2}),
        "column": Curve.through({0.5: 0.01}),
        "channel": Curve.through({0.5: 0.4}),
    }
    model = LossModel(DENSE, curves)
    assert model(Sizes.of(DENSE)) == 0
    assert model(Sizes(5, 512, 16)) == pytest.approx(0.2)
    assert model(Sizes(5, 384, 8)) == pytest.approx(0.2 + 0.01 + 0.1)


def test_parameters_are_counted_exactly():
    for tied in (True, False):
        model = random_model(tie_word_embeddings=tied)
        count = parameter_counter(model.config)
        for n_layer, d_inner, d_state in itertools.product((1, 3, 7), (16, 48), (1, 6)):
            other = random_model(
                tie_word_embeddings=tied, num_hidden_layers=n_layer, intermediate_size=d_inner, state_size=d_state
            )
            assert count(n_layer, d_inner, d_state) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("d_model", [0, 16, 20])
def test_models_of_another_width_are_counted_exactly(d_model):
    """The oracle is transformers' own model of that width."""
    config = random_model().config
    counted = parameter_counter(config)(3, 48, 4, d_model)
    other = copy.deepcopy(config)
    other.num_hidden_layers, other.intermediate_size, other.state_size = 3, 48, 4
    other.hidden_size = d_model or config.hidden_size
    assert counted == MambaForCausalLM(other).num_parameters()


@pytest.mark.parametrize(("d_inner", "d_model", "heads", "head_dim"), [(48, 24, 6, 8), (40, 20, 8, 5), (64, 32, 8, 8)])
def test_a_mamba2_of_another_width_is_counted_exactly(d_inner, d_model, heads, head_dim):
    """The oracle is transformers' own model of these heads: fewer of them, or else narrower ones."""
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2}
    other = random_mamba2(**sizes | {"hidden_size": d_model, "num_heads": heads, "head_dim": head_dim})
    depth = other.config.num_hidden_layers
    counted = parameter_counter(random_mamba2(**sizes).config)(depth, d_inner, other.config.state_size, d_model)
    assert counted == other.num_parameters()


@pytest.mark.parametrize("sizes", [Sizes(6, 512, 1), Sizes(3, 512, 16), Sizes(5, 192, 11), Sizes(6, 448, 16)])
def test_what_was_found_is_an_ordinary_run_that_removes_just_that(sizes):
    config = configure(model="m", pattern="layer+column+channel", score="random", nsamples=3)
    found = configured(config, sizes.removed(DENSE))
    counts = make_plan(found, architecture_for("mamba"), DENSE).keep
    assert set(counts.states) == {sizes.d_state}
    assert set(counts.channels) == {sizes.d_inner}
    assert ("layer" in found.parts) == (sizes.n_layer < 6)
    if "layer" in found.parts:
        assert round(6 * found.sparsity_of("layer")) == 6 - sizes.n_layer
    assert found.nsamples == 3
    assert all(found.score_of(part) == "random" for part in found.parts)


def test_scores_of_parts_that_stay_whole_are_left_out():
    config = configure(model="m", pattern="layer+column", score={"layer": "similarity", "column": "energy"})
    found = configured(config, {"column": 0.5})
    assert found.pattern == "column"
    assert found.score_of("column") == "energy"


def test_trials_and_whole_layers_are_not_refined():
    config = configure(model="m", pattern="layer+column", refine=5)
    assert configured(config, {"layer": 0.5, "column": 0.5}).refine == 5
    assert configured(config, {"layer": 0.5, "column": 0.5}, trial=True).refine == 0
    assert configured(config, {"layer": 0.5}).refine == 0


def test_without_a_goal_options_are_left_alone():
    assert split_goal({"model": "m", "sparsity": 0.5}) == (None, {"model": "m", "sparsity": 0.5})


def test_a_goal_is_taken_out_and_allows_everything_by_default():
    goal, rest = split_goal({"model": "m", "target_latency": 0.6, "phase": "decode", "batch": 4, "seed": 1})
    assert (goal.target_latency, goal.phase, goal.batch) == (0.6, "decode", 4)
    everything = "layer+column+channel+mlp+attention+head+expert+head-dim+expert-width+width"
    assert rest == {"model": "m", "seed": 1, "pattern": everything}


def test_the_outcome_tells_apart_what_is_lost_on_tokens_seen_far_back():
    windows = torch.arange(600).view(2, 300)
    windows[1, 150:160] = windows[1, 5:15]
    dense = torch.rand(2, 299, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = dense + 0.1
    ours[1, 151:159] += 0.4  # predictions of 152 to 159, the last of trigrams that stood at 5 to 14
    outcome = above((windows, ours), (windows, dense))
    assert outcome["far_nats"] == pytest.approx(0.5)
    assert outcome["excess_nats"] == pytest.approx(0.1 + 8 * 0.4 / 598)
    assert outcome["ppl_increase"] == pytest.approx(math.exp(outcome["excess_nats"]) - 1)
    assert above((windows[:1], ours[:1]), (windows[:1], dense[:1]))["far_nats"] is None


def test_a_bound_of_perplexity_is_one_of_loss():
    goal, _ = split_goal({"model": "m", "max_ppl_increase": 0.05})
    assert math.exp(goal.most_nats) == pytest.approx(1.05)
    assert split_goal({"model": "m", "target_params": 0.5})[0].most_nats == math.inf


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_latency": 1.5}, "target_latency 1.5 does not work: it is a share of the dense model"),
        ({"target_params": 0}, "target_params 0 does not work"),
        ({"max_ppl_increase": 0}, "max_ppl_increase 0 does not work"),
        ({"target_latency": 0.5, "batch": 0}, "batch 0 does not work"),
        ({"target_latency": 0.5, "phase": "training"}, "phase 'training' does not work"),
        ({"phase": "decode"}, "There is no goal that phase could belong to: give one of target_params"),
        ({"target_latency": 0.5, "sparsity": 0.5}, "sparsity says what is removed, a search with a goal looks for it"),
        ({"target_params": 0.5, "states": "4,4,4"}, "states says what is removed"),
        ({"target_params": 0.5, "pattern": "unstructured"}, "not by unstructured"),
        ({"target_params": 0.5, "pattern": "column", "scope": "all"}, "not by in_proj"),
    ],
)
def test_goals_that_make_no_sense_are_one_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        split_goal({"model": "m", **options})


def test_an_amount_of_memory_is_a_goal():
    goal, _ = split_goal({"model": "m", "target_memory": "8GiB", "batch": 64, "length": 4096})
    assert goal.target_memory == 2**33
    assert str(goal) == "8.00 GiB of memory for its weights and 64 sequences of 4,096 tokens"
    assert not goal.needs_time
    with pytest.raises(UsageError, match=r"target_memory 'much' does not work: no amount of memory\. Write a number"):
        split_goal({"model": "m", "target_memory": "much"})
