"""Experts: whole ones and neurons of each, against stock models and naive loops over tokens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.distillation.run import Lesson, distil_artefact
from ssmc.compressor.methods.experts.elimination import eliminate_experts
from ssmc.compressor.methods.experts.fit import fit_experts
from ssmc.compressor.methods.experts.score import ScoredExperts
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.ridge import RIDGE
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.architectures.experts import EXPERT, EXPERT_WIDTH, Experts, with_experts
from ssmc.runtime.models.families import architecture_for
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
from tests.support.pruning import run_of

SIZES = {
    "jamba": {"num_experts": 5, "intermediate_size": 32},
    "granitemoehybrid": {"num_local_experts": 5, "intermediate_size": 32},
    "nemotron_h": {"n_routed_experts": 6, "n_group": 2, "moe_intermediate_size": 32},
}
HAVING = list(SIZES)
COUNT = {"jamba": "num_experts", "granitemoehybrid": "num_local_experts", "nemotron_h": "n_routed_experts"}
WIDTH = {"jamba": "intermediate_size", "granitemoehybrid": "intermediate_size", "nemotron_h": "moe_intermediate_size"}


def experts_of(family):
    return next(part for part in architecture_for(family).units if part.kind == EXPERT)


def mixtures(family, model):
    part = experts_of(family)
    return [module for block in model.model.layers if (module := part.inside(block)) is not None]


def barred(router, family, gone):
    """The forward of a router that may not choose some experts, written down from the family's formula."""

    def forward(hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        logits, k = x @ router.weight.t(), router.top_k
        if family == "nemotron_h":
            scores = logits.sigmoid()
            choice = (scores + router.e_score_correction_bias).index_fill(1, torch.tensor(gone), -torch.inf)
            grouped = choice.unflatten(1, (router.num_group, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
            inside = torch.zeros(len(x), router.num_group).scatter_(1, best, 1).bool()
            chosen = grouped.masked_fill(~inside[..., None], -torch.inf).flatten(1).topk(k, dim=-1).indices
            weights = scores.gather(1, chosen)
            return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor, chosen
        logits = logits.index_fill(1, torch.tensor(gone), -torch.inf)
        if family == "jamba":
            weights, chosen = logits.softmax(-1).topk(k, dim=-1)
            return logits, weights, chosen
        best, chosen = logits.topk(k, dim=-1)
        return logits, best.softmax(-1), chosen

    return forward


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
def test_a_model_without_experts_is_the_stock_model_whose_router_may_not_choose_them(family):
    architecture, model = architecture_for(family), FAMILIES[family](**SIZES[family])
    part, tokens = experts_of(family), random_ids(2, 24)
    kept = [0, 2, 4, 5] if family == "nemotron_h" else [1, 2, 4]
    gone = [e for e in range(part.total(model.config)) if e not in kept]
    assert len(kept) in part.allowed(model.config)
    dense, oracle, removed = model(tokens).logits, copy.deepcopy(model), copy.deepcopy(model)
    for module, smaller in zip(mixtures(family, oracle), mixtures(family, removed), strict=True):
        router = getattr(module, part.router)
        router.forward = barred(router, family, gone)
        part.remove(smaller, kept)
    named = {
        architecture.block_prefix(i): kept
        for i, block in enumerate(model.model.layers)
        if part.inside(block) is not None
    }
    tensors, config, cuts = part.cut(model.state_dict(), model.config, named)
    cut = type(model)(config).eval()
    cut.load_state_dict(tensors)
    assert getattr(config, COUNT[family]) == len(kept)
    assert len(cuts) >= 3 * len(named)
    wanted = oracle(tokens).logits
    assert difference(dense, wanted) > 0.01
    assert difference(removed(tokens).logits, wanted) < 1e-5
    assert difference(cut(tokens).logits, wanted) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
def test_masked_neurons_of_experts_are_cut_out_and_nothing_changes(family):
    """Each expert loses others; in Jamba MLPs lose as many."""
    architecture, model = architecture_for(family), FAMILIES[family](**SIZES[family])
    masked, tensors, config = copy.deepcopy(model), None, model.config
    parts = [part for part in architecture.units if part.kind == EXPERT_WIDTH]
    kept = {}
    for part in parts:
        for i, block in enumerate(masked.model.layers):
            if (module := part.inside(block)) is not None:
                width, numbers = part.total(config), part.numbers(module, config)
                units = [n for n in numbers if (n + n // width) % 2]
                kept[id(part), i] = units
                assert not part.is_masked(module, units)
                part.mask(module, units)
                assert part.is_masked(module, units)
                assert not part.is_masked(module, units[1:])
    tensors = masked.state_dict()
    for part in parts:
        named = {architecture.block_prefix(i): units for (own, i), units in kept.items() if own == id(part)}
        tensors, config, _ = part.cut(tensors, config, named)
    assert getattr(config, WIDTH[family]) == getattr(model.config, WIDTH[family]) // 2
    assert_cut_equals_masked(model, masked, tensors, config, moved=0.01)


def mixture(family, tokens=96, **changes):
    """A mixture of a family, and random tokens for it."""
    model = FAMILIES[family](**{**SIZES[family], **changes})
    module = mixtures(family, model)[0]
    return experts_of(family), module, torch.randn(tokens, 24, generator=torch.Generator().manual_seed(5))


def outputs_of(family, module, hidden):
    """What every expert puts out, (E, T, d_model), one expert and one token after the other."""
    out = []
    for e in range(len(module.experts.down_proj)):
        rows = []
        for x in hidden:
            if family == "nemotron_h":
                inner = torch.relu(module.experts.up_proj[e] @ x).square()
            else:
                gate, up = (module.experts.gate_up_proj[e] @ x).chunk(2)
                inner = torch.nn.functional.silu(gate) * up
            rows.append(module.experts.down_proj[e] @ inner)
        out.append(torch.stack(rows))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
def test_reap_is_the_mean_over_the_tokens_of_an_expert_of_weight_times_norm(family):
    part, module, hidden = mixture(family)
    _, weights, chosen = getattr(module, part.router)(hidden)
    outputs, wanted, sums = outputs_of(family, module, hidden), [], []
    for e in range(len(outputs)):
        found = [
            float(weights[t, place] * outputs[e, t].norm())
            for t in range(len(hidden))
            for place in range(chosen.shape[1])
            if chosen[t, place] == e
        ]
        wanted.append(sum(found) / max(1, len(found)))
        sums.append(sum(value**2 for value in found))
    layer = ScoredExperts(part, module, hidden)
    got = registered(EXPERT, "reap").importance(layer)
    assert difference(got, torch.tensor(wanted, dtype=torch.float64)) < 1e-5
    got = registered(EXPERT, "activation").importance(layer)
    assert difference(got, torch.tensor(sums, dtype=torch.float64)) < 1e-5
    order = sorted(range(len(outputs)), key=lambda e: wanted[e])
    assert registered(EXPERT, "reap").choose(layer, len(outputs) - 1) == sorted(order[1:])


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
@pytest.mark.parametrize("beside", [False, True])
def test_elimination_takes_the_expert_whose_loss_costs_least_after_all_else(family, beside):
    """The oracle runs the mixture with each expert missing, and fits what stands beside it by a direct solver."""
    part, module, hidden = mixture(family, n_group=1) if family == "nemotron_h" else mixture(family)
    x = torch.randn(len(hidden), 20, generator=torch.Generator().manual_seed(9)) if beside else None
    outputs = outputs_of(family, module, hidden)

    def put_out(experts):
        _, weights, chosen = with_experts(getattr(module, part.router), experts)(hidden)
        return sum(
            weights[:, place, None] * outputs[torch.tensor(experts)[chosen[:, place]], torch.arange(len(hidden))]
            for place in range(chosen.shape[1])
        )

    def cost(experts):
        missing = (put_out(list(range(len(outputs)))) - put_out(experts)).double()
        if x is not None:
            missing = missing - x.double() @ torch.linalg.lstsq(x.double(), missing).solution
        return float(missing.square().sum())

    left = list(range(len(outputs)))
    for keep in range(len(outputs) - 1, module.experts.num_experts - 3, -1):
        left = min(([e for e in left if e != gone] for gone in left), key=cost)
        assert eliminate_experts(ScoredExperts(part, module, hidden, x), keep) == left


@torch.no_grad()
def test_of_groups_that_a_router_takes_as_a_whole_as_many_experts_stay_in_each():
    part, module, hidden = mixture("nemotron_h")
    for name in ("exact", "reap", "magnitude", "random"):
        kept = registered(EXPERT, name).choose(ScoredExperts(part, module, hidden, seed=1), 4, 2)
        assert [sum(e // 3 == group for e in kept) for group in (0, 1)] == [2, 2]


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
def test_last_maps_of_experts_are_fitted_as_least_squares_says(family):
    """The first expert's change is that of a direct solver; what is missing afterwards is what the module misses."""
    part, module, hidden = mixture(family, tokens=400)
    before = copy.deepcopy(module)
    missing = torch.randn(len(hidden), 24, generator=torch.Generator().manual_seed(6)) + hidden
    wanted = module(hidden[None])[0] + 0.5 * missing
    left = fit_experts(part, module, 0.5, [(hidden[:150], 0.25 * missing[:150]), (hidden[150:], 0.25 * missing[150:])])
    real = float((0.5 * (wanted - module(hidden[None])[0])).double().square().sum())
    assert left == pytest.approx(real, rel=1e-4)
    assert left < 0.95 * float((0.25 * missing).square().sum())
    _, weights, chosen = getattr(module, part.router)(hidden)
    tokens, places = (chosen == 0).nonzero(as_tuple=True)
    inner = hidden[tokens] @ (before.experts.up_proj if family == "nemotron_h" else before.experts.gate_up_proj)[0].t()
    if family == "nemotron_h":
        inner = torch.relu(inner).square()
    else:
        gate, up = inner.chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
    x = 0.5 * weights[tokens, places, None].double() * inner.double()
    ridge = RIDGE * float(x.square().sum(0).mean())
    stacked = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    target = torch.cat([0.25 * missing[tokens].double(), torch.zeros(x.shape[1], 24, dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, target).solution.t()
    got = module.experts.down_proj[0].double() - before.experts.down_proj[0].double()
    assert difference(got, change) < 1e-3


@pytest.fixture(scope="module", params=HAVING)
def folder(request, tmp_path_factory):
    """A small model with experts and the tokenizer of `tiny`, as a user has it."""
    directory = tmp_path_factory.mktemp("dense") / "m"
    model = FAMILIES[request.param](vocab_size=TINY_VOCAB, **SIZES[request.param])
    return with_tokenizer(save_transformers(model, directory))


@torch.no_grad()
def test_an_artefact_loads_in_stock_transformers_and_its_configuration_keeps_its_words(folder, tmp_path):
    pattern = f"{EXPERT}+{EXPERT_WIDTH}+column"
    result = compress(folder, out=tmp_path / "out", pattern=pattern, sparsity=0.4, **short(folder))
    exported = export(result.directory)
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, exported.directory))
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5
    text = [m.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False) for m in (masked, cut)]
    assert torch.equal(*text)
    before, after = (json.loads((d / "config.json").read_text("utf-8")) for d in (folder, exported.directory))
    family = before["model_type"]
    states = "ssm_state_size" if family == "nemotron_h" else "mamba_d_state"
    assert {key for key in before if before[key] != after.get(key)} == {COUNT[family], WIDTH[family], states}
    assert after[COUNT[family]] < before[COUNT[family]]
    assert after[WIDTH[family]] == 16  # of 32 in steps of 8, nearest to 0.6
    kept = [layer["kept_units"] for layer in result.manifest["layers"] if "kept_units" in layer]
    assert any(len(units.get(EXPERT, ())) == after[COUNT[family]] for units in kept)
    titles = [table.title for step in result.plan.steps for table in step.tables(result.outcome)]
    assert {"Experts", "Neurons of experts"} <= set(titles)


@torch.no_grad()
def test_layers_and_experts_go_together(tmp_path):
    """A layer that goes as a whole loses its experts, too: there is one number for all."""
    changes = {"vocab_size": TINY_VOCAB, **SIZES["granitemoehybrid"]}
    folder = with_tokenizer(save_transformers(FAMILIES["granitemoehybrid"](**changes), tmp_path / "m"))
    options = {"pattern": f"layer+{EXPERT}", "sparsity": {"layer": 0.34, EXPERT: 0.4}, "score": {EXPERT: "reap"}}
    result = compress(folder, out=tmp_path / "out", **options, **short(folder))
    masked, cut = (
        AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, export(result.directory).directory)
    )
    assert (cut.config.num_hidden_layers, cut.config.num_local_experts) == (2, 3)
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5


@torch.no_grad()
def test_channels_and_experts_of_one_layer_go_together(tmp_path):
    folder = with_tokenizer(save_transformers(FAMILIES["jamba"](vocab_size=TINY_VOCAB), tmp_path / "m"))
    result = compress(
        folder, out=tmp_path / "out", pattern=f"channel+{EXPERT}+{EXPERT_WIDTH}", sparsity=0.34, **short(folder)
    )
    masked, cut = (
        AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, export(result.directory).directory)
    )
    assert cut.config.num_experts < FAMILIES["jamba"]().config.num_experts
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5


def test_what_is_left_is_distilled(folder, tmp_path):
    """Experts that are gone leave no zeros; what went of other axes stays silent, as exports prove."""
    options = {"pattern": f"column+{EXPERT}+{EXPERT_WIDTH}", "sparsity": 0.4, **short(folder)}
    result = compress(folder, out=tmp_path / "out", distill=2, **options)
    assert result.manifest["distilled"]["steps"] == 2
    distil_artefact(result.directory, Lesson(2, str(options["calib"]), 48), out=tmp_path / "again")
    for directory in (result.directory, tmp_path / "again"):
        assert export(directory).comparison.max_difference < 1e-3


def test_what_cannot_go_is_refused_before_any_work(tmp_path):
    jamba = FAMILIES["jamba"](vocab_size=TINY_VOCAB)  # three experts, two to a token
    folder = with_tokenizer(save_transformers(jamba, tmp_path / "m"))
    for options, words in (
        ({"pattern": EXPERT, "sparsity": 0.1}, "of 3 experts removes none; the least that can go is 1"),
        ({"pattern": "mlp"}, "--pattern expert-width removes from both"),
        ({"pattern": EXPERT, "score": "obs"}, "core obs does not go with the pattern expert; exact"),
        ({"pattern": EXPERT_WIDTH, "refine": 3}, "efine does not go with expert-width"),
    ):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", **options, **short(folder))
    assert not (tmp_path / "out").exists()
    bamba = with_tokenizer(save_transformers(FAMILIES["bamba"](vocab_size=TINY_VOCAB), tmp_path / "b"))
    with pytest.raises(UsageError, match=r"expert is not carried out for bamba: its blocks have no experts"):
        compress(bamba, out=tmp_path / "out", pattern=EXPERT, **short(bamba))
    model = FAMILIES["granitemoehybrid"](num_local_experts=0)
    with pytest.raises(UsageError, match="has no experts that can go"):
        run_of(model, architecture_for("granitemoehybrid"), None, configure(model="m", pattern=EXPERT), {})
    with pytest.raises(UsageError, match="has no experts that can go"):  # its configuration has a number of them
        compress("tiny-hybrid", out=tmp_path / "out", pattern=EXPERT)


def test_no_fewer_experts_stay_than_a_token_is_sent_to():
    config = FAMILIES["nemotron_h"](n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=5).config
    assert experts_of("nemotron_h").allowed(config) == [9]
    assert isinstance(experts_of("jamba"), Experts)
    assert experts_of("jamba").allowed(FAMILIES["jamba"](num_experts=4, num_experts_per_tok=1).config) == [2, 3]
    assert experts_of("granitemoehybrid").allowed(FAMILIES["granitemoehybrid"](num_local_experts=4).config) == [2, 3]
