"""Channels of Jamba, whose configuration has d_inner as a whole multiple of d_model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import CHANNEL, architecture_for
from tests.support.families import (
    FAMILIES,
    TINY_VOCAB,
    assert_cut_equals_masked,
    difference,
    random_ids,
    short,
    with_tokenizer,
)
from tests.support.models import save_transformers


@torch.no_grad()
def test_silent_channels_are_cut_out_and_nothing_changes():
    """The oracle is the stock model: with channels masked, and made with a smaller expand."""
    architecture, model = architecture_for("jamba"), FAMILIES["jamba"]()
    masked, width = copy.deepcopy(model), architecture.dimensions(model.config).d_inner
    kept = [list(range(layer % 2, width, 2)) for layer in range(model.config.num_hidden_layers)]
    for block, channels in zip(architecture.blocks(masked), kept, strict=True):
        if architecture.mixer(block) is not None:
            architecture.mask(architecture.mixer(block), CHANNEL, channels)
            assert architecture.is_masked(architecture.mixer(block), CHANNEL, channels)
    tensors, config, _ = architecture.cut(masked.state_dict(), model.config, CHANNEL, kept)
    assert (config.mamba_expand, architecture.dimensions(config).d_inner) == (1, width // 2)
    assert_cut_equals_masked(model, masked, tensors, config, moved=0.01)


@torch.no_grad()
def test_a_run_loads_and_generates_in_stock_transformers_and_others_are_refused(tmp_path):
    folder = with_tokenizer(save_transformers(FAMILIES["jamba"](vocab_size=TINY_VOCAB), tmp_path / "m"))
    for options, words in (
        ({"sparsity": 0.1}, r"multiple of d_model 24. What can be: 24 \(sparsity 0.5\)"),
        ({"sparsity": 0.5, "round_channels": 16}, "rounded to 16, cannot be had"),
        ({"widths": [30, 30, 30, 30]}, "The widest can be 24"),
    ):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", pattern="channel", **options, **short(folder))
    assert not (tmp_path / "out").exists()
    result = compress(folder, out=tmp_path / "out", pattern="column+channel", sparsity=0.5, **short(folder))
    masked, cut = (
        AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, export(result.directory).directory)
    )
    assert (cut.config.mamba_expand, cut.config.mamba_d_state) == (1, 4)
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5
    text = [m.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False) for m in (masked, cut)]
    assert torch.equal(*text)
