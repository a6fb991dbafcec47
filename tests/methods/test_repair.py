"""The repair and the elimination against direct least squares and brute force on the outputs themselves."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.states.elimination import eliminate, evaluate, exchange
from ssmc.compressor.methods.states.statistics import Chunk, NormalMatrix
from ssmc.compressor.methods.states.weights import token_weights
from tests.methods.test_statistics import feed
from tests.support.naive import hidden_states, random_inputs, scan_output, silu

N = 5


@pytest.fixture(scope="module", params=[0, 1])
def layer(request):
    inputs = random_inputs(batch=2, length=40, d_inner=8, d_state=N, seed=request.param)
    return inputs, hidden_states(inputs), feed(NormalMatrix(), inputs, 16, 2).dense()


def relative_error(inputs, h, kept, mixing=None):
    whole = scan_output(inputs, h)
    return ((whole - scan_output(inputs, h, mixing, kept)) ** 2).sum() / (whole**2).sum()


def least_squares(inputs, h, kept):
    """M from the overdetermined system itself: one equation a token and channel, one unknown an entry of M."""
    C, gate = inputs.C.double().numpy(), silu(inputs.z.double().numpy())
    columns = np.einsum("btd,btdk,btn->btdkn", gate, h[:, 1:][..., list(kept)], C).reshape(-1, len(kept) * N)
    solution, *_ = np.linalg.lstsq(columns, scan_output(inputs, h).reshape(-1), rcond=None)
    return solution.reshape(len(kept), N)


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 4), (3,)])
def test_errors_and_mixing_are_those_of_the_outputs(layer, kept):
    inputs, h, G = layer
    result = evaluate(G, kept, repair=True)
    assert result.error_unrepaired == pytest.approx(relative_error(inputs, h, kept), rel=1e-3)
    assert result.error == pytest.approx(relative_error(inputs, h, kept, result.mixing.numpy()), rel=1e-3)
    best = relative_error(inputs, h, kept, least_squares(inputs, h, kept))
    assert result.error == pytest.approx(best, rel=1e-3)
    assert result.error < result.error_unrepaired
    np.testing.assert_allclose(result.mixing, least_squares(inputs, h, kept), atol=2e-3)


def test_without_repair_nothing_is_mixed(layer):
    inputs, h, G = layer
    result = evaluate(G, (0, 2), repair=False)
    assert result.mixing is None
    assert result.error == result.error_unrepaired == pytest.approx(relative_error(inputs, h, (0, 2)), rel=1e-3)


def test_keeping_everything_costs_nothing(layer):
    result = evaluate(layer[2], range(N), repair=True)
    assert result.error == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(result.mixing, np.eye(N), atol=1e-9)


@pytest.mark.parametrize("keep", [4, 3, 2, 1])
@pytest.mark.parametrize("repair", [True, False])
def test_elimination_takes_the_cheapest_state_each_time(layer, keep, repair):
    inputs, h, G = layer
    left = list(range(N))
    while len(left) > keep:

        def cost(state):
            rest = [s for s in left if s != state]
            return relative_error(inputs, h, rest, least_squares(inputs, h, rest) if repair else None)

        left.remove(min(left, key=cost))
    assert eliminate(G, keep, repair) == left


def test_elimination_is_close_to_the_best_of_all_sets(layer):
    _, _, G = layer
    best = min(evaluate(G, kept, repair=True).error for kept in itertools.combinations(range(N), 3))
    assert evaluate(G, eliminate(G, 3, repair=True), repair=True).error <= 1.5 * best


def test_a_layer_without_output_keeps_its_rows():
    result = evaluate(torch.zeros(N * N, N * N, dtype=torch.float64), (1, 3), repair=True)
    assert result.error == 0
    np.testing.assert_array_equal(result.mixing, np.eye(N)[[1, 3]])


def test_states_that_repeat_another_go_for_free():
    """Two states with the same B row and the same A hold the same h: their read-outs merge into one, at no cost."""
    inputs = random_inputs(batch=2, length=30, d_inner=6, d_state=N, seed=3)
    inputs.A[:, 4] = inputs.A[:, 1]
    inputs.B[..., 4] = inputs.B[..., 1]
    G = feed(NormalMatrix(), inputs, 16, 2).dense()
    kept = eliminate(G, N - 1, repair=True)
    assert len({1, 4} & set(kept)) == 1
    assert evaluate(G, kept, repair=True).error < 1e-5
    assert evaluate(G, kept, repair=False).error > 1e-2


def test_exchange_finds_no_better_neighbour_and_is_never_worse(layer):
    _, _, G = layer
    for keep in (1, 2, 3):
        for start in itertools.combinations(range(N), keep):
            kept = exchange(G, start)
            error = evaluate(G, kept, repair=True).error
            neighbours = [sorted({*kept, new} - {old}) for old in kept for new in range(N) if new not in kept]
            assert error <= evaluate(G, start, repair=True).error
            assert error <= min(evaluate(G, states, repair=True).error for states in neighbours) * (1 + 1e-5)
    assert exchange(G, range(N)) == list(range(N))


def test_weights_count_tokens_several_times():
    """A token of weight 3 does what three copies of its equations do."""
    inputs = random_inputs(batch=2, length=12, d_inner=8, d_state=N, seed=4)
    h = hidden_states(inputs)
    weights = torch.ones(2, 12)
    weights[0, 5] = weights[1, 11] = 3.0
    plain, weighed = NormalMatrix(), NormalMatrix()
    chunk = Chunk(0, inputs, torch.tensor(h).float().transpose(2, 3), weights=weights)
    weighed.add(chunk)
    plain.add(replace(chunk, weights=None))
    for row, token in ((0, 5), (1, 11)):
        one = replace(
            inputs, **{n: getattr(inputs, n)[row : row + 1, token : token + 1] for n in ("u", "dt", "B", "C", "z")}
        )
        states = chunk.states[row : row + 1, token : token + 2]
        for _ in range(2):
            plain.add(Chunk(token, one, states))
    torch.testing.assert_close(weighed.value, plain.value, rtol=1e-5, atol=1e-7)


def test_tokens_count_more_where_what_they_predict_stood_far_back():
    tokens = torch.randint(40, (3, 400), generator=torch.Generator().manual_seed(1))
    tokens[1, 300:320], tokens[2, 200:210] = tokens[1, 20:40], tokens[2, 120:130]
    weights = token_weights(tokens, 10.0)
    for window, row in zip(tokens.tolist(), weights.tolist(), strict=True):
        for t in range(399):
            last = [s for s in range(2, t + 1) if window[s - 2 : s + 1] == window[t - 1 : t + 2]]
            assert row[t] == (11.0 if last and t + 1 - max(last) > 100 else 1.0)
        assert row[399] == 1.0
    assert weights[1].gt(1).sum() >= 18
    assert token_weights(tokens, 0.0) is None
