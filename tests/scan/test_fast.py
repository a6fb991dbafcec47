"""Stock transformers with our scan against stock transformers without it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models import fast
from ssmc.runtime.models.architectures import mamba1
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.stock_kernels import guard_kernels


def random_model(seed: int = 0, **config) -> MambaForCausalLM:
    """A small Mamba whose outputs depend on every part: nothing keeps its tame initial value."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3}
    model = MambaForCausalLM(MambaConfig(**{**sizes, "eos_token_id": 60, "pad_token_id": 0, **config})).eval()
    with torch.no_grad():
        model.backbone.embeddings.weight.normal_()
        for block in model.backbone.layers:
            mixer = block.mixer
            mixer.A_log.normal_()
            mixer.D.normal_()
            mixer.dt_proj.bias.uniform_(-3, 1)
            mixer.dt_proj.weight.normal_(std=0.5)
            mixer.in_proj.weight.normal_(std=0.3)
            mixer.conv1d.weight.normal_(std=0.5)
            mixer.out_proj.weight.normal_(std=0.3)
            mixer.x_proj.weight.normal_(std=0.5)
            for part in (mixer.conv1d, mixer.in_proj, mixer.out_proj):
                if part.bias is not None:
                    part.bias.normal_(std=0.3)
    return guard_kernels(model)


def random_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module")
def models() -> tuple[MambaForCausalLM, MambaForCausalLM]:
    """The same model, stock and fast."""
    return random_model(), use_fast_scan(random_model())


@torch.no_grad()
def test_the_scan_matters_in_these_models(models):
    stock = copy.deepcopy(models[0])
    ids = random_ids(1, 40)
    before = stock(ids).logits
    for block in stock.backbone.layers:
        block.mixer.x_proj.weight[-stock.config.state_size :] = 0  # C: the state is never read
    assert difference(stock(ids).logits, before) > 0.05
    assert before.std() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("state_size", [1, 4, 16])
@pytest.mark.parametrize("biases", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}])
def test_logits_and_cache_equal_stock(backend, state_size, biases):
    stock = random_model(state_size=state_size, **biases)
    ids = random_ids(2, 45)
    wanted = stock(ids, use_cache=True)
    got = use_fast_scan(copy.deepcopy(stock), backend)(ids, use_cache=True)
    assert difference(got.logits, wanted.logits) < 1e-5
    for layer in range(3):
        for kind in ("conv_states", "recurrent_states"):
            ours, theirs = (getattr(o.cache_params.layers[layer], kind)[0] for o in (got, wanted))
            assert ours.dtype == theirs.dtype
            assert difference(ours, theirs) < 1e-5


@torch.no_grad()
def test_a_trained_model_agrees_too():
    model = load_checkpoint("tiny", dtype=torch.float32).model
    ids = torch.randint(0, model.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    wanted = use_stock_scan(model)(ids).logits
    assert difference(use_fast_scan(model)(ids).logits, wanted) < 1e-5
    assert difference(in_pieces(model, ids, [30, 1, 33])[0], wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_are_as_close_to_float32_as_stock(dtype):
    truth = random_model().to(dtype).float()
    ids = random_ids(2, 45)
    wanted = truth(ids).logits
    stock = random_model().to(dtype)
    loss = (stock(ids).logits - wanted).norm()
    got = use_fast_scan(stock)(ids).logits
    assert (got - wanted).norm() < 1.2 * loss


def in_pieces(model: nn.Module, ids: torch.Tensor, sizes: list[int], cache: DynamicCache | None = None, mask=None):
    """The logits of ids given `sizes` tokens at a time, and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, done = [], 0
    for size in sizes:
        piece = ids[:, done : done + size]
        done += size
        piece_mask = None if mask is None else mask[:, :done]
        logits.append(model(piece, cache_params=cache, use_cache=True, attention_mask=piece_mask).logits)
    assert done == ids.shape[1]
    return torch.cat(logits, dim=1), cache


PIECES = [[40], [1] * 40, [39, 1], [1, 39], [2, 3, 1, 1, 30, 3], [20, 20], [33, 7], [3, 37], [4, 36]]


@torch.no_grad()
@pytest.mark.parametrize("sizes", PIECES, ids=lambda sizes: "-".join(map(str, sizes[:6])))
def test_a_prompt_in_pieces_equals_the_prompt_at_once(models, sizes):
    stock, fast_model = models
    ids = random_ids(2, 40)
    wanted = stock(ids).logits
    got, cache = in_pieces(fast_model, ids, sizes)
    assert difference(got, wanted) < 1e-5
    _, whole = in_pieces(fast_model, ids, [40])
    for layer in range(3):
        for kind in ("conv_states", "recurrent_states"):
            ours, theirs = (getattr(c.layers[layer], kind)[0] for c in (cache, whole))
            assert difference(ours, theirs) < 1e-5


@torch.no_grad()
def test_a_cache_can_be_reset_and_can_record_its_past(models):
    stock, fast_model = models
    ids = random_ids(2, 40)
    wanted = stock(ids).logits
    _, used = in_pieces(fast_model, random_ids(2, 20, seed=7), [15, 5])
    used.reset()
    assert difference(in_pieces(fast_model, ids, [9, 31], used)[0], wanted) < 1e-5
    recording = DynamicCache(config=fast_model.config)
    for layer in recording.layers:
        layer.activate_past_recording()
    got, recording = in_pieces(fast_model, ids, [2, 6, 1, 31], recording)
    assert difference(got, wanted) < 1e-5
    assert recording.layers[0].conv_states[0].shape[-1] == 40  # all of it is there to go back to


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
@pytest.mark.parametrize("use_bias", [False, True])
def test_attention_masks_mean_what_they_mean_in_stock(side, use_bias):
    stock = random_model(use_bias=use_bias)
    ids, mask = padded_batch(side)
    wanted = stock(ids, attention_mask=mask).logits
    assert difference(stock(ids).logits, wanted) > 1e-2
    fast_model = use_fast_scan(stock)
    assert difference(fast_model(ids, attention_mask=mask).logits, wanted) < 1e-5
    assert difference(fast_model(ids, attention_mask=mask.bool()).logits, wanted) < 1e-5
    assert difference(in_pieces(fast_model, ids, [2, 11, 1, 6], mask=mask)[0], wanted) < 1e-5


def test_left_padding_leaves_a_prompt_as_it_is(models):
    ids, mask = padded_batch("left")
    with torch.no_grad():
        batch = models[1](ids, attention_mask=mask).logits
        alone = models[1](ids[1:2, 7:]).logits
    assert difference(batch[1:2, 7:], alone) < 1e-5


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_equals_stock(models, how):
    ids, mask = padded_batch("left")
    results = [m.generate(ids, attention_mask=mask, max_new_tokens=12, **how) for m in models]
    assert results[0].shape[1] > 22
    assert torch.equal(*results)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_stock(training):
    stock = random_model().train(training)
    fast_model = use_fast_scan(copy.deepcopy(stock))
    ids = random_ids(2, 9)
    for model in (stock, fast_model):
        model(ids, labels=ids).loss.backward()
    wanted = dict(stock.named_parameters())
    for name, parameter in fast_model.named_parameters():
        assert parameter.grad is not None, name
        assert difference(parameter.grad, wanted[name].grad) < 1e-4, name


@pytest.mark.parametrize("state_size", [1, 5])  # of size 1, a transposed state is the cache's own memory
def test_gradients_flow_through_pieces(state_size):
    model, ids = use_fast_scan(random_model(state_size=state_size)), random_ids(1, 9)
    wanted = random_model(state_size=state_size)
    wanted(ids).logits.square().sum().backward()
    in_pieces(model, ids, [4, 1, 4])[0].square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert difference(parameter.grad, other.grad) < 1e-4, name


@torch.no_grad()
def test_a_copy_is_fast_and_a_model_of_its_own():
    model = use_fast_scan(random_model())
    ids = random_ids(1, 20)
    before = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, before)
    for block in twin.backbone.layers:
        assert block.mixer.forward.args[0] is block.mixer
        block.mixer.D.zero_()
    assert difference(twin(ids).logits, before) > 1e-3
    assert torch.equal(model(ids).logits, before)
    use_stock_scan(twin)
    assert "forward" in vars(model.backbone.layers[0].mixer)


@torch.no_grad()
def test_saved_files_are_those_of_the_stock_model(tmp_path):
    stock = random_model()
    names = list(stock.state_dict())
    wanted = stock(random_ids(1, 20)).logits
    model = use_fast_scan(stock)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = MambaForCausalLM.from_pretrained(tmp_path)
    assert "forward" not in vars(loaded.backbone.layers[0].mixer)
    assert torch.equal(loaded(random_ids(1, 20)).logits, wanted)


def test_it_can_be_repeated_and_undone():
    model = random_model()
    before = [dict(vars(block.mixer)) for block in model.backbone.layers]
    assert use_fast_scan(use_fast_scan(model), "reference") is model
    assert fast._MARK in vars(model.backbone.layers[0].mixer)
    assert getattr(model.backbone.layers[0].mixer, fast._MARK).backend == "reference"
    assert use_stock_scan(use_stock_scan(model)) is model
    assert [dict(vars(block.mixer)) for block in model.backbone.layers] == before


@torch.no_grad()
def test_the_scan_named_is_the_scan_used(monkeypatch):
    model, used = random_model(), []
    real = mamba1.selective_scan
    monkeypatch.setattr(
        mamba1, "selective_scan", lambda i, s, backend, *a: used.append(backend) or real(i, s, backend, *a)
    )
    use_fast_scan(model, "reference")(random_ids(1, 4))
    assert used == ["reference"] * 3
    use_stock_scan(model)(random_ids(1, 4))
    assert len(used) == 3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_records_the_stock_forward():
    model = use_fast_scan(random_model())
    mixer = model.backbone.layers[0].mixer
    with torch.no_grad():
        traced = torch.jit.trace(mixer, torch.randn(1, 6, 24))
        other = torch.randn(1, 6, 24)
        assert difference(traced(other), mixer(other)) < 1e-5


def test_what_has_no_known_mixers_is_refused():
    with pytest.raises(CheckpointError, match="Linear has no config"):
        use_fast_scan(nn.Linear(2, 2))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=5))
    with pytest.raises(CheckpointError, match="'gpt2'"):
        use_fast_scan(gpt2)
    with pytest.raises(CheckpointError, match="MambaModel has no mixers"):
        use_fast_scan(random_model().backbone)
    with pytest.raises(UsageError, match="no scan backend 'fast'"):
        use_fast_scan(random_model(), "fast")
    hooked = random_model()
    hooked.backbone.layers[1].mixer.forward = lambda *a, **k: None
    with pytest.raises(CheckpointError, match="already has a replaced forward"):
        use_fast_scan(hooked)
    assert "forward" not in vars(hooked.backbone.layers[0].mixer), "a refusal must leave the model as it was"
