"""Pruning the projections and conv1d inside the pipeline: right inputs, right counts, Eq. 7 over real layers."""

import copy

import numpy as np
import pytest
import torch

from ssmc.compressor import configure
from ssmc.compressor.methods.weights.projections import prune_modules, sparsities_of_modules
from ssmc.compressor.methods.weights.sparsegpt import sparsegpt
from ssmc.compressor.options.sparsity import NM
from ssmc.runtime.models.families import STATE
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.pipeline.test_pipeline import ARCHITECTURE, dtypes, hidden_before, random_model
from tests.support.pruning import job_of, prune_layers, run_of

FFN = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")


@pytest.fixture
def model():
    model = random_model(layers=3, d_state=8)
    return use_fast_scan(model)


@pytest.fixture
def tokens():
    return torch.randint(61, (4, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def what_modules_read(model, tokens, layer):
    """Inputs of every module of a layer as transformers' own forward passes them, by hooks on stock modules."""
    stock = use_stock_scan(copy.deepcopy(model))
    mixer, read = stock.backbone.layers[layer].mixer, {}
    for name in ("in_proj", "x_proj", "out_proj"):  # the modules that transformers calls as modules
        getattr(mixer, name).register_forward_pre_hook(lambda _, args, name=name: read.__setitem__(name, args[0]))
    stock(tokens)
    read["conv1d"] = mixer.in_proj(read["in_proj"]).chunk(2, dim=-1)[0]
    read["dt_proj"] = mixer.x_proj(read["x_proj"])[..., : mixer.time_step_rank]
    return read


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_inputs_and_output_are_those_of_transformers(model, tokens, layer):
    block = model.backbone.layers[layer]
    hidden = hidden_before(use_stock_scan(copy.deepcopy(model)), tokens, layer)
    read, output = ARCHITECTURE.module_inputs(block, hidden)
    expected = what_modules_read(model, tokens, layer)
    for name in FFN:
        torch.testing.assert_close(read[name], expected[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output, block(hidden), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("score", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "1:2"])
def test_every_module_has_the_zeros_it_was_asked_for(model, tokens, score, pattern):
    config = configure(model="test", pattern=pattern, scope="ffn", ffn_score=score, alpha=0)
    results = prune_layers(model, ARCHITECTURE, tokens, config, dtypes(model))
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert [m.name for m in result.weights.modules] == list(FFN)
        for name, weight in ARCHITECTURE.module_weights(block.mixer).items():
            if pattern == "1:2":
                if weight.shape[1] % 2:  # dt_proj reads 3 numbers: no whole groups
                    assert (weight != 0).all(), name
                    continue
                assert ((weight.reshape(len(weight), -1, 2) == 0).sum(2) == 1).all(), name
            elif score == "wanda":
                assert ((weight == 0).sum(1) == round(weight.shape[1] / 2)).all(), name
            else:
                assert int((weight == 0).sum()) == round(weight.numel() / 2), name


def test_a_module_is_pruned_with_the_hessian_of_what_it_reads(model, tokens):
    """The first layer's in_proj, recomputed by hand from transformers' own activations."""
    x = what_modules_read(model, tokens, 0)["in_proj"].flatten(0, 1)
    weight = model.backbone.layers[0].mixer.in_proj.weight.detach().clone()
    expected = sparsegpt(weight, (x.double().t() @ x.double()), 0.5)
    config = configure(model="test", pattern="unstructured", scope="in_proj", alpha=0)
    result = prune_layers(model, ARCHITECTURE, tokens, config, dtypes(model))[0].weights.modules[0]
    torch.testing.assert_close(model.backbone.layers[0].mixer.in_proj.weight, expected.weight, rtol=1e-3, atol=1e-4)
    pruned = model.backbone.layers[0].mixer.in_proj.weight
    measured = ((x @ (weight - pruned).t()) ** 2).sum() / ((x @ weight.t()) ** 2).sum()
    assert result.error == pytest.approx(measured.item(), rel=1e-3)


def test_sparsegpt_hurts_the_output_less_than_wanda_and_magnitude(model, tokens):
    dense = model(tokens).logits
    distance = {}
    for score in ("sparsegpt", "wanda", "magnitude"):
        pruned = copy.deepcopy(model)
        config = configure(model="test", pattern="unstructured", scope="ffn", ffn_score=score, sparsity=0.3)
        prune_layers(pruned, ARCHITECTURE, tokens, config, dtypes(model))
        distance[score] = (pruned(tokens).logits - dense).square().mean().item()
    assert distance["sparsegpt"] < min(distance["wanda"], distance["magnitude"])


@torch.no_grad()
def test_eq_7_ranks_in_proj_and_out_proj_by_trace_over_size_on_the_dense_model(model, tokens):
    config = configure(model="test", pattern="unstructured", scope="ffn", sparsity=0.5, alpha=0.04)
    embedded = model.backbone.embeddings(tokens)
    targets = sparsities_of_modules(run_of(model, ARCHITECTURE, tokens, config, dtypes(model)).survey(embedded))
    for name in ("in_proj", "out_proj"):
        sensitivity = []
        for layer in range(3):
            x = what_modules_read(model, tokens, layer)[name].double().flatten(0, 1)
            weight = ARCHITECTURE.module_weights(model.backbone.layers[layer].mixer)[name]
            sensitivity.append(float((x**2).sum()) / weight.numel())
        expected = [None] * 3
        for rank, layer in enumerate(np.argsort(sensitivity)):
            expected[layer] = 0.54 - 0.04 * rank  # 0.54, 0.50, 0.46: the more sensitive, the less sparse
        assert [t[name] for t in targets] == pytest.approx(expected)
    assert all(t[name] == 0.5 for t in targets for name in ("conv1d", "x_proj", "dt_proj"))
    assert torch.equal(embedded, model.backbone.embeddings(tokens))  # the samples are still the embeddings


def test_states_and_modules_together_keep_the_pruned_states_silent(model, tokens):
    config = configure(model="test", pattern="column", scope="all", sparsity=0.5)
    results = prune_layers(model, ARCHITECTURE, tokens, config, dtypes(model))
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert len(result.states_kept) == 4
        assert ARCHITECTURE.is_masked(block.mixer, STATE, result.states_kept)


def test_unstructured_a_log_in_a_whole_run(model, tokens):
    config = configure(model="test", pattern="unstructured", scope="all", sparsity=0.25)
    results = prune_layers(model, ARCHITECTURE, tokens, config, dtypes(model))
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert int((block.mixer.A_log == 0).sum()) == round(0.25 * block.mixer.A_log.numel())
        assert result.entries.pruned == pytest.approx(0.25, abs=1e-2)
        assert result.states_kept == tuple(range(8))


def test_wanda_reads_only_the_diagonal_and_the_weights_stay(model, tokens):
    before = copy.deepcopy(model)
    block = model.backbone.layers[0]
    config = configure(model="test", pattern="2:4", ffn_score="wanda")
    prune_modules(job_of(ARCHITECTURE, block, hidden_before(model, tokens, 0), config=config), {"out_proj": NM(2, 4)})
    weight, old = block.mixer.out_proj.weight, before.backbone.layers[0].mixer.out_proj.weight
    assert torch.equal(weight[weight != 0], old[weight != 0])
