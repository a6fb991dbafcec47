"""Streaming second moments against loops over tokens."""

import numpy as np
import pytest
import torch
from torch import nn

from ssmc.compressor.methods.weights.second_moments import (
    TOKENS,
    DepthwiseSecondMoment,
    SecondMoment,
    SquaredInputs,
    StateMoment,
)
from ssmc.compressor.methods.weights.sparsegpt import relative_error


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outer_products(x):
    """sum x x' over the rows of a 2-D array, a token at a time."""
    H = np.zeros((x.shape[1], x.shape[1]))
    for token in x.double().numpy():
        H += np.outer(token, token)
    return H


def conv_moments(x, kernel):
    """(D, K, K): windows of every channel, zeros before the start, one at a time."""
    batch, length, channels = x.shape
    H = np.zeros((channels, kernel, kernel))
    for b in range(batch):
        for d in range(channels):
            line = np.concatenate([np.zeros(kernel - 1), x[b, :, d].double().numpy()])
            for t in range(length):
                window = line[t : t + kernel]
                H[d] += np.outer(window, window)
    return H


def test_second_moment_is_the_sum_of_outer_products():
    x = random(29, 6)
    moment = SecondMoment(6)
    moment.add(x)
    np.testing.assert_allclose(moment.total, outer_products(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moment.mean(), outer_products(x) / 29, rtol=1e-5, atol=1e-6)
    assert moment.tokens == 29


@pytest.mark.parametrize("in_features", [1, 128, 129, 515])
def test_both_triangles_are_filled_at_any_width(in_features):
    x = random(20, in_features, dtype=torch.float64)
    moment = SecondMoment(in_features)
    moment.add(x[:12])
    moment.add(x[12:])
    torch.testing.assert_close(moment.total, x.t() @ x)
    assert torch.equal(moment.total, moment.total.t())


def test_streaming_equals_one_shot_and_every_token_weighs_the_same():
    x = random(4, 50, 6, dtype=torch.float64)
    whole, parts, shuffled = SecondMoment(6), SecondMoment(6), SecondMoment(6)
    whole.add(x)
    for sample in x:
        for start in (0, 7, 20):  # calls of unequal length
            parts.add(sample[start : {0: 7, 7: 20, 20: 50}[start]])
    for sample in x.flip(0):
        shuffled.add(sample.flip(0))
    assert whole.tokens == parts.tokens == shuffled.tokens == 200
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shuffled.total, whole.total, rtol=1e-12, atol=1e-12)


def test_float32_sums_do_not_grow_stale():
    # 1 + 2^-13 over many tokens: a float32 running sum would stop taking in the small part
    tokens = 40 * TOKENS
    x = torch.full((tokens, 1), (1 + 2**-13) ** 0.5)
    moment = SecondMoment(1)
    for part in x.split(TOKENS // 2):
        moment.add(part)
    expected = tokens * float(x[0].double()) ** 2
    assert abs(float(moment.total) / expected - 1) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_multiplied_in_float32(dtype):
    x = random(64, 5, dtype=dtype) * 100  # squares overflow float16
    moment = SecondMoment(5)
    moment.add(x)
    np.testing.assert_allclose(moment.total, outer_products(x), rtol=1e-5, atol=1e-1)


def test_squared_inputs_is_the_diagonal():
    x = random(3, 2 * TOKENS + 5, 4)
    moment, squares = SecondMoment(4), SquaredInputs(4)
    moment.add(x)
    squares.add(x)
    torch.testing.assert_close(squares.total, moment.total.diagonal(), rtol=1e-5, atol=0)
    assert squares.tokens == moment.tokens


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_depthwise_is_the_loop_over_windows(kernel):
    x = random(2, 9, 5)
    moment = DepthwiseSecondMoment(5, kernel)
    moment.add(x)
    np.testing.assert_allclose(moment.total, conv_moments(x, kernel), rtol=1e-5, atol=1e-5)
    assert moment.tokens == 18


def test_depthwise_windows_are_those_of_conv1d():
    channels, kernel = 5, 4
    x = random(3, 11, channels, dtype=torch.float64)
    conv = nn.Conv1d(channels, channels, kernel, groups=channels, padding=kernel - 1, bias=False).double()
    with torch.no_grad():
        y = conv(x.transpose(1, 2))[..., : x.shape[1]]  # (B, D, L), causal as Mamba cuts it
    moment = DepthwiseSecondMoment(channels, kernel)
    moment.add(x)
    w = conv.weight.detach()[:, 0]
    energy = torch.einsum("dk,dkj,dj->d", w, moment.total, w)
    torch.testing.assert_close(energy, y.square().sum((0, 2)))


@pytest.mark.parametrize("lengths", [[9], [1, 1, 7], [2, 7], [4, 5]])  # stretches shorter than the window too
def test_depthwise_history_makes_stretches_equal_the_whole(lengths):
    x = random(2, 9, 5, dtype=torch.float64)
    whole, streamed = DepthwiseSecondMoment(5, 4), DepthwiseSecondMoment(5, 4)
    whole.add(x)
    history = torch.zeros(2, 3, 5, dtype=torch.float64)
    for part in x.split(lengths, dim=1):
        streamed.add(part, history)
        history = torch.cat([history, part], dim=1)[:, -3:]
    torch.testing.assert_close(streamed.total, whole.total)
    assert streamed.tokens == whole.tokens


def test_depthwise_long_sequences_are_cut_without_losing_windows(monkeypatch):
    monkeypatch.setattr("ssmc.compressor.methods.weights.second_moments.TOKENS", 4)
    x = random(2, 11, 3)
    moment = DepthwiseSecondMoment(3, 4)
    moment.add(x)
    np.testing.assert_allclose(moment.total, conv_moments(x, 4), rtol=1e-5, atol=1e-5)


def test_state_moment_sums_over_samples_time_and_channels():
    states = random(2, 5, 3, 4)  # (B, T, N, D)
    moment = StateMoment(3)
    moment.add(states[:, :2])
    moment.add(states[:, 2:])
    vectors = states.permute(0, 1, 3, 2).reshape(-1, 3)
    np.testing.assert_allclose(moment.total, outer_products(vectors), rtol=1e-5, atol=1e-5)
    assert moment.tokens == len(vectors)


def test_the_quadratic_form_is_the_output_error():
    x, W, V = random(40, 6), random(3, 6, seed=1), random(3, 6, seed=2)
    moment = SecondMoment(6)
    moment.add(x)
    outputs = [(x.double() @ w.double().t()) for w in (W, V)]
    expected = float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())
    assert relative_error(W, V, moment.total) == pytest.approx(expected, rel=1e-5)
    assert relative_error(torch.zeros(3, 6), V, moment.total) == 0.0
