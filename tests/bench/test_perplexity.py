"""Perplexity against a naive loop: stock transformers, one window at a time, whole logits, F.cross_entropy."""

import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.measure import losses as module
from ssmc.runtime.measure.perplexity import MIN_TOKENS, excess_loss, perplexity


def small_model(seed: int, state_size: int = 4) -> MambaForCausalLM:
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=67,
        hidden_size=16,
        state_size=state_size,
        num_hidden_layers=2,
        intermediate_size=32,
        time_step_rank=2,
    )
    return MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> MambaForCausalLM:
    return small_model(0)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 67, (150,), generator=torch.Generator().manual_seed(1))


def naive_losses(model, tokens, window) -> list[float]:
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - window + 1, window):
            piece = tokens[start : start + window]
            logits = model(piece[None]).logits[0]
            losses.append(F.cross_entropy(logits[:-1].double(), piece[1:]).item())
    return losses


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_naive_loop(model, tokens, batch):
    expected = naive_losses(model, tokens, 40)
    result = perplexity(model, tokens, 40, batch=batch)
    assert result.windows == len(expected) == 3  # 150 = 3 * 40 + 30 left out
    assert result.tokens == 3 * 39
    assert result.window == 40
    assert result.window_nll == pytest.approx(expected, abs=1e-5)
    assert result.nll_per_token == pytest.approx(statistics.mean(expected), abs=1e-5)
    assert result.ppl == pytest.approx(math.exp(statistics.mean(expected)), rel=1e-5)
    assert result.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(3), rel=1e-3)


def test_chunked_logits_change_nothing(model, tokens, monkeypatch):
    whole = perplexity(model, tokens, 50)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 67 * 7)  # seven tokens at a time; 49 predictions, no remainder
    assert perplexity(model, tokens, 50).window_nll == pytest.approx(whole.window_nll, abs=1e-6)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 67 * 11)  # a remainder of five
    assert perplexity(model, tokens, 50).window_nll == pytest.approx(whole.window_nll, abs=1e-6)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)  # less than one token: one at a time
    assert perplexity(model, tokens, 50, batch=2).window_nll == pytest.approx(whole.window_nll, abs=1e-6)


def test_windows_are_independent(model, tokens):
    first = perplexity(model, tokens[:50], 50)
    both = perplexity(model, tokens[:100], 50)
    assert both.window_nll[0] == pytest.approx(first.nll_per_token, abs=1e-6)


@pytest.mark.parametrize(("length", "windows"), [(99, 1), (100, 2), (149, 2), (150, 3)])
def test_only_whole_windows_count(model, tokens, length, windows):
    assert perplexity(model, tokens[:length], 50).windows == windows


def test_a_text_shorter_than_one_window_is_one_window(model, tokens):
    result = perplexity(model, tokens[:60], 2048)
    assert (result.windows, result.window, result.tokens, result.stderr) == (1, 60, 59, None)
    assert result.nll_per_token == pytest.approx(naive_losses(model, tokens[:60], 60)[0], abs=1e-5)


def test_a_tiny_window_may_be_asked_for(model, tokens):
    result = perplexity(model, tokens[:6], 2)
    assert result.tokens == result.windows == 3
    assert result.window_nll == pytest.approx(naive_losses(model, tokens[:6], 2), abs=1e-5)


def test_too_few_tokens(model, tokens):
    assert perplexity(model, tokens[:MIN_TOKENS], 2048).tokens == MIN_TOKENS - 1
    with pytest.raises(CalibrationError, match=f"has {MIN_TOKENS - 1} tokens"):
        perplexity(model, tokens[: MIN_TOKENS - 1], 2048)
    with pytest.raises(CalibrationError, match="has 0 tokens"):
        perplexity(model, tokens[:0], 2048)


@pytest.mark.parametrize(("window", "batch"), [(1, 1), (0, 1), (-5, 1), (50, 0)])
def test_senseless_windows(model, tokens, window, batch):
    with pytest.raises(UsageError):
        perplexity(model, tokens, window, batch=batch)


def test_foreign_tokens_are_named(model, tokens):
    with pytest.raises(CalibrationError, match=r"token id 67.*ends at 66"):
        perplexity(model, torch.cat([tokens, torch.tensor([67])]), 50)


def test_a_broken_model_is_told(tokens):
    broken = small_model(3)
    broken.backbone.layers[0].mixer.out_proj.weight.data[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not a finite number"):
        perplexity(broken, tokens, 50)


def test_excess_loss_is_paired(model, tokens):
    other = small_model(5, state_size=3)
    ours, theirs = perplexity(other, tokens, 25), perplexity(model, tokens, 25)
    differences = [a - b for a, b in zip(naive_losses(other, tokens, 25), naive_losses(model, tokens, 25), strict=True)]
    excess = excess_loss(ours, theirs)
    assert excess.nats == pytest.approx(statistics.mean(differences), abs=1e-5)
    assert excess.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(6), rel=1e-2)
    assert excess_loss(ours, ours).nats == 0
    with pytest.raises(ValueError, match="different windows"):
        excess_loss(ours, perplexity(model, tokens, 30))


def test_progress_counts_windows(model, tokens):
    calls = []
    perplexity(model, tokens, 40, batch=2, progress=lambda *call: calls.append(call))
    assert calls == [("perplexity", 2, 3), ("perplexity", 3, 3)]
