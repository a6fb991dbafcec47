"""Single entries of a Mamba-2: A_log head by head against loops, projections and conv1d on what they really read."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import Mamba2ForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.methods.weights.sparsegpt import sparsegpt
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.models import VOCAB, random_mamba2, save_transformers
from tests.support.naive import hidden_states
from tests.support.pruning import prune_layers

ARCHITECTURE = architecture_for("mamba2")
FFN = ("in_proj", "conv1d", "out_proj")  # B, C and dt come out of in_proj


@pytest.fixture
def tokens():
    return torch.randint(1, VOCAB - 1, (3, 40), generator=torch.Generator().manual_seed(1))


def pruned(model, tokens, **options):
    """The model pruned in place, and what became of its layers."""
    dtypes = dict.fromkeys(model.state_dict(), torch.float32)
    return prune_layers(use_fast_scan(model), ARCHITECTURE, tokens, configure(model="test", **options), dtypes)


@torch.no_grad()
def importance_of_heads(block, hidden, score) -> np.ndarray:
    """(H,), head by head from the definition, over hidden states of a naive loop."""
    mixer = block.mixer
    inputs = ARCHITECTURE.scan_inputs(mixer, *ARCHITECTURE.expand(mixer, block.norm(hidden)))
    found = []
    for part, A_log in zip(ARCHITECTURE.scan_groups(mixer, inputs), mixer.A_log.double().view(2, 6), strict=True):
        h = hidden_states(part)  # (B, L + 1, D, N)
        h = h.reshape(*h.shape[:2], 6, mixer.head_dim, -1)
        C, a = part.C.double().numpy(), A_log.numpy()
        if score == "energy":
            found.append(((h[:, 1:] * C[:, :, None, None]) ** 2).sum((0, 1, 3, 4)))
        elif score == "ghost":
            found.append(((h[:, 1:] ** 2).sum((0, 1, 3)) * (C**2).sum((0, 1))).sum(1))
        elif score == "sparsessm-l2":
            found.append(a**2 * (h[:, :-1] ** 2).sum((0, 1, 3, 4)))
        elif score == "sparsessm-vote":  # half of the heads of a group are named at each step but the first
            steps = a**2 * (h[:, 1:-1] ** 2).sum((0, 3, 4))  # (L - 1, H / G)
            named = np.zeros(6)
            for step in steps:
                named[np.argsort(step)[:3]] += 1
            found.append(-named)
        else:
            found.append(np.abs(a))
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("score", "pattern"),
    [(s, p) for s in ("ghost", "energy", "sparsessm-l2", "magnitude") for p in ("unstructured", "1:3")]
    + [("sparsessm-vote", "unstructured")],  # of 1:3 a step names two thirds, the loop above half
)
def test_a_log_of_the_least_important_heads_becomes_zero(tokens, score, pattern):
    model = random_mamba2()
    block = copy.deepcopy(model.backbone.layers[0])
    results = pruned(model, tokens, pattern=pattern, scope="ssm", score=score, sparsity=0.5)
    with torch.no_grad():
        importance = importance_of_heads(block, model.backbone.embeddings(tokens), score)
    gone = np.argsort(importance, kind="stable")[:6]
    if pattern == "1:3":  # of three neighbouring heads the dearest stays
        stay = [first + int(importance[first : first + 3].argmax()) for first in range(0, 12, 3)]
        gone = sorted(set(range(12)) - set(stay))
    A_log = model.backbone.layers[0].mixer.A_log
    if score == "sparsessm-vote":  # many tie
        assert importance[A_log == 0].max() <= importance[A_log != 0].min()
    else:
        assert (A_log == 0).nonzero().flatten().tolist() == sorted(gone)
    assert torch.equal(A_log[A_log != 0], block.mixer.A_log[A_log != 0])
    assert results[0].entries.pruned == (2 / 3 if pattern == "1:3" else 0.5)
    assert results[0].states_kept == tuple(range(14))


@torch.no_grad()
@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_every_module_has_the_zeros_it_was_asked_for(tokens, score, pattern):
    model = random_mamba2()
    results = pruned(model, tokens, pattern=pattern, scope="ffn", ffn_score=score, alpha=0)
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert [m.name for m in result.weights.modules] == list(FFN)
        for name, weight in ARCHITECTURE.module_weights(block.mixer).items():
            if pattern == "2:4":
                assert ((weight.reshape(len(weight), -1, 4) == 0).sum(2) == 2).all(), name
            elif score == "wanda":
                assert ((weight == 0).sum(1) == weight.shape[1] // 2).all(), name
            else:
                assert int((weight == 0).sum()) == round(weight.numel() / 2), name


@torch.no_grad()
def test_modules_are_pruned_with_the_hessians_of_what_stock_transformers_passes_them(tokens):
    stock, model, read = random_mamba2(), random_mamba2(), {}
    mixer = stock.backbone.layers[0].mixer
    for name in ("in_proj", "out_proj"):  # those that transformers calls as modules
        getattr(mixer, name).register_forward_pre_hook(lambda _, args, name=name: read.__setitem__(name, args[0]))
    stock(tokens)
    for name in ("in_proj", "out_proj"):
        x, weight = read[name].flatten(0, 1), getattr(mixer, name).weight
        expected = sparsegpt(weight, x.double().t() @ x.double(), 0.5).weight
        other = copy.deepcopy(model)
        result = pruned(other, tokens, pattern="unstructured", scope=name, alpha=0)[0].weights.modules[0]
        now = getattr(other.backbone.layers[0].mixer, name).weight
        torch.testing.assert_close(now, expected, rtol=1e-3, atol=1e-4)
        measured = ((x @ (weight - now).t()) ** 2).sum() / ((x @ weight.t()) ** 2).sum()
        assert result.error == pytest.approx(measured.item(), rel=1e-3)
    result = pruned(model, tokens, pattern="unstructured", scope="conv1d", alpha=0)[0].weights.modules[0]
    now, x = copy.deepcopy(mixer.conv1d), mixer.in_proj(read["in_proj"])[..., 48:-12].transpose(1, 2)  # x, B, C
    now.weight.copy_(model.backbone.layers[0].mixer.conv1d.weight)
    bias = now.bias[:, None]
    wanted, got = ((conv(x)[..., : tokens.shape[1]] - bias) for conv in (mixer.conv1d, now))
    assert result.error == pytest.approx(float((got - wanted).square().sum() / wanted.square().sum()), rel=1e-3)


@torch.no_grad()
def test_states_and_modules_together_keep_the_pruned_states_silent(tokens):
    model = random_mamba2()
    results = pruned(model, tokens, pattern="column", scope="all", sparsity=0.5)
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert [m.name for m in result.weights.modules] == list(FFN)
        assert ARCHITECTURE.is_masked(block.mixer, STATE, result.states_kept)
    tensors, config, _ = ARCHITECTURE.cut(model.state_dict(), model.config, STATE, [r.states_kept for r in results])
    shrunk = Mamba2ForCausalLM(config)
    shrunk.load_state_dict(tensors)
    wanted = model(tokens).logits
    assert (shrunk.eval()(tokens).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_2_to_4_goes_through_to_an_export_that_stock_transformers_runs(tmp_path, tokens):
    source = save_transformers(random_mamba2(), tmp_path / "model")
    compress(source, out=tmp_path / "out", pattern="2:4", ffn_score="magnitude")
    export(tmp_path / "out", format="sparse24", out=tmp_path / "sparse")
    about = json.loads((tmp_path / "sparse" / "ssmc.json").read_text())["sparse24"]
    assert {module["name"].rpartition(".")[2] for module in about["modules"]} == set(FFN)
    masked, stock = load_checkpoint(tmp_path / "out").model, Mamba2ForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight.float(), masked.state_dict()[name].to(weight.dtype).float()), name


@torch.no_grad()
def test_the_ssm_of_whole_layers_goes(tmp_path, tokens):
    source = save_transformers(random_mamba2(), tmp_path / "model")
    result = compress(source, out=tmp_path / "out", pattern="ssm-module", score="random", sparsity=0.34)
    model = Mamba2ForCausalLM.from_pretrained(tmp_path / "out").eval()
    (gone,) = {removal.layer for removal in result.removals}
    block, hidden = model.backbone.layers[gone], torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    shifted = hidden.clone()
    shifted[:, 0] += 1.0  # without states nothing older than conv1d's window is felt
    assert torch.equal(block(hidden)[:, 4:], block(shifted)[:, 4:])
    dense = random_mamba2().backbone.layers[gone]
    assert not torch.equal(dense(hidden)[:, 4:], dense(shifted)[:, 4:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pattern": "unstructured", "score": "sparsegpt"}, "one A_log, so nothing is left"),
        ({"pattern": "unstructured", "scope": "in_proj,x_proj"}, "x_proj does not exist in mamba2"),
        ({"pattern": "2:4", "scope": "ssm"}, "needs whole groups of 4 entries, but the axis has 6"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, options, named):
    source = save_transformers(random_mamba2(), tmp_path / "model")
    with pytest.raises(UsageError, match=named):
        compress(source, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
