"""Scores and choices against their formulas."""

import numpy as np
import pytest
import torch

from ssmc.compressor import configure
from ssmc.compressor.methods.states.scores import (
    Layer,
    choose_states,
    entry_importance,
    prune_entries,
    state_importance,
    statistics_for,
)
from ssmc.compressor.methods.weights.masks import NM
from ssmc.compressor.options.config import Score
from tests.methods.test_statistics import feed
from tests.support.naive import hidden_states, random_inputs

D, N = 7, 5


@pytest.fixture(scope="module")
def inputs():
    return random_inputs(d_inner=D, d_state=N)


@pytest.fixture(scope="module")
def h(inputs):
    return hidden_states(inputs)


def layer_for(score, inputs, keep=3, repair=False, **options):
    A_log = torch.log(-inputs.A)
    config = configure(model="test", score=score, repair=repair, **options)
    statistics = statistics_for(config, A_log, keep, inputs.length - 1)
    for statistic in statistics.wanted():
        feed(statistic, inputs, 4, 2)
    return Layer(0, A_log, statistics)


def formula(score, inputs, h):
    """(D, N) importance, straight from the definition of each score."""
    A_log, A = torch.log(-inputs.A).double().numpy(), inputs.A.double().numpy()
    C, dt = inputs.C.double().numpy(), inputs.dt.double().numpy()
    if score is Score.magnitude:
        return np.abs(A_log)
    if score is Score.sparsessm_l2:
        return A_log**2 * (h[:, :-1] ** 2).sum((0, 1))
    if score is Score.sparsessm:
        decays = np.exp(dt[..., None] * A).sum(0)  # (L, D, N)
        squares = (h[:, :-1] ** 2).sum(0)
        weights = np.array([0.0] + [1 / t for t in range(1, len(decays))])
        return np.einsum("t,tdn->dn", weights / weights.sum(), decays**2 * squares)
    if score is Score.energy:
        return ((C[:, :, None] * h[:, 1:]) ** 2).sum((0, 1))
    if score is Score.ghost:
        return (h[:, 1:] ** 2).sum((0, 1)) * (C**2).sum((0, 1))
    raise AssertionError(score)


ENTRY_SCORES = [Score.magnitude, Score.sparsessm_l2, Score.sparsessm, Score.energy, Score.ghost]


@pytest.mark.parametrize("score", ENTRY_SCORES)
def test_importance_is_the_formula(score, inputs, h):
    layer = layer_for(score, inputs)
    expected = formula(score, inputs, h)
    np.testing.assert_allclose(entry_importance(score, layer), expected, rtol=1e-4)
    np.testing.assert_allclose(state_importance(score, layer, seed=0), expected.sum(0), rtol=1e-4)


@pytest.mark.parametrize("score", ENTRY_SCORES)
@pytest.mark.parametrize("keep", [1, 3, 4])
def test_the_dearest_states_stay(score, keep, inputs, h):
    expected = sorted(np.argsort(-formula(score, inputs, h).sum(0))[:keep].tolist())
    assert choose_states(score, layer_for(score, inputs, keep), keep, repair=False, seed=0) == expected


def test_vote_prunes_the_most_often_named(inputs):
    layer = layer_for(Score.sparsessm_vote, inputs, keep=3)
    counts = layer.statistics.vote.value
    kept = choose_states(Score.sparsessm_vote, layer, 3, repair=False, seed=0)
    assert max(counts[kept]) <= min(counts[n] for n in range(N) if n not in kept)


def test_random_follows_the_seed_and_differs_between_layers():
    A_log = torch.zeros(4, 16)
    pick = [choose_states(Score.random, Layer(i, A_log), 8, False, seed=s) for s in (0, 1) for i in (0, 1, 2)]
    again = choose_states(Score.random, Layer(0, A_log), 8, False, seed=0)
    assert pick[0] == again
    assert len({tuple(p) for p in pick}) == len(pick)


def test_ties_are_decided_by_position():
    layer = Layer(0, torch.ones(4, 6))
    assert choose_states(Score.magnitude, layer, 3, False, seed=0) == [0, 1, 2]


def test_exact_with_and_without_repair_may_differ_but_each_is_best_for_its_aim(inputs):
    from ssmc.compressor.methods.states.elimination import evaluate

    layer = layer_for(Score.exact, inputs, keep=2, repair=True)
    G = layer.statistics.normal.dense()
    repaired = choose_states(Score.exact, layer, 2, repair=True, seed=0)
    plain = choose_states(Score.exact, layer, 2, repair=False, seed=0)
    assert evaluate(G, repaired, True).error <= evaluate(G, plain, True).error * 1.0001
    assert evaluate(G, plain, False).error <= evaluate(G, repaired, False).error * 1.0001


def test_only_what_a_score_needs_is_collected():
    A_log = torch.zeros(4, 6)
    wanted = lambda **options: statistics_for(configure(model="test", **options), A_log, 3, 10).wanted()  # noqa: E731
    assert wanted(score="magnitude", repair=False) == []
    assert len(wanted(score="ghost", repair=True)) == 2
    assert len(wanted(score="ghost", pattern="unstructured")) == 1


@pytest.mark.parametrize("score", ENTRY_SCORES)
def test_unstructured_sets_the_cheapest_entries_to_zero(score, inputs, h):
    layer = layer_for(score, inputs, pattern="unstructured")
    pruned = prune_entries(score, layer, 0.4, seed=0)
    cheapest = np.argsort(formula(score, inputs, h), axis=None)[: round(0.4 * D * N)]
    expected = layer.A_log.clone()
    expected.view(-1)[torch.as_tensor(cheapest)] = 0
    assert torch.equal(pruned, expected)


@pytest.mark.parametrize("score", [*ENTRY_SCORES, Score.sparsessm_vote, Score.random, Score.sparsegpt])
def test_n_of_every_m_states_stay(score):
    inputs = random_inputs(d_inner=D, d_state=8)
    pruned = prune_entries(score, layer_for(score, inputs, pattern="1:4"), NM(1, 4), seed=0)
    assert ((pruned.view(D, 2, 4) != 0).sum(2) == 1).all()


def test_sparsegpt_moves_the_entries_that_stay_and_the_others_do_not(inputs):
    for score, moves in ((Score.sparsegpt, True), (Score.sparsessm, False)):
        layer = layer_for(score, inputs, pattern="unstructured")
        pruned = prune_entries(score, layer, 0.5, seed=0)
        stayed = pruned != 0
        assert int((~stayed).sum()) == round(0.5 * D * N)
        assert torch.equal(pruned[stayed], layer.A_log[stayed]) is not moves
