"""Streaming statistics against loops written from the formulas, however the samples and the time are cut up."""

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.states.ranking import lowest
from ssmc.compressor.methods.states.statistics import (
    Chunk,
    NormalMatrix,
    SquaredReadout,
    SquaredStates,
    States,
    TimeWeighted,
    Vote,
    time_weights,
)
from ssmc.compressor.methods.weights.second_moments import StateMoment
from ssmc.compressor.options.config import Weighting
from ssmc.runtime.scan import ScanInputs, scan_states
from tests.support.naive import hidden_states, random_inputs, silu

CUTS = [(11, 3), (4, 1), (1, 2), (5, 3)]  # (time steps a stretch, samples a group)


def feed(statistic, inputs, stretch, group):
    """Give a statistic all states, `stretch` steps and `group` samples at a time, as the pipeline does."""
    states = inputs.initial_state()
    for start in range(0, inputs.length, stretch):
        stop = min(start + stretch, inputs.length)
        for first in range(0, inputs.batch, group):
            rows = slice(first, min(first + group, inputs.batch))
            part = ScanInputs(
                *(x[rows, start:stop] for x in (inputs.u, inputs.dt)),
                inputs.A,
                *(x[rows, start:stop] for x in (inputs.B, inputs.C)),
                inputs.D,
                inputs.z[rows, start:stop],
            )
            all_states = scan_states(part, states[rows])
            states[rows] = all_states[:, -1].transpose(1, 2)
            statistic.add(Chunk(start, part, all_states))
        statistic.end_of_stretch()
    return statistic


@pytest.fixture(scope="module")
def inputs():
    return random_inputs()


@pytest.fixture(scope="module")
def h(inputs):
    return hidden_states(inputs)


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_squared_states_are_those_before_each_token(inputs, h, stretch, group):
    expected = (h[:, :-1] ** 2).sum((0, 1)).T
    np.testing.assert_allclose(feed(SquaredStates(), inputs, stretch, group).value, expected, rtol=1e-5)


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_readout_factors_and_products(inputs, h, stretch, group):
    C = inputs.C.double().numpy()
    result = feed(SquaredReadout(), inputs, stretch, group)
    np.testing.assert_allclose(result.states, (h[:, 1:] ** 2).sum((0, 1)).T, rtol=1e-5)
    np.testing.assert_allclose(result.readers, (C**2).sum((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(result.products, ((C[:, :, None] * h[:, 1:]) ** 2).sum((0, 1)).T, rtol=1e-5)


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_time_weighted_sums_over_samples_before_multiplying(inputs, h, stretch, group):
    dt, A = inputs.dt.double().numpy(), inputs.A.double().numpy()
    expected = np.zeros_like(A)
    for t in range(1, inputs.length):  # at t = 0 there is no state to weigh
        decays = sum(np.exp(dt[b, t][:, None] * A) for b in range(inputs.batch))
        squares = sum(h[b, t] ** 2 for b in range(inputs.batch))
        expected += 1 / t * decays**2 * squares
    expected /= sum(1 / t for t in range(1, inputs.length))
    weights = time_weights(Weighting.power, inputs.length - 1)
    np.testing.assert_allclose(feed(TimeWeighted(weights), inputs, stretch, group).value, expected.T, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Weighting.power, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        (Weighting.linear, [5, 4, 3, 2, 1]),
        (Weighting.discount, [1, 0.9, 0.81, 0.729, 0.6561]),
        (Weighting.window, [1, 1, 0, 0, 0]),  # ceil(5 / 4) steps
        (Weighting.uniform, [1, 1, 1, 1, 1]),
    ],
)
def test_time_weights(kind, expected):
    np.testing.assert_allclose(time_weights(kind, 5), np.array(expected) / sum(expected), rtol=1e-12)


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_state_moment_sums_over_samples_time_and_channels(inputs, h, stretch, group):
    expected = np.einsum("btdn,btdm->nm", h[:, :-1], h[:, :-1])
    moment = feed(States(StateMoment(5)), inputs, stretch, group).moment
    np.testing.assert_allclose(moment.total, expected, rtol=1e-5, atol=1e-6 * expected.max())


@pytest.mark.parametrize(("stretch", "group"), CUTS)
@pytest.mark.parametrize("candidates", [1, 2, 4])
def test_vote_names_exactly_k_a_step_and_none_at_the_first(inputs, h, stretch, group, candidates):
    A_log = torch.log(-inputs.A)
    counts = np.zeros(5, dtype=int)
    for t in range(1, inputs.length):
        importance = [
            sum(A_log[d, n].item() ** 2 * h[b, t, d, n] ** 2 for b in range(inputs.batch) for d in range(7))
            for n in range(5)
        ]
        for n in sorted(range(5), key=lambda n: importance[n])[:candidates]:
            counts[n] += 1
    vote = Vote(A_log, lambda importance: lowest(importance, candidates), states=True)
    result = feed(vote, inputs, stretch, group).value
    assert result.tolist() == counts.tolist()
    assert result.sum() == candidates * (inputs.length - 1)


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_vote_on_entries(inputs, h, stretch, group):
    """Each step names the 12 least important of all 7 x 5 entries."""
    A_log = torch.log(-inputs.A)
    counts = np.zeros((7, 5), dtype=int)
    for t in range(1, inputs.length):
        importance = A_log.double().numpy() ** 2 * (h[:, t] ** 2).sum(0)
        for flat in np.argsort(importance, axis=None)[:12]:
            counts[np.unravel_index(flat, counts.shape)] += 1
    name = lambda importance: lowest(importance.flatten(1), 12).view(importance.shape)  # noqa: E731
    assert feed(Vote(A_log, name, states=False), inputs, stretch, group).value.tolist() == counts.tolist()


@pytest.mark.parametrize(("stretch", "group"), CUTS)
def test_normal_matrix(inputs, h, stretch, group):
    n = 5
    C, gate = inputs.C.double().numpy(), silu(inputs.z.double().numpy())
    expected = np.zeros((n, n, n, n))
    for b in range(inputs.batch):
        for t in range(inputs.length):
            gated = gate[b, t][:, None] * h[b, t + 1]  # (D, N)
            expected += np.einsum("dk,dm,n,p->knmp", gated, gated, C[b, t], C[b, t])
    result = feed(NormalMatrix(), inputs, stretch, group).dense()
    np.testing.assert_allclose(result, expected.reshape(n * n, n * n), rtol=1e-4, atol=1e-5 * expected.max())
