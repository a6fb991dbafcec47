"""Refinement: what moves, what stays, that it never gets worse, and that it does what a plain loop of Adam does."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml

from ssmc import compress
from ssmc.compressor import configure, pipeline
from ssmc.compressor.methods.refine.steps import refine
from ssmc.compressor.options.config import CompressConfig
from ssmc.runtime.errors import CalibrationError, UsageError
from ssmc.runtime.manifest import read_manifest
from ssmc.runtime.models.families import CHANNEL, STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.pipeline.test_pipeline import dtypes
from tests.support.models import LAYERS, logits, random_mamba2, random_model, random_tokens
from tests.support.pruning import job_of, prune_layers, run_of

ARCHITECTURE = architecture_for("mamba")
SAMPLES, LENGTH, HELD_OUT = 17, 48, 2  # one in eight is held out, the last

RATE = 0.003


@pytest.fixture(autouse=True)
def gentle(monkeypatch):
    """The random models here have a dozen channels: an entry is a larger part of a layer than in a real model."""
    monkeypatch.setattr("ssmc.compressor.methods.refine.steps.RATE", RATE)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(61, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def prune(model, tokens, **options):
    pruned = use_fast_scan(copy.deepcopy(model))
    config = configure(model="test", **options)
    return pruned, prune_layers(pruned, ARCHITECTURE, tokens, config, dtypes(model))


@torch.no_grad()
def stream(model, tokens, blocks):
    """The residual stream behind the first blocks, by transformers' own forward."""
    hidden = model.backbone.embeddings(tokens)
    for block in model.backbone.layers[:blocks]:
        hidden = block(hidden)
    return hidden


def relative_error(dense, pruned, tokens, layer):
    """Of what a layer adds to the residual stream."""
    pruned = use_stock_scan(copy.deepcopy(pruned))
    before, got, wanted = (
        stream(*a) for a in ((pruned, tokens, layer), (pruned, tokens, layer + 1), (dense, tokens, layer + 1))
    )
    return float((got - wanted).square().sum() / (wanted - before).square().sum())


@pytest.fixture
def spoiled(model, tokens):
    """A layer with half of its out_proj, so that any step helps; what it reads, and what it put out before."""
    block = copy.deepcopy(model.backbone.layers[0])
    with torch.no_grad():
        block.mixer.out_proj.weight /= 2
    return block, stream(model, tokens, 0), stream(model, tokens, 1)


@pytest.mark.parametrize("options", [{}, {"pattern": "channel", "round_channels": 4}])
def test_the_errors_are_those_of_the_layer_on_samples_no_step_saw(model, tokens, options):
    refined, results = prune(model, tokens, refine=20, **options)
    better = [layer for layer, result in enumerate(results) if result.refined.best_step]
    assert better  # layers behind the first can be beyond help: the text is random
    for layer in better:
        result = results[layer].refined
        assert result.error < result.error_before
        assert result.best_step <= result.steps <= 20
        assert result.error == pytest.approx(relative_error(model, refined, tokens[-HELD_OUT:], layer), rel=1e-3)


def test_a_layer_that_no_step_makes_better_keeps_the_repair_on_all_samples(model, tokens, monkeypatch):
    monkeypatch.setattr("ssmc.compressor.methods.refine.steps.RATE", 1e6)
    options = {"pattern": "channel", "round_channels": 4}
    plain, _ = prune(model, tokens, **options)
    refined, results = prune(model, tokens, refine=12, **options)
    assert [r.refined.best_step for r in results] == [0] * LAYERS
    assert all(torch.equal(tensor, refined.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_held_out_samples_are_kept_from_the_steps(spoiled):
    block, hidden, wanted = spoiled
    changed = wanted.clone()
    changed[-HELD_OUT:] += 0.1 * torch.randn(changed[-HELD_OUT:].shape, generator=torch.Generator().manual_seed(2))
    first, second = copy.deepcopy(block), copy.deepcopy(block)
    results = [refine(job_of(ARCHITECTURE, b, hidden, stream=t), 1) for b, t in ((first, wanted), (second, changed))]
    assert results[0].error_before != results[1].error_before
    assert [r.best_step for r in results] == [1, 1]
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_one_step_is_that_of_adam_on_the_formula(spoiled):
    """The gradients' oracle: the whole layer in float64 from the formula; Adam's first step is lr g / (|g| + eps)."""
    block, hidden, wanted = spoiled
    moved = copy.deepcopy(block)
    assert refine(job_of(ARCHITECTURE, moved, hidden, stream=wanted), 1).best_step == 1
    block = block.double()
    mixer, rest = block.mixer, slice(0, SAMPLES - HELD_OUT)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    x, z = mixer.in_proj(block.norm(hidden[rest].double())).chunk(2, -1)
    target = (wanted - hidden)[rest].double()
    ((scanned(mixer, x, z) - target).square().sum() / target.square().sum()).backward()
    after = dict(moved.mixer.named_parameters())
    for name, p in mixer.named_parameters():
        step = RATE * before[name].square().mean().sqrt() * p.grad / (p.grad.abs() + 1e-8)
        sure = p.grad.abs() > 1e-5  # elsewhere rounding in float32 decides
        assert sure.float().mean() > 0.5, name
        moved_by = (before[name] - after[name]) / step.abs().max()
        torch.testing.assert_close(moved_by[sure], (step / step.abs().max())[sure], rtol=0, atol=2e-2)


def scanned(mixer, x, z):
    """What a mixer adds, differentiable, one token after the other."""
    width = mixer.conv1d.weight.shape[-1]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    u = F.silu(F.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=x.shape[2])).transpose(1, 2)
    n, r = mixer.ssm_state_size, mixer.time_step_rank
    low_rank, B, C = mixer.x_proj(u).split([r, n, n], dim=-1)
    dt = F.softplus(mixer.dt_proj(low_rank))
    A, h, rows = -torch.exp(mixer.A_log), 0, []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        rows.append((h * C[:, t, None, :]).sum(-1) + mixer.D * u[:, t])
    return mixer.out_proj(torch.stack(rows, 1) * F.silu(z))


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "column"},
        {"pattern": "column+channel", "round_channels": 4},
        {"pattern": "unstructured", "scope": "all"},
        {"pattern": "2:4", "scope": "in_proj,out_proj"},
    ],
)
def test_what_was_pruned_stays_zero_and_the_rest_moves(model, tokens, options):
    plain, _ = prune(model, tokens, **options)
    refined, results = prune(model, tokens, refine=6, **options)
    layer = results[0]
    assert layer.refined.best_step > 0
    before, after = (m.backbone.layers[0].mixer for m in (plain, refined))  # of the first layer all else is the same
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if name != "A_log" or options["pattern"] == "unstructured":
            assert not new[old == 0].any(), name
        assert not torch.equal(old, new), name
    if layer.channels_kept is not None:
        assert ARCHITECTURE.is_masked(after, CHANNEL, layer.channels_kept)
    assert ARCHITECTURE.is_masked(after, STATE, layer.states_kept)


def test_the_states_of_a_mamba2_stay_silent_too(tokens):
    model, architecture = random_mamba2(), architecture_for("mamba2")
    pruned = use_fast_scan(copy.deepcopy(model))
    config = configure(model="test", refine=4)
    results = prune_layers(pruned, architecture, tokens, config, dtypes(model))
    assert any(r.refined.best_step > 0 for r in results)
    for block, result in zip(pruned.backbone.layers, results, strict=True):
        assert architecture.is_masked(block.mixer, STATE, result.states_kept)


def test_a_hostile_rate_leaves_the_layer_as_it_was(model, tokens, monkeypatch):
    plain, _ = prune(model, tokens, sparsity=0.5)
    monkeypatch.setattr("ssmc.compressor.methods.refine.steps.RATE", 1e6)
    refined, results = prune(model, tokens, sparsity=0.5, refine=12)
    assert [r.refined.best_step for r in results] == [0] * LAYERS
    assert all(r.refined.error == r.refined.error_before for r in results)
    assert results[0].refined.steps < 12  # and it did not go on for long
    for (name, old), (_, new) in zip(plain.state_dict().items(), refined.state_dict().items(), strict=True):
        assert torch.equal(old, new), name


def test_nothing_of_the_training_is_left_behind(model, tokens):
    refined, _ = prune(model, tokens, refine=2)
    assert all(p.requires_grad and p.grad is None for p in refined.parameters())


def test_a_layer_that_should_add_nothing_is_left_alone(spoiled):
    block, hidden, _ = spoiled
    result = refine(job_of(ARCHITECTURE, block, hidden, stream=hidden.clone()), 3)
    assert result.best_step == 0
    assert result.error == 0


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return path


def test_a_run_repeats_byte_for_byte_from_its_recipe(calibration, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"calib": calibration, "nsamples": 4, "seqlen": 32}
    result = compress("tiny", out=first, pattern="column", sparsity=0.875, refine=2, **options)
    recipe = yaml.safe_load((first / "recipe.yaml").read_text())
    assert recipe["refine"] == 2
    compress(**recipe, out=second)
    for name in ("model.safetensors", "recipe.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    layers = read_manifest(first).layers
    assert [entry.findings["refined"]["steps"] for entry in layers] == [r.refined.steps for r in result.layers]
    assert read_manifest(second).layers == layers


def test_without_steps_nothing_changes(model, tokens):
    plain, results = prune(model, tokens)
    assert [r.refined for r in results] == [None] * LAYERS
    assert CompressConfig(model="test").refine == 0
    assert torch.equal(logits(plain, random_tokens()), logits(prune(model, tokens, refine=0)[0], random_tokens()))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"refine": -3}, "refine -3 does not work: it should be greater than or equal to 0"),
        ({"refine": 1.5}, "refine 1.5 does not work"),
        ({"refine": 5, "pattern": "layer"}, "leaves nothing of a layer to refine"),
        ({"refine": 5, "pattern": "ssm-module"}, "leaves nothing of a layer to refine"),
        ({"refine": 5, "nsamples": 1}, "nsamples of at least 2"),
    ],
)
def test_what_cannot_be_refined_is_refused_in_a_sentence(options, sentence):
    with pytest.raises(UsageError, match=sentence):
        configure(model="tiny", **options)


def test_a_text_of_one_sample_is_refused_before_anything_is_computed(model, tokens):
    run = run_of(model, ARCHITECTURE, tokens[:1], configure(model="test", refine=3), dtypes(model))
    with pytest.raises(CalibrationError, match="at least 2 calibration samples"):
        pipeline.prune(run)
