"""States in fewer bits: the rounding against numpy, the kernel against a scan token by token, sessions against both."""

import math

import numpy as np
import pytest
import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation.torch_session import TorchSession
from ssmc.runtime.scan import ScanInputs, SsdInputs, rounded, selective_scan, ssd_scan
from ssmc.runtime.scan.rounding import StateFormat, channel_block, pack, unpack
from tests.families.test_memory import allocated
from tests.support.families import bamba, difference, falcon_mamba, random_ids
from tests.support.models import random_mamba2, random_model

MODELS = {"mamba": random_model, "mamba2": random_mamba2, "falcon_mamba": falcon_mamba, "bamba": bamba}


def rough(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_codes_and_scales_are_those_of_the_formula():
    """Written out in numpy for one head: 127 codes up to the largest of each state, up or down by the low digits."""
    state = rough(2, 3, 5, 4) * torch.tensor([1.0, 1e-3, 40.0, 0.0])
    codes, scales = pack(state, StateFormat())
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (
        torch.int8,
        state.shape,
        torch.float16,
        (2, 3, 1, 4),
    )
    for b, h, n in np.ndindex(2, 3, 4):
        column = state[b, h, :, n].numpy()
        scale = np.float16(np.abs(column).max() * np.float32(1 / 127))
        assert scales[b, h, 0, n].item() == scale
        for value, code in zip(column, codes[b, h, :, n].tolist(), strict=True):
            if scale == 0:
                assert code == 0
                continue
            x = value / np.float32(scale)
            assert code in {min(127, max(-127, way(x))) for way in (math.floor, math.ceil)}
    back = unpack(codes, scales)
    assert float((back - state).abs().max()) <= float(scales.max())
    assert back[..., 3].eq(0).all()
    again, _ = pack(back, StateFormat(dithered=False))
    assert int((again - codes).abs().max()) <= 1


@pytest.mark.parametrize(("per", "shape"), [("channel", (2, 3, 5, 1)), ("head", (2, 3, 1, 1)), ("state", (2, 3, 1, 4))])
def test_whoever_shares_a_scale(per, shape):
    assert pack(rough(2, 3, 5, 4), StateFormat(per=per))[1].shape == shape


def test_rounding_is_right_on_average_and_lets_states_decay():
    state = rough(1, 1, 20_000, 1)
    kept = {dithered: unpack(*pack(state, StateFormat(dithered=dithered))) for dithered in (True, False)}
    step = float(state.abs().max()) / 127
    assert abs(float((kept[True] - state).mean())) < 0.01 * step
    decaying = {dithered: torch.linspace(-1, 1, 64).view(1, 1, 64, 1).clone() for dithered in (True, False)}
    decaying[True][..., 0, 0] = decaying[False][..., 0, 0] = 2.0
    rates = 1 - 0.003 * torch.rand(600, generator=torch.Generator().manual_seed(1))  # as time steps differ by token
    for rate in rates:
        for dithered, held in decaying.items():
            held *= rate
            held[:, :, 0] = 2.0  # one channel that stays, and with it the scale
            decaying[dithered] = unpack(*pack(held, StateFormat(dithered=dithered)))
    wanted = torch.linspace(-1, 1, 64)[1:] * rates.prod()
    stuck, moved = ((decaying[d][0, 0, 1:, 0] - wanted).abs().mean() for d in (False, True))
    assert stuck > 0.25  # to the nearest code nothing moves
    assert moved < 0.06


def test_float16_is_rounded_to_the_nearest():
    state = torch.tensor([1.0, 1 + 2**-11, 1e-7, 1e9, -3.14159]).view(1, 1, 5)
    codes, scales = pack(state, StateFormat("float16"))
    assert scales is None
    assert codes.flatten().tolist() == [
        *map(float, np.float16([1, 1 + 2**-11, 1e-7])),
        65504.0,
        float(np.float16(-3.14159)),
    ]


def inputs_of(kind, length=40):
    """What a scan reads of 2 sequences; 12 channels, 5 states."""
    B, C, u, z = (rough(2, length, width, seed=i) for i, width in enumerate((10, 10, 12, 12)))
    if kind == "mamba":
        dt = rough(2, length, 12, seed=5).exp() * 0.1
        return ScanInputs(u, dt, -rough(12, 5, seed=6).exp(), B[..., :5], C[..., :5], rough(12, seed=7), z)
    dt = rough(2, length, 4, seed=5).exp() * 0.1
    return SsdInputs(
        u, dt, -rough(4, seed=6).exp(), B.unflatten(2, (2, 5)), C.unflatten(2, (2, 5)), rough(4, seed=7), z
    )


FORMS = [StateFormat(), StateFormat(dithered=False), StateFormat(per="channel"), StateFormat(per="head")]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("form", [*FORMS, StateFormat("float16")], ids=str)
def test_the_kernel_rounds_after_every_token_as_single_steps_do(kind, form, monkeypatch):
    scan, inputs = {"mamba": selective_scan, "mamba2": ssd_scan}[kind], inputs_of(kind)
    exact, _ = scan(inputs)
    fast, state = scan(inputs, rounding=form)
    monkeypatch.setattr(rounded, "_kernels", lambda: None)
    slow, wanted = scan(inputs, rounding=form)
    off = ((fast - slow).abs() > 1e-4 * slow.abs().max()).float().mean()
    assert off < 0.02  # where the last bit of a value decides about a code
    torch.testing.assert_close(state, wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)
    assert 1e-5 < difference(fast, exact) < 0.1


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_a_session_keeps_its_states_in_fewer_bits(family, dtype):
    model, ids = MODELS[family](), random_ids(2, 24)
    exact = TorchSession(use_fast_scan(model)).prefill(ids)
    with torch.inference_mode():
        whole = use_fast_scan(model, state_dtype=dtype, each_token=True)(ids).logits[:, -1]
    session = TorchSession(use_fast_scan(model, state_dtype=dtype))
    session.prefill(ids[:, :5])
    for token in ids[:, 5:].unbind(1):
        logits = session.step(token)
    assert difference(logits, exact) < 0.1
    assert difference(logits, whole) < 0.1
    assert not torch.equal(logits, exact)
    cache = session._cache
    held = allocated(cache, "recurrent_states")
    sizes = cache.layers[0].recurrent_states[0]
    share = sizes.shape[2] if sizes.dim() == 4 else channel_block(sizes.shape[1])
    numbers = sum(layer.recurrent_states[0].numel() for layer in cache.layers if hasattr(layer, "recurrent_states"))
    assert held == (numbers + 2 * numbers // share if dtype == "int8" else 2 * numbers)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert all(
        torch.equal(*state)
        for layer in cache.layers
        if hasattr(layer, "recurrent_states")
        for state in layer.recurrent_states.values()
        if state is not None
    )


def test_the_same_input_gives_the_same_codes_and_an_unknown_dtype_is_refused():
    state = rough(2, 3, 5, 4)
    assert torch.equal(pack(state, StateFormat())[0], pack(state.clone(), StateFormat())[0])
    with pytest.raises(UsageError, match="no state dtype 'int4': choose one of float32, float16, int8"):
        use_fast_scan(random_model(), state_dtype="int4")
