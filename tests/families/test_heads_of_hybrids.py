"""Heads of the mixers of hybrids, and channels of heads: masked, narrow and cut models against stock ones."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress, configure
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import CHANNEL, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.families import FAMILIES, NOISE, TINY_VOCAB, difference, random_ids, short, with_tokenizer
from tests.support.models import random_mamba2, save_transformers
from tests.support.pruning import run_of

HALVES = {"mamba_n_groups": 1}  # 6 heads of 8 channels at d_model 24: half of the heads, or of each, is expand 1
CASES = [
    ("nemotron_h", {}, (2, 5)),
    ("falcon_h1", {"mamba_n_groups": 2}, (2, 3)),
    ("falcon_h1", {"mamba_n_groups": 2, "mamba_rms_norm": True}, (2, 8)),
    ("bamba", HALVES, (3, 8)),
    ("granitemoehybrid", HALVES, (6, 4)),
    ("zamba2", {"mamba_ngroups": 1}, (3, 8)),
]


def chosen(sizes, heads, head_dim, layer):
    """As many heads of each group, others in each layer; of each the last channels or the first."""
    per_group, each = sizes.heads // sizes.groups, heads // sizes.groups
    some = [g * per_group + (i + layer) % per_group for g in range(sizes.groups) for i in range(each)]
    first = [0 if head % 2 else sizes.head_dim - head_dim for head in range(sizes.heads)]
    return [h * sizes.head_dim + first[h] + c for h in sorted(some) for c in range(head_dim)]


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes", "left"), CASES, ids=str)
def test_masked_narrow_and_cut_mixers_compute_the_same(family, changes, left):
    architecture, model = architecture_for(family), FAMILIES[family](**changes)
    sizes, tokens = architecture.dimensions(model.config), random_ids(1, 20)
    masked = use_fast_scan(copy.deepcopy(model))
    kept = [chosen(sizes, *left, layer) for layer in range(sizes.n_layer)]
    architecture.record_arguments(masked, tokens)
    for layer, block in enumerate(architecture.blocks(masked)):
        if (mixer := architecture.mixer(block)) is None:
            continue
        narrow = architecture.narrow(block, CHANNEL, kept[layer])
        assert not architecture.is_masked(mixer, CHANNEL, kept[layer])
        architecture.widen(block, narrow, CHANNEL, kept[layer])  # masks it, too
        assert architecture.is_masked(mixer, CHANNEL, kept[layer])
        assert not architecture.is_masked(mixer, CHANNEL, kept[layer][1:])
    tensors, config, _ = architecture.cut(masked.state_dict(), masked.config, CHANNEL, kept)
    found = architecture.dimensions(config)
    assert (found.heads, found.head_dim, found.d_inner) == (*left, left[0] * left[1])
    smaller = type(model)(config).eval()
    smaller.load_state_dict(tensors)
    architecture.with_epsilons_of(masked, config)
    wanted = masked(tokens).logits
    assert difference(model(tokens).logits, wanted) > 0.1
    assert difference(smaller(tokens).logits, wanted) < NOISE


def test_heads_and_their_channels_go_together_with_all_else(tmp_path):
    """The artefact is cut, read by stock transformers, and generates as the masked model does."""
    directory = tmp_path / "dense" / "m"
    folder = with_tokenizer(save_transformers(FAMILIES["falcon_h1"](vocab_size=TINY_VOCAB), directory))
    options = {"pattern": "head+head-dim+mlp+attention", "sparsity": {"head": 0.5, "head-dim": 0.25}}
    options["sparsity"] |= {"mlp": 0.25, "attention": 0.5}
    result = compress(folder, out=tmp_path / "out", **options, **short(folder))
    exported = export(result.directory)
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, exported.directory))
    assert (cut.config.mamba_n_heads, cut.config.mamba_d_head, cut.config.mamba_d_ssm) == (2, 6, 12)
    ids = random_ids(1, 20)
    with torch.no_grad():
        assert difference(cut(ids).logits, masked(ids).logits) < NOISE
    text = [m.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False) for m in (masked, cut)]
    assert torch.equal(*text)
    assert "2 of 4 heads stay in each mixer" in result.notes[0]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (FAMILIES["nemotron_h"], {"pattern": "head", "sparsity": 0.1}, "removes none; the least that can go is 2"),
        (FAMILIES["bamba"], {"pattern": "head"}, "No heads can be removed.*multiple of d_model 24"),
        (random_mamba2, {"pattern": "head-dim", "sparsity": 0.1}, "takes no channels out of heads of"),
        (random_mamba2, {"pattern": "channel+head"}, "not both"),
        (FAMILIES["nemotron_h"], {"pattern": "head", "refine": 3}, "refine does not go with what else"),
    ],
)
def test_what_no_loader_takes_is_refused(model, options, words):
    made = model()
    architecture = architecture_for(made.config.model_type)
    with pytest.raises(UsageError, match=words):
        run_of(made, architecture, None, configure(model="m", **options), {})
