"""Mamba-2: its scan against a loop from the formula, the model with our scan against stock transformers, its files."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Mamba2ForCausalLM

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.scan import SsdInputs, ssd_scan
from tests.support.models import LAYERS, VOCAB, random_mamba2, save_mamba_ssm, save_transformers

BACKENDS = ["cpu", "reference"]


def random_inputs(batch=2, length=70, heads=6, head_dim=3, groups=2, d_state=5, seed=0) -> SsdInputs:
    """Inputs with the strides of a real layer: u, B and C are slices of what conv1d puts out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d_inner, readers = heads * head_dim, groups * d_state
    u, B, C = normal(batch, length, d_inner + 2 * readers).split([d_inner, readers, readers], dim=-1)
    return SsdInputs(
        u=u,
        dt=torch.exp(1.5 * normal(batch, length, heads) - 2),
        A=-torch.exp(normal(heads)),
        B=B.unflatten(2, (groups, d_state)),
        C=C.unflatten(2, (groups, d_state)),
        D=normal(heads),
    )


def naive(inputs: SsdInputs, state: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence of every head, one token after the other, in float64: y (B, L, D) and the last state."""
    u, dt, A, B, C, D = (getattr(inputs, name).double().numpy() for name in ("u", "dt", "A", "B", "C", "D"))
    batch, length, heads = dt.shape
    P, N, per_group = u.shape[2] // heads, B.shape[3], heads // B.shape[2]
    h = np.zeros((batch, heads, P, N)) if state is None else state.double().numpy().copy()
    y = np.empty(u.shape)
    for b in range(batch):
        for k in range(heads):
            for t in range(length):
                x, g = u[b, t, k * P : (k + 1) * P], k // per_group
                h[b, k] = np.exp(dt[b, t, k] * A[k]) * h[b, k] + dt[b, t, k] * np.outer(x, B[b, t, g])
                y[b, t, k * P : (k + 1) * P] = h[b, k] @ C[b, t, g] + D[k] * x
    return y, h


def random_state(inputs: SsdInputs) -> torch.Tensor:
    return torch.randn(inputs.initial_state().shape, generator=torch.Generator().manual_seed(9))


def difference(got: torch.Tensor, wanted) -> float:
    """Largest difference, relative to the largest value."""
    wanted = torch.as_tensor(wanted)
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"length": 1},
        {"length": 64, "groups": 1},
        {"length": 129, "groups": 6, "head_dim": 1},
        {"length": 33, "d_state": 1, "head_dim": 4},
        {"length": 20, "d_state": 40, "heads": 1, "groups": 1, "batch": 1},
    ],
    ids=str,
)
def test_the_scan_is_the_recurrence(backend, sizes):
    inputs = random_inputs(**sizes)
    for state in (None, random_state(inputs)):
        before = None if state is None else state.clone()
        y, end = ssd_scan(inputs, state, backend)
        wanted, wanted_end = naive(inputs, state)
        assert difference(y, wanted) < 2e-6
        assert difference(end, wanted_end) < 2e-6
        if state is not None:
            assert torch.equal(state, before), "the state given must stay as it is"
            assert end.data_ptr() != state.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay_and_long_steps_stay_exact(backend):
    """Sums of dt A of thousands within a chunk: nothing may overflow, and short steps after long ones still count."""
    inputs = random_inputs(batch=1, length=100)
    dt = inputs.dt.clone()
    dt[:, ::7] = 300.0
    inputs = replace(inputs, dt=dt)
    wanted, wanted_end = naive(inputs)
    y, end = ssd_scan(inputs, backend=backend)
    assert difference(y, wanted) < 2e-6
    assert difference(end, wanted_end) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_keep_the_state(backend):
    inputs = random_inputs(length=0)
    state = random_state(inputs)
    y, end = ssd_scan(inputs, state, backend)
    assert y.shape == inputs.u.shape
    assert torch.equal(end, state)


def test_what_does_not_fit_is_refused():
    inputs = random_inputs(length=4)
    for name in ("dt", "A", "C", "D"):
        with pytest.raises(ValueError, match=r"must be|divide"):
            ssd_scan(replace(inputs, **{name: getattr(inputs, name)[..., :-1]}))
    with pytest.raises(ValueError, match="state must be"):
        ssd_scan(inputs, torch.zeros(2, 6, 5, 3))
    with pytest.raises(UsageError, match="no gradients of a Mamba-2"):
        ssd_scan(replace(inputs, u=inputs.u.clone().requires_grad_()), backend="cpu")
    with pytest.raises(UsageError, match="no scan backend"):
        ssd_scan(inputs, backend="gpu")


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCAB - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    """The same model, stock and fast."""
    return random_mamba2(), use_fast_scan(random_mamba2())


@torch.no_grad()
def test_states_matter_in_these_models(models):
    stock = copy.deepcopy(models[0])
    ids = random_ids(1, 40)
    before = stock(ids).logits
    for block in stock.backbone.layers:
        mixer = block.mixer
        for tensor in (mixer.conv1d.weight, mixer.conv1d.bias):
            tensor[mixer.intermediate_size :] = 0  # B and C
    assert difference(stock(ids).logits, before) > 0.05


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("length", [1, 31, 64, 67])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3},
        {"n_groups": 3, "state_size": 16, "time_step_limit": (0.05, 0.4)},
    ],
    ids=["two groups", "one group", "three groups, limited dt"],
)
def test_logits_and_cache_equal_stock(backend, length, changes):
    stock = random_mamba2(**changes)
    ids = random_ids(2, length)
    wanted = stock(ids, use_cache=True)
    got = use_fast_scan(copy.deepcopy(stock), backend)(ids, use_cache=True)
    assert difference(got.logits, wanted.logits) < 1e-5
    for layer in range(LAYERS):
        for kind in ("conv_states", "recurrent_states"):
            ours, theirs = (getattr(o.cache_params.layers[layer], kind)[0] for o in (got, wanted))
            assert ours.dtype == theirs.dtype
            assert difference(ours, theirs) < 1e-5


def in_pieces(model, ids, sizes, cache=None, mask=None):
    """The logits of ids given `sizes` tokens at a time, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, done = [], 0
    for size in sizes:
        piece, done = ids[:, done : done + size], done + size
        seen = None if mask is None else mask[:, :done]
        logits.append(model(piece, cache_params=cache, use_cache=True, attention_mask=seen).logits)
    assert done == ids.shape[1]
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 40, [39, 1], [2, 3, 1, 1, 30, 3], [3, 37]], ids=str)
def test_a_prompt_in_pieces_equals_the_prompt_at_once(models, sizes):
    stock, fast = models
    ids = random_ids(2, 40)
    got, cache = in_pieces(fast, ids, sizes)
    assert difference(got, stock(ids).logits) < 1e-5
    _, whole = in_pieces(stock, ids, [40])
    for layer in range(LAYERS):
        ours, theirs = (c.layers[layer].recurrent_states[0] for c in (cache, whole))
        assert difference(ours, theirs) < 1e-5


@torch.no_grad()
def test_stock_and_fast_can_take_over_from_each_other(models):
    ids = random_ids(2, 20)
    wanted = models[0](ids).logits
    for first, second in (models, models[::-1]):
        prefill, cache = in_pieces(first, ids[:, :18], [18])
        decoded, _ = in_pieces(second, ids[:, 18:], [1, 1], cache)
        assert difference(torch.cat([prefill, decoded], dim=1), wanted) < 1e-5


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 20, 13 and 1 tokens, padded to one length, and their mask."""
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate((20, 13, 1)):
        where = slice(20 - length, 20) if side == "left" else slice(0, length)
        ids[row, where] = random_ids(1, length, seed=row)[0]
        mask[row, where] = 1
    return ids, mask


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_masks_mean_what_they_mean_in_stock(models, side):
    stock, fast = models
    ids, mask = padded_batch(side)
    wanted = stock(ids, attention_mask=mask).logits
    assert difference(stock(ids).logits, wanted) > 1e-2
    assert difference(fast(ids, attention_mask=mask).logits, wanted) < 1e-5
    if side == "left":  # transformers' Mamba2Model drops the mask of later pieces, so the padding must be in the first
        assert difference(in_pieces(fast, ids, [19, 1], mask=mask)[0], wanted) < 1e-5


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}])
def test_generation_equals_stock(models, how):
    ids, mask = padded_batch("left")
    results = [m.generate(ids, attention_mask=mask, max_new_tokens=12, **how) for m in models]
    assert results[0].shape[1] > 22
    assert torch.equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_stock(training):
    stock = random_mamba2().train(training)
    fast = use_fast_scan(copy.deepcopy(stock))
    ids = random_ids(2, 70)
    for model in (stock, fast):
        model(ids, labels=ids).loss.backward()
    wanted = dict(stock.named_parameters())
    for name, parameter in fast.named_parameters():
        assert difference(parameter.grad, wanted[name].grad) < 1e-4, name


@torch.no_grad()
def test_half_models_are_as_close_to_float32_as_stock():
    truth = random_mamba2().bfloat16().float()
    ids = random_ids(2, 45)
    wanted = truth(ids).logits
    stock = random_mamba2().bfloat16()
    loss = (stock(ids).logits - wanted).norm()
    assert (use_fast_scan(stock)(ids).logits - wanted).norm() < 1.2 * loss


@torch.no_grad()
@pytest.mark.parametrize("layout", ["transformers", "mamba-ssm"])
@pytest.mark.parametrize("changes", [{}, {"n_groups": 1, "state_size": 16}])
def test_both_layouts_round_trip(tmp_path, layout, changes):
    model = random_mamba2(**changes)
    save = {"transformers": save_transformers, "mamba-ssm": save_mamba_ssm}[layout]
    loaded = load_checkpoint(save(model, tmp_path / "first"))
    assert loaded.format == layout
    ids = random_ids(2, 20)
    wanted = model(ids).logits
    assert difference(loaded.model(ids).logits, wanted) < 1e-6
    sizes = loaded.dimensions
    assert (sizes.d_state, sizes.dt_rank, sizes.head_dim, sizes.n_groups) == (
        model.config.state_size,
        12,
        4,
        model.config.n_groups,
    )
    states = loaded.model(ids, use_cache=True).cache_params
    held = sum(layer.conv_states[0].numel() + layer.recurrent_states[0].numel() for layer in states.layers)
    assert sizes.state_bytes() == held // len(ids) * 4
    for written in ("transformers", "mamba-ssm"):
        folder = tmp_path / written
        folder.mkdir()
        write_checkpoint(folder, loaded.tensors(), loaded.config, format=written)
        again = load_checkpoint(folder)
        assert again.format == written
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    stock = Mamba2ForCausalLM.from_pretrained(tmp_path / "transformers")
    assert difference(stock(ids).logits, wanted) < 1e-6
    raw = json.loads((tmp_path / "mamba-ssm" / "config.json").read_text())
    sizes = {"layer": "Mamba2", "d_state": model.config.state_size, "headdim": 4}
    assert raw["ssm_cfg"].items() >= sizes.items()
    # mamba_ssm's names and order of channels are transformers' (mamba_ssm/modules/mamba2.py: z, x, B, C, dt)
    stored = torch.load(tmp_path / "mamba-ssm" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(stored["backbone.layers.1.mixer.dt_bias"], model.backbone.layers[1].mixer.dt_bias)
    assert torch.equal(stored["backbone.layers.0.mixer.norm.weight"], model.backbone.layers[0].mixer.norm.weight)


@pytest.mark.parametrize(
    ("ssm_cfg", "named"),
    [
        ({"d_ssm": 24}, "d_ssm"),
        ({"D_has_hdim": True}, "D_has_hdim"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"norm_before_gate": True}, "norm_before_gate"),
        ({"dt_rank": 3}, "dt_rank"),
        ({"headdim": 5}, "headdim 5"),
    ],
)
def test_what_transformers_has_not_is_refused(tmp_path, ssm_cfg, named):
    cfg = {"layer": "Mamba2", "d_state": 7, "headdim": 4, "ngroups": 2} | ssm_cfg
    directory = save_mamba_ssm(random_mamba2(), tmp_path / "model", {"ssm_cfg": cfg})
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(directory)


def test_the_stock_forward_comes_back():
    model = random_mamba2()
    ids = random_ids(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        use_fast_scan(model)
        assert torch.equal(use_stock_scan(model)(ids).logits, before)
