"""The layer-by-layer pipeline: what it collects, what it hands on, and what it leaves in the model."""

import copy

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from ssmc.compressor import configure
from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.statistics import NormalMatrix, SquaredStates
from ssmc.compressor.options.patterns import scores_of
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.scan import ScanInputs
from tests.support.naive import hidden_states, scan_output
from tests.support.pruning import job_of, prune_layers

ARCHITECTURE = architecture_for("mamba")
COLUMN_SCORES = scores_of("column")
LENGTH = 75  # not a multiple of the stretch, so the last one is shorter


def random_model(seed=0, layers=2, d_state=6):
    torch.manual_seed(seed)
    config = MambaConfig(
        vocab_size=61, hidden_size=12, state_size=d_state, num_hidden_layers=layers, time_step_rank=3, use_bias=True
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 2 - 1)
            elif name.endswith(("dt_proj.bias", "mixer.D")):
                parameter.uniform_(-1, 1)
            elif name.endswith("proj.weight"):  # so that what a layer adds is no smaller than what it reads
                parameter.normal_(std=3 / parameter.shape[1] ** 0.5)
    return model


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def tokens():
    return torch.randint(61, (5, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def stock_scan_inputs(model, hidden, layer):
    """What the scan of a layer reads, by calling transformers' own modules in the order its source does."""
    mixer = model.backbone.layers[layer].mixer
    xz = mixer.in_proj(model.backbone.layers[layer].norm(hidden)).transpose(1, 2)
    x, z = xz.chunk(2, dim=1)
    u = torch.nn.functional.silu(mixer.conv1d(x)[..., : hidden.shape[1]]).transpose(1, 2)
    n, r = mixer.ssm_state_size, mixer.time_step_rank
    dt, B, C = mixer.x_proj(u).split([r, n, n], dim=-1)
    dt = torch.nn.functional.softplus(mixer.dt_proj(dt))
    return ScanInputs(u, dt, -torch.exp(mixer.A_log), B, C, mixer.D, z.transpose(1, 2))


@torch.no_grad()
def hidden_before(model, tokens, layer):
    """The input of a layer, from transformers' own forward (which lists the outputs of the blocks)."""
    if layer == 0:
        return model.backbone.embeddings(tokens)
    return model(tokens, output_hidden_states=True).hidden_states[layer - 1]


@pytest.mark.parametrize("nsamples", [5, 1])
@torch.no_grad()
def test_collecting_in_stretches_equals_one_naive_pass(model, tokens, nsamples):
    hidden = hidden_before(model, tokens[:nsamples], 1)
    inputs = stock_scan_inputs(model, hidden, 1)
    h = hidden_states(inputs)
    block = model.backbone.layers[1]
    squares, normal = SquaredStates(), NormalMatrix()
    collect(job_of(ARCHITECTURE, block, hidden), [squares, normal])
    np.testing.assert_allclose(squares.value, (h[:, :-1] ** 2).sum((0, 1)).T, rtol=1e-4)
    energy = (scan_output(inputs, h) ** 2).sum()
    identity = np.eye(6).ravel()
    assert identity @ normal.dense().numpy() @ identity == pytest.approx(energy, rel=1e-4)


@torch.no_grad()
def test_all_samples_weigh_the_same(model, tokens):
    """Sums must not depend on the order of the samples (the published code gives sample i of n the weight i/n)."""
    block = model.backbone.layers[0]
    hidden = hidden_before(model, tokens, 0)
    sums = []
    for order in (slice(None), torch.arange(len(tokens)).flip(0)):
        squares = SquaredStates()
        collect(job_of(ARCHITECTURE, block, hidden[order]), [squares])
        sums.append(squares.value)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=0)


def prune(model, tokens, **options):
    pruned = use_fast_scan(copy.deepcopy(model))
    config = configure(model="test", **options)
    return pruned, prune_layers(pruned, ARCHITECTURE, tokens, config, dtypes(model))


def test_later_layers_are_calibrated_on_the_pruned_layers_outputs(model, tokens):
    pruned, results = prune(model, tokens, score="energy", repair=False)
    energy = []
    for source in (pruned, model):  # statistics of layer 1 behind the pruned and behind the dense layer 0
        hidden = hidden_before(source, tokens, 1)
        inputs = stock_scan_inputs(model, hidden, 1)
        C, h = inputs.C.double().numpy(), hidden_states(inputs)
        energy.append(((C[:, :, None] * h[:, 1:]) ** 2).sum((0, 1, 2)))
    assert list(results[1].states_kept) == sorted(np.argsort(-energy[0])[:3].tolist())
    assert not np.allclose(energy[0], energy[1], rtol=1e-3)  # else the first line would prove nothing


@pytest.mark.parametrize("repair", [True, False])
def test_the_reported_error_is_that_of_the_masked_layer(model, tokens, repair):
    pruned, results = prune(model, tokens, repair=repair)
    for layer in (0, 1):
        hidden = hidden_before(pruned, tokens, layer)
        dense, masked = (stock_scan_inputs(m, hidden, layer) for m in (model, pruned))
        whole, rest = (scan_output(i, hidden_states(i)) for i in (dense, masked))
        measured = ((whole - rest) ** 2).sum() / (whole**2).sum()
        assert results[layer].states.error == pytest.approx(measured, rel=2e-3)
        assert results[layer].states.repaired is repair


def test_pruned_rows_are_zero_and_the_rest_is_untouched(model, tokens):
    pruned, results = prune(model, tokens)
    before, after = model.state_dict(), pruned.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"backbone.layers.{i}.mixer.x_proj.weight" for i in range(2)}
    for i, result in enumerate(results):
        weight = after[f"backbone.layers.{i}.mixer.x_proj.weight"]
        dropped = [n for n in range(6) if n not in result.states_kept]
        assert torch.equal(weight[:3], before[f"backbone.layers.{i}.mixer.x_proj.weight"][:3])  # dt rows
        assert not weight[3:9][dropped].any()
        assert not weight[9:15][dropped].any()
        assert weight[9:15][list(result.states_kept)].any(1).all()


def test_repair_lowers_the_error_and_exact_is_the_lowest(model, tokens):
    first_layer = {}
    for score in COLUMN_SCORES:
        for repair in (False, True):
            _, results = prune(model, tokens, score=score, repair=repair)
            first_layer[score, repair] = results[0].states.error
    repaired = {score: first_layer[score, True] for score in COLUMN_SCORES}
    assert min(repaired, key=repaired.get) == "exact"
    assert first_layer["exact", True] < first_layer["exact", False]


def test_weights_are_rounded_to_what_will_be_saved(tokens):
    model = random_model().to(torch.bfloat16)
    stored = dtypes(model)
    pruned = use_fast_scan(copy.deepcopy(model).float())
    prune_layers(pruned, ARCHITECTURE, tokens, configure(model="test"), stored)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, tensor.to(torch.bfloat16).float()), name


def test_scores_that_need_no_text_run_without(model):
    _, results = prune(model, None, score="magnitude", repair=False)
    assert [r.states.error for r in results] == [None, None]
    A_log = model.backbone.layers[0].mixer.A_log
    assert list(results[0].states_kept) == sorted(A_log.abs().sum(0).argsort(descending=True)[:3].tolist())


def test_the_same_run_gives_the_same_bits(model, tokens):
    first, second = (prune(model, tokens)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_a_layer_errs_less_where_something_is_recalled(model):
    """Where the text repeats itself far back, the more so the more that counts."""
    tokens = torch.randint(61, (2, 150), generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([tokens, tokens[:, :40]], dim=1)  # the last 40 repeat the first
    hidden = torch.stack([ARCHITECTURE.embed(model, sample) for sample in tokens])
    wanted = ARCHITECTURE.run(model.backbone.layers[0], hidden)
    errors = []
    for weight in (0, 1000):
        pruned = use_fast_scan(copy.deepcopy(model))
        config = configure(model="test", sparsity=0.5, recall_weight=weight)
        prune_layers(pruned, ARCHITECTURE, tokens, config, dtypes(model))
        wrong = ARCHITECTURE.run(pruned.backbone.layers[0], hidden) - wanted
        errors.append(float(wrong[:, 155:189].square().sum()))
    assert errors[1] < 0.95 * errors[0]
