"""What a pruned entry of A_log stands for: A = -1, or a state without memory, in stock transformers as in our scan."""

import copy

import pytest
import torch

from ssmc.compressor import compress
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.models import random_tokens

QUICK = {"pattern": "unstructured", "score": "magnitude", "nsamples": 2, "seqlen": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both forms of the same masks."""
    root = tmp_path_factory.mktemp("entries")
    for form in ("zero", "forget"):
        compress("tiny", out=root / form, pruned_entry=form, **QUICK)
    return {form: load_checkpoint(root / form, dtype=torch.float32) for form in ("zero", "forget")}


def logits_without_memory(zero):
    """Stock transformers, with the decay of pruned entries set to 0 where the formula makes it: an oracle by hooks."""
    model = copy.deepcopy(zero.model)
    original = torch.exp

    def exp(x):
        # (B, D, L, N) of dt A: pruned entries have A = -1 exactly
        found = original(x)
        if x.dim() == 4:
            found = found.masked_fill(pruned[None, :, None, :], 0.0)
        return found

    tokens, hidden = random_tokens((1, 24)), None
    with torch.no_grad():
        hidden = model.backbone.embeddings(tokens)
        for block in model.backbone.layers:
            pruned = block.mixer.A_log == 0
            torch.exp = exp
            try:
                hidden = block(hidden)
            finally:
                torch.exp = original
        return model.lm_head(model.backbone.norm_f(hidden))


def test_both_forms_have_the_same_masks(made):
    for layer in range(6):
        name = f"backbone.layers.{layer}.mixer.A_log"
        zero, forget = (made[form].tensors()[name] for form in ("zero", "forget"))
        assert torch.equal(zero == 0, forget == 12)
        assert torch.equal(zero[zero != 0], forget[zero != 0])


def test_a_forgetting_entry_has_no_memory_in_stock_transformers_and_in_our_scan(made):
    tokens = random_tokens((1, 24))
    wanted = logits_without_memory(made["zero"])
    with torch.no_grad():
        stock = made["forget"].model(tokens).logits
        fast = use_fast_scan(copy.deepcopy(made["forget"].model))(tokens).logits
        decaying = made["zero"].model(tokens).logits
    assert torch.allclose(stock, wanted, atol=1e-4)
    assert torch.allclose(fast, wanted, atol=1e-4)
    assert not torch.allclose(decaying, wanted, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_it(made, dtype):
    name = "backbone.layers.0.mixer.A_log"
    forget = made["forget"].tensors()[name]
    assert torch.equal(forget.to(dtype).float() == 12, forget == 12)


def test_gradients_are_finite_and_pruned_entries_have_none(made):
    model = use_fast_scan(copy.deepcopy(made["forget"].model)).requires_grad_(True)
    model(random_tokens((2, 32)), labels=random_tokens((2, 32))).loss.backward()
    for block in model.backbone.layers:
        gradient = block.mixer.A_log.grad
        assert torch.isfinite(gradient).all()
        # a step of less than 1e-4 leaves a trace of memory: next to nothing
        assert gradient[block.mixer.A_log == 12].abs().max() < 1e-3 * gradient.abs().max()
