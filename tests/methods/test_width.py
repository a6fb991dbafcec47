"""The residual stream turned and cut: against the model it was, stock models of another d_model, and naive sums."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.methods.registry import score
from ssmc.compressor.methods.ridge import RIDGE as SMALL
from ssmc.compressor.methods.ridge import ridged
from ssmc.compressor.methods.width.counts import shape_to_keep, width_to_keep
from ssmc.compressor.methods.width.directions import cost_of_cutting, least_cost_directions
from ssmc.compressor.methods.width.fit import best_reads, best_writes
from ssmc.compressor.methods.width.moments import stream_moments
from ssmc.compressor.methods.width.narrow import RIDGE, _of_tied_head, _write
from ssmc.compressor.options.patterns import WIDTH, scores_of
from ssmc.compressor.plan import make_plan
from ssmc.exporters import export
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.architectures.residual import (
    Basis,
    change_basis,
    cut_width,
    silent_places,
    sites,
    with_epsilons_of_width,
)
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.outline import read_outline
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.families import (
    FAMILIES,
    TINY_VOCAB,
    TOKENS,
    difference,
    random_ids,
    roughen,
    short,
    with_tokenizer,
)
from tests.support.models import save_transformers
from tests.support.pruning import run_of


def mamba(**changes):
    sizes = {"hidden_size": 24, "state_size": 8, "num_hidden_layers": 3, **TOKENS}  # the rank of dt is worked out
    return roughen(MambaForCausalLM(MambaConfig(**(sizes | changes))))


def mamba2(**changes):
    sizes = {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 8, "num_hidden_layers": 3}
    return roughen(Mamba2ForCausalLM(Mamba2Config(**(sizes | TOKENS | {"chunk_size": 16} | changes))))


WITHOUT_EXPERTS = {
    "jamba": {"num_experts": 1},
    "granitemoehybrid": {"num_local_experts": 0},
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"]},
}
MODELS = {"mamba": mamba, "mamba2": mamba2, **{name: FAMILIES[name] for name in FAMILIES if name != "zamba2"}}
WITH_EXPERTS = {f"{name}, experts": name for name in WITHOUT_EXPERTS}
LATENT = "nemotron_h, latent experts"
NAMED = {**{name: name for name in MODELS}, **WITH_EXPERTS, LATENT: "nemotron_h"}
FREE = ("mamba", "falcon_mamba", "falcon_h1", "nemotron_h")


def model_of(name, tied=False, **changes):
    family, without = NAMED[name], WITHOUT_EXPERTS.get(name, {})
    changes |= {"moe_latent_size": 8} if name == LATENT else {}
    model = MODELS[family](**(without | {"tie_word_embeddings": tied} | changes))
    if name not in MODELS:
        model.set_experts_implementation("eager")  # the product of all experts at once takes no float64
    return model.double() if changes.keys() <= {"moe_latent_size"} else model


def orthogonal(d, seed=0):
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0]


def turned(model, architecture, keep, last=None):
    """A copy of a model in a random basis of its stream, of which `keep` directions are in use."""
    other = copy.deepcopy(model)
    read = orthogonal(model.config.hidden_size)[:, :keep]
    if last is not None:
        read, last = _of_tied_head(read, last)
    count = len(sites(architecture, model))
    change_basis(architecture, other, Basis((read,) * count, (read.t(),) * count, last))
    return other


@torch.no_grad()
@pytest.mark.parametrize("name", NAMED)
def test_a_model_in_another_basis_of_its_stream_computes_the_same(name):
    """Bit for bit another model, the same function: in float64, with weights of norms that are far from one."""
    model, architecture, tokens = model_of(name), architecture_for(NAMED[name]), random_ids(2, 12)
    other = turned(model, architecture, 24)
    first = sites(architecture, model)[0].readers[0]
    assert difference(other.get_parameter(first), model.get_parameter(first)) > 0.1
    assert difference(other(tokens).logits, model(tokens).logits) < 1e-5  # norms of some families compute in float32


NEVER_TIED = "nemotron_h"  # by stock transformers, whatever the configuration says


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_a_cut_stream_is_a_smaller_stock_model(name, tied):
    """The oracle is the stock model of fewer coordinates, with the weights that were cut for it."""
    family = NAMED[name]
    tied = tied and family != NEVER_TIED
    model, architecture, tokens = model_of(name, tied), architecture_for(family), random_ids(2, 12)
    keep = 17 if family in FREE else 16  # a divisor of d_inner
    weight = model.get_submodule(architecture.last_norm).weight if tied else None
    masked = turned(model, architecture, keep, weight)
    tensors = {name: t for name, t in masked.state_dict().items() if not (tied and name == "lm_head.weight")}
    silent = [*silent_places(architecture, masked, keep, 24)]
    assert not any(bool(tensors[p.name].index_select(p.axis, p.index).any()) for p in silent)
    smaller, config, cuts = cut_width(architecture, masked, tensors, masked.config, keep)
    stock = type(model)(type(model.config)(**config.to_dict())).eval().double()
    if name not in MODELS:
        stock.set_experts_implementation("eager")
    loaded = stock.load_state_dict(smaller, strict=False)
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    assert not loaded.unexpected_keys
    stock.tie_weights()
    assert all(cut.before != cut.after for cut in cuts)
    assert sum(p.numel() for p in stock.parameters()) < sum(p.numel() for p in model.parameters())
    with_epsilons_of_width(architecture, masked, keep)
    assert difference(masked(tokens).logits, model(tokens).logits) > 0.01
    assert difference(stock(tokens).logits, masked(tokens).logits) < 1e-5


def second_moments(sites, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(sites, 40, d, generator=generator, dtype=torch.float64)
    return samples @ torch.randn(sites, d, d, generator=generator, dtype=torch.float64)


def test_the_cost_of_cutting_is_the_mean_square_of_what_gradients_see():
    """Over all pairs of a vector and a gradient: the naive sum of (g' N y)^2."""
    y, g = second_moments(2, 5), second_moments(2, 5, seed=1)
    gone = orthogonal(5)[:, :2]
    naive = 0.0
    for site in range(2):
        for one in y[site]:
            for other in g[site]:
                naive += float(other @ gone @ gone.t() @ one) ** 2 / (40 * 40)
    read, cost = (x.transpose(1, 2) @ x / 40 for x in (y, g))
    assert float(cost_of_cutting(read, cost, gone)) == pytest.approx(naive, rel=1e-9)


def test_no_other_direction_costs_less():
    """In a plane every direction can be tried."""
    read, cost = (x.transpose(1, 2) @ x / 40 for x in (second_moments(3, 2), second_moments(3, 2, seed=1)))
    stays = least_cost_directions(read, cost, 1)
    angles = torch.linspace(0, torch.pi, 2000, dtype=torch.float64)
    tried = [cost_of_cutting(read, cost, torch.stack([-a.sin(), a.cos()])[:, None]) for a in angles]
    found = cost_of_cutting(read, cost, torch.stack([-stays[1], stays[0]]))
    assert float(found) <= float(min(tried)) * (1 + 1e-3)
    assert float(found) < 0.9 * float(sum(tried)) / len(tried)


def test_directions_stay_orthonormal_and_cost_less_than_principal_components():
    read, cost = (x.transpose(1, 2) @ x / 40 for x in (second_moments(3, 9), second_moments(3, 9, seed=1)))
    stays = least_cost_directions(read, cost, 6)
    torch.testing.assert_close(stays.t() @ stays, torch.eye(6, dtype=torch.float64))
    components = torch.linalg.eigh(read.sum(0))[1].flip(1)
    gone = torch.linalg.qr(stays, mode="complete")[0][:, 6:]
    assert cost_of_cutting(read, cost, gone) < 0.9 * cost_of_cutting(read, cost, components[:, 6:])


def test_what_is_written_outside_goes_to_where_it_costs_least():
    """The oracle is a direct solver: of all vectors of the subspace the nearest one in the metric."""
    read, x = orthogonal(6)[:, :4], second_moments(1, 6)[0]
    metric = ridged(x.t() @ x / 40, RIDGE)
    root = torch.linalg.cholesky(metric).t()
    wanted = torch.randn(6, 3, dtype=torch.float64)
    direct = np.linalg.lstsq((root @ read).numpy(), (root @ wanted).numpy(), rcond=None)[0]
    np.testing.assert_allclose(_write(read, x.t() @ x / 40) @ wanted, direct, atol=1e-9)


@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_moments_are_those_of_the_stock_model(family):
    """The oracle: stock transformers' logits, the gradients of a cross-entropy written out, and autograd through it."""
    model, architecture, tokens = model_of(family, vocab_size=61), architecture_for(family), random_ids(2, 10)
    run = run_of(use_fast_scan(copy.deepcopy(model)), architecture, tokens, configure(model="m", pattern=WIDTH), {})
    with torch.no_grad():
        found = stream_moments(run.survey(), text=True, gradients=True)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
    chances = logits.detach().softmax(-1)
    drawn = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    normed = embedded.detach() * torch.rsqrt(embedded.detach().square().mean(-1, keepdim=True) + 1e-5)
    (at_stream,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), embedded)
    head = model.get_output_embeddings().weight * model.get_submodule(architecture.last_norm).weight
    at_head = (chances - torch.nn.functional.one_hot(drawn, 61)) @ head.detach()
    pairs = (
        (found.read[0], normed.flatten(0, 1)),
        (found.cost[-1], at_head),
        (found.stream[0], at_stream.flatten(0, 1)),
    )
    for ours, vectors in pairs:
        naive = (vectors.double().t() @ vectors.double()) / tokens.numel()
        assert difference(ours, naive) < 1e-4


@torch.no_grad()
def test_what_reads_the_narrow_stream_is_fitted_as_least_squares_says():
    """The oracle is a direct solver, on hidden states that stock transformers hands out."""
    model, architecture, tokens = model_of("mamba", vocab_size=61), architecture_for("mamba"), random_ids(3, 20)
    run = run_of(use_fast_scan(copy.deepcopy(model)), architecture, tokens, configure(model="m", pattern=WIDTH), {})
    write = [orthogonal(24, seed)[:6] for seed in range(len(sites(architecture, model)))]
    found = best_reads(run.survey(), write)
    first = model.get_input_embeddings()(tokens).flatten(0, 1).double()
    second = model(tokens, output_hidden_states=True).hidden_states[0].flatten(0, 1).double()
    narrow = first @ write[0].t()
    for read, x, z in ((found[0], first, narrow), (found[1], second, narrow + (second - first) @ write[1].t())):
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
        z = z * torch.rsqrt(z.square().sum(1, keepdim=True) / 24 + 1e-5)
        stiff = (SMALL * float(z.square().sum(0).mean())) ** 0.5
        stacked = np.vstack([z.numpy(), stiff * np.eye(6)])
        direct = np.linalg.lstsq(stacked, np.vstack([y.numpy(), np.zeros((6, 24))]), rcond=None)[0].T
        np.testing.assert_allclose(read, direct, atol=1e-4)


def loss_of_the_stream(model, tokens, write, cost):
    """Half of sum E[e' G e], summed naively; e is what least squares cannot say of a norm's output from the rest."""
    states = model(tokens, output_hidden_states=True).hidden_states[:-1]  # what the blocks put out
    total, narrow, before = 0.0, 0.0, 0.0
    for x, matrix, fisher in zip((model.get_input_embeddings()(tokens), *states), write, cost, strict=True):
        x = x.flatten(0, 1).double()
        narrow, before = narrow + (x - before) @ matrix.t(), x
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
        z = narrow * torch.rsqrt(narrow.square().sum(1, keepdim=True) / 24 + 1e-5)
        error = y.numpy() - z.numpy() @ np.linalg.lstsq(z.numpy(), y.numpy(), rcond=None)[0]
        total += sum(float(e @ fisher.numpy() @ e) for e in error) / len(error) / 2
    return total


@torch.no_grad()
def test_what_is_added_is_fitted_together_with_what_is_read():
    """On tokens that no step saw, against the maps they began with."""
    model, architecture = model_of("mamba", vocab_size=61), architecture_for("mamba")
    run = run_of(
        use_fast_scan(copy.deepcopy(model)), architecture, random_ids(24, 32), configure(model="m", pattern=WIDTH), {}
    )
    cost = stream_moments(run.survey(), text=True, gradients=True).cost
    read = orthogonal(24)[:, :12]
    write = [read.t()] * len(cost)
    found = best_writes(run.survey(), read, write, cost)
    unseen = random_ids(8, 32, seed=5)
    before, after = (loss_of_the_stream(model, unseen, maps, cost) for maps in (write, found))
    assert after < 0.8 * before
    alone = run_of(use_fast_scan(model), architecture, random_ids(1, 32), configure(model="m", pattern=WIDTH), {})
    assert best_writes(alone.survey(), read, write, cost) == write  # nothing would judge the steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Nemotron-H with the tokenizer of `tiny`, as a user has it."""
    directory = tmp_path_factory.mktemp("dense") / "m"
    model = FAMILIES["nemotron_h"](vocab_size=TINY_VOCAB, **WITHOUT_EXPERTS["nemotron_h"])
    return with_tokenizer(save_transformers(model, directory))


@pytest.mark.parametrize("pattern", ["width", "column+mlp+width"])
def test_compressed_and_exported(folder, tmp_path, pattern):
    result = compress(folder, out=tmp_path / "o", pattern=pattern, sparsity=0.25, round_channels=1, **short(folder))
    assert result.manifest["width"]["kept"] == 18
    assert 0 < result.manifest["width"]["left_out"] < 1
    assert any("18 of 24" in note for note in result.notes)
    done = export(tmp_path / "o")
    stock = AutoModelForCausalLM.from_pretrained(done.directory, dtype=torch.float32).eval()
    assert stock.config.hidden_size == 18
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32).eval()
    tokens = random_ids(1, 20)
    with torch.no_grad():
        assert difference(stock(tokens).logits, masked(tokens).logits) < 1e-3  # the epsilon of norms counts here
        assert done.comparison.max_difference <= done.comparison.tolerance
        assert stock.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 23)
    assert done.parameters[1] == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize("name", [*WITH_EXPERTS, LATENT])
def test_a_mixture_of_experts_in_a_narrower_stream(tmp_path, name):
    """Routers and experts read what stays of it; experts that go besides, too, also behind a map of their own."""
    changes = {"moe_latent_size": 8} if name == LATENT else {}
    model = FAMILIES[NAMED[name]](vocab_size=TINY_VOCAB, **changes)
    dense = with_tokenizer(save_transformers(model, tmp_path / "dense"))
    options = {"sparsity": {"width": 0.3, "expert": 0.5}, "round_channels": 1, **short(dense)}
    compress(dense, out=tmp_path / "o", pattern="width+expert", **options)
    done = export(tmp_path / "o")
    assert done.comparison.max_difference <= done.comparison.tolerance
    stock = AutoModelForCausalLM.from_pretrained(done.directory, dtype=torch.float32).eval()
    assert stock.config.hidden_size == 16  # 17 is not what the product of all experts at once takes
    assert stock.generate(random_ids(1, 20), max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_steps_and_codes_go_with_width(folder, tmp_path):
    """What was cut stays cut in distillation; codes of the narrow model, also in a graph, compute the same."""
    options = {"pattern": WIDTH, "sparsity": 1 / 3, "round_channels": 8, **short(folder)}
    taught = compress(folder, out=tmp_path / "taught", distill=2, **options)
    assert taught.manifest["distilled"]["steps"] == 2
    coded = compress(folder, out=tmp_path / "coded", quantize="w8", group_size=16, **options)
    assert coded.manifest["quantized"]["bits"] == 8
    for result in (taught, coded):
        for format in ("safetensors", "onnx"):
            done = export(result.directory, format=format)
            assert done.comparison.max_difference <= done.comparison.tolerance


def test_a_recipe_gives_the_same_bytes(folder, tmp_path):
    first = compress(folder, out=tmp_path / "a", pattern="width", sparsity=0.25, round_channels=2, **short(folder))
    assert first.config.pattern == "width"
    again = configure(**json.loads(first.config.model_dump_json(exclude_unset=True)))
    compress(out=tmp_path / "b", **again.model_dump(exclude_unset=True))
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert read[0] == read[1]


@pytest.mark.parametrize("name", scores_of(WIDTH))
def test_every_score_spans_a_subspace(name):
    model, architecture, tokens = model_of("mamba", vocab_size=61), architecture_for("mamba"), random_ids(2, 10)
    config = configure(model="m", pattern=WIDTH, score=name, round_channels=1, repair=False)
    run = run_of(use_fast_scan(model), architecture, tokens, config, {})
    judge = score(WIDTH, name)
    moments = stream_moments(run.survey(), judge.needs_text, judge.needs_cost)
    basis = judge.basis(moments, 5)
    torch.testing.assert_close(basis.t() @ basis, torch.eye(5, dtype=torch.float64))
    whole = moments.read.sum(0)
    if name == "pca":
        left = float((basis.t() @ whole @ basis).trace())
        assert left == pytest.approx(float(torch.linalg.eigvalsh(whole)[-5:].sum()))
    if name in ("activation", "minitron", "magnitude"):
        assert set(basis.sum(1).tolist()) == {0.0, 1.0}


def test_writing_to_what_was_cut_is_found_out(folder, tmp_path):
    compress(folder, out=tmp_path / "o", pattern="width", sparsity=0.25, round_channels=1, **short(folder))
    path = tmp_path / "o" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("out_proj.weight"))
    tensors[name][20, 0] = 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="still writes to coordinates"):
        export(tmp_path / "o")


def plan_of(model, pattern, sparsity=0.25, **options):
    architecture = architecture_for(model.config.model_type)
    config = configure(model="m", pattern=pattern, sparsity=sparsity, **options)
    return make_plan(config, architecture, architecture.dimensions(model.config), model.config)


def test_d_model_and_d_inner_go_together_where_a_loader_has_no_d_inner():
    plan = plan_of(mamba2(), "head+width", 1 / 3)
    assert shape_to_keep(plan).d_inner == plan.keep.channels[0] == 2 * width_to_keep(plan) == 32
    assert width_to_keep(plan_of(mamba2(), "width", 1 / 3)) == 16
    plan = plan_of(mamba(), "channel+width", 1 / 3, runtime="llama.cpp")
    assert plan.keep.channels[0] == 2 * width_to_keep(plan) == 32


REFUSED = {
    "nothing near that loads": (mamba2, "width", 0.1, {}, r"whole multiple of d_model.*head\+width"),
    "nothing to remove": (mamba, "width", 0.01, {}, "removes nothing"),
    "a runtime": (mamba, "width", 0.3, {"runtime": "llama.cpp"}, r"llama.cpp wants.*twice d_model.*channel\+width"),
    "channels that are heads": (mamba2, "channel+width", 0.25, {}, r"head\+width"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case):
    make, pattern, sparsity, options, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason):
        plan_of(make(), pattern, sparsity, **options)


def test_shared_blocks_are_refused(tmp_path):
    save_transformers(FAMILIES["zamba2"](), tmp_path / "z")
    with pytest.raises(UsageError, match="shared blocks read the embedding"):
        compress(tmp_path / "z", out=tmp_path / "o", pattern="width", sparsity=0.25)


def test_parameters_of_a_narrower_model_are_foretold():
    whole = read_outline(TINY_DIRECTORY)
    config = copy.deepcopy(MambaConfig.from_pretrained(TINY_DIRECTORY))
    config.hidden_size, sizes = 192, whole.dimensions
    smaller = MambaForCausalLM(config)
    counted = sum(p.numel() for p in smaller.parameters())
    assert whole.count(sizes.n_layer, sizes.d_inner, sizes.d_state, 192) == counted
