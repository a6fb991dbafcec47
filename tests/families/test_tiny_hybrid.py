"""`tiny-hybrid`, the embedded hybrid: its layers, its place in stock transformers, what it has learnt."""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronHForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import EMBEDDED, load_checkpoint
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import generate
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import heldout_path

WINDOW = 256


@pytest.fixture(scope="module")
def heldout():
    """Held-out text in windows, (8, 256)."""
    tokens = tokenize(read_texts(heldout_path()), load_tokenizer(load_checkpoint("tiny-hybrid")))
    return tokens[: 8 * WINDOW].view(8, WINDOW)


@pytest.fixture(scope="module")
def stock():
    """The folder as stock transformers loads it, in float32."""
    return NemotronHForCausalLM.from_pretrained(EMBEDDED["tiny-hybrid"], dtype=torch.float32).eval()


def loss(model, windows):
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def test_it_has_every_kind_of_layer_and_something_to_remove_on_every_axis(stock):
    config = stock.config
    assert {"linear_attention", "full_attention", "mlp"} == set(config.layers_block_type)
    assert config.n_groups > 1
    assert config.mamba_num_heads > config.n_groups
    assert config.num_attention_heads > config.num_key_value_heads > 1
    files = [f for f in EMBEDDED["tiny-hybrid"].iterdir() if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 8e6


@torch.no_grad()
def test_ssmc_reads_it_as_stock_transformers_does(stock, heldout):
    ours = use_fast_scan(load_checkpoint("tiny-hybrid", dtype=torch.float32).model)
    torch.testing.assert_close(ours(heldout[:2]).logits, stock(heldout[:2]).logits, atol=1e-4, rtol=0)


def test_it_has_learnt_the_stories(stock, heldout):
    assert loss(stock, heldout) < 2.4
    own = perplexity(stock, heldout.flatten(), WINDOW)
    assert own.nll_per_token == pytest.approx(loss(stock, heldout), abs=1e-5)
    text = "".join(generate("tiny-hybrid", "Once upon a time", max_new_tokens=12))
    assert len(text.split()) > 3


def test_half_of_its_states_are_cut_and_it_loses_little(tmp_path, stock, heldout):
    compress("tiny-hybrid", out=tmp_path / "out", nsamples=1, seqlen=WINDOW)
    export(tmp_path / "out", format="safetensors")
    smaller = NemotronHForCausalLM.from_pretrained(tmp_path / "out" / "safetensors", dtype=torch.float32).eval()
    assert smaller.config.ssm_state_size == stock.config.ssm_state_size // 2
    assert 0 < loss(smaller, heldout) - loss(stock, heldout) < 0.05
