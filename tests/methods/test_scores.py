"""Scores and choices against their formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ssmc.compressor import configure
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.states.elimination import evaluate
from ssmc.compressor.methods.states.prune import scored_group
from ssmc.compressor.methods.states.score import ScoredGroup
from ssmc.compressor.methods.states.sums import Request
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.models.families import architecture_for
from tests.methods.test_statistics import feed
from tests.support.models import random_model
from tests.support.naive import hidden_states, random_inputs
from tests.support.pruning import job_of

ARCHITECTURE = architecture_for("mamba")
D, N = 7, 5


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(d_inner=D, d_state=N)


@pytest.fixture(scope="module")
def h(inputs):
    return hidden_states(inputs)


def layer_for(score, inputs, keep=3, repair=False, pattern="column"):
    """A layer with the sums that a score wants to see, and the score."""
    A_log = torch.log(-inputs.A)
    config = configure(model="test", score=score, repair=repair, pattern=pattern)
    judge = registered(pattern, score)
    sums = judge.statistics(Request(config, A_log, keep, inputs.length - 1))
    for statistic in sums.values():
        feed(statistic, inputs, 4, 2)
    return judge, ScoredGroup(0, A_log, sums, repair)


def formula(score, inputs, h):
    """(D, N) importance, straight from the definition of each score."""
    A_log, A = torch.log(-inputs.A).double().numpy(), inputs.A.double().numpy()
    C, dt = inputs.C.double().numpy(), inputs.dt.double().numpy()
    if score == "magnitude":
        return np.abs(A_log)
    if score == "sparsessm-l2":
        return A_log**2 * (h[:, :-1] ** 2).sum((0, 1))
    if score == "sparsessm":
        decays = np.exp(dt[..., None] * A).sum(0)  # (L, D, N)
        squares = (h[:, :-1] ** 2).sum(0)
        weights = np.array([0.0] + [1 / t for t in range(1, len(decays))])
        return np.einsum("t,tdn->dn", weights / weights.sum(), decays**2 * squares)
    if score == "energy":
        return ((C[:, :, None] * h[:, 1:]) ** 2).sum((0, 1))
    if score == "ghost":
        return (h[:, 1:] ** 2).sum((0, 1)) * (C**2).sum((0, 1))
    raise AssertionError(score)


ENTRY_SCORES = ["magnitude", "sparsessm-l2", "sparsessm", "energy", "ghost"]


@pytest.mark.parametrize("score", ENTRY_SCORES)
def test_importance_is_the_formula(score, inputs, h):
    judge, layer = layer_for(score, inputs)
    expected = formula(score, inputs, h)
    np.testing.assert_allclose(judge.importance(layer), expected, rtol=1e-4)
    np.testing.assert_allclose(judge.of_states(layer), expected.sum(0), rtol=1e-4)


@pytest.mark.parametrize("score", ENTRY_SCORES)
@pytest.mark.parametrize("keep", [1, 3, 4])
def test_the_dearest_states_stay(score, keep, inputs, h):
    expected = sorted(np.argsort(-formula(score, inputs, h).sum(0))[:keep].tolist())
    judge, layer = layer_for(score, inputs, keep)
    assert judge.choose(layer, keep) == expected


def test_vote_prunes_the_most_often_named(inputs):
    judge, layer = layer_for("sparsessm-vote", inputs, keep=3)
    counts = layer.sums["vote"].value
    kept = judge.choose(layer, 3)
    assert max(counts[kept]) <= min(counts[n] for n in range(N) if n not in kept)


def test_random_follows_the_seed_and_differs_between_layers():
    A_log, judge = torch.zeros(4, 16), registered("column", "random")
    pick = [judge.choose(ScoredGroup(i, A_log, seed=s), 8) for s in (0, 1) for i in (0, 1, 2)]
    again = judge.choose(ScoredGroup(0, A_log), 8)
    assert pick[0] == again
    assert len({tuple(p) for p in pick}) == len(pick)


def test_ties_are_decided_by_position():
    assert registered("column", "magnitude").choose(ScoredGroup(0, torch.ones(4, 6)), 3) == [0, 1, 2]


def test_exact_with_and_without_repair_may_differ_but_each_is_best_for_its_aim(inputs):
    judge, layer = layer_for("exact", inputs, keep=2, repair=True)
    G = layer.sums["normal"].dense()
    repaired, plain = (judge.choose(replace(layer, repair=repair), 2) for repair in (True, False))
    assert evaluate(G, repaired, True).error <= evaluate(G, plain, True).error * 1.0001
    assert evaluate(G, plain, False).error <= evaluate(G, repaired, False).error * 1.0001


def test_only_what_a_score_needs_is_collected():
    def wanted(part, **options):
        job = job_of(ARCHITECTURE, random_model().backbone.layers[0], None, config=configure(model="test", **options))
        return set(scored_group(job, 0, part, 3).sums)

    assert wanted("column", score="magnitude", repair=False) == set()
    assert wanted("column", score="ghost", repair=True) == {"readout", "normal"}
    assert wanted("unstructured", score="ghost", pattern="unstructured") == {"readout"}
    assert wanted("column", score="exact", repair=True) == {"normal"}


@pytest.mark.parametrize("score", ENTRY_SCORES)
def test_unstructured_sets_the_cheapest_entries_to_zero(score, inputs, h):
    judge, layer = layer_for(score, inputs, pattern="unstructured")
    pruned = judge.pruned_entries(layer, 0.4)
    cheapest = np.argsort(formula(score, inputs, h), axis=None)[: round(0.4 * D * N)]
    expected = layer.A_log.clone()
    expected.view(-1)[torch.as_tensor(cheapest)] = 0
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("score", [*ENTRY_SCORES, "sparsessm-vote", "random", "sparsegpt"])
def test_n_of_every_m_states_stay(score):
    inputs = random_inputs(d_inner=D, d_state=8)
    judge, layer = layer_for(score, inputs, pattern="1:4")
    pruned = judge.pruned_entries(layer, NM(1, 4))
    assert ((pruned.view(D, 2, 4) != 0).sum(2) == 1).all()


def test_sparsegpt_moves_the_entries_that_stay_and_the_others_do_not(inputs):
    for score, moves in (("sparsegpt", True), ("sparsessm", False)):
        judge, layer = layer_for(score, inputs, pattern="unstructured")
        pruned = judge.pruned_entries(layer, 0.5)
        stayed = pruned != 0
        assert int((~stayed).sum()) == round(0.5 * D * N)
        assert torch.equal(pruned[stayed], layer.A_log[stayed]) is not moves
