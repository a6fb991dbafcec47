"""Neurons and query heads: what the tables of a family say, against stock models of fewer units."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.calibration.watched import watched
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.ridge import RIDGE
from ssmc.compressor.methods.units.fit import fit_stream
from ssmc.compressor.methods.units.prune import choose_units
from ssmc.compressor.pipeline import _Walk
from ssmc.exporters import export
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.architectures.units import ATTENTION, MLP, Attention
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

HAVING = [name for name in FAMILIES if architecture_for(name).units]


def chosen(part, config):
    """Half of the units of every group, those with odd numbers; of attention whole groups as well."""
    total = part.total(config)
    if part.kind == ATTENTION:
        each = total // config.num_key_value_heads
        return [head for head in range(each, total) if head % 2]  # of the first group nothing
    return list(range(1, total, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Nemotron-H with the tokenizer of `tiny`, as a user has it."""
    directory = tmp_path_factory.mktemp("dense") / "m"
    return with_tokenizer(save_transformers(FAMILIES["nemotron_h"](vocab_size=TINY_VOCAB), directory))


@torch.no_grad()
@pytest.mark.parametrize("family", HAVING)
def test_masked_units_are_cut_out_of_every_layer_and_nothing_changes(family):
    """The oracle is the stock model: with units masked, and made with that many fewer."""
    architecture = architecture_for(family)
    model = FAMILIES[family](**({"num_experts": 1} if family == "jamba" else {}))
    masked, cuts, config = copy.deepcopy(model), [], model.config
    kept = {}
    parts = [part for part in architecture.units if part.kind in (MLP, ATTENTION)]
    for part in parts:
        for i, block in enumerate(architecture.blocks(masked)):
            if (module := part.inside(block)) is not None:
                units = kept[id(part), i] = chosen(part, model.config)
                assert not part.is_masked(module, units)
                part.mask(module, units)
                assert part.is_masked(module, units)
                assert not part.is_masked(module, units[1:])
    tensors = masked.state_dict()
    for part in parts:
        named = {architecture.block_prefix(i): units for (own, i), units in kept.items() if own == id(part)}
        tensors, config, found = part.cut(tensors, config, named)
        assert part.total(config) < part.total(model.config)
        cuts += found
    assert all(cut.before != cut.after for cut in cuts)
    assert_cut_equals_masked(model, masked, tensors, config, moved=0.1)


@torch.no_grad()
def test_what_adds_to_the_stream_is_fitted_as_least_squares_says():
    """A Bamba layer of two stages in a model that lost something before it: the oracle is a direct solver."""
    architecture, model, dense = architecture_for("bamba"), FAMILIES["bamba"](), FAMILIES["bamba"]()
    tokens, block, own = random_ids(3, 40), model.model.layers[1], dense.model.layers[1]
    walk = _Walk(run_of(model, architecture, tokens, configure(model="m", pattern="mlp"), {}))
    walk.arrive(0, model.model.layers[0])  # the dense stream goes on
    walk.hidden.copy_(walk.dense + 0.1 * torch.randn(walk.dense.shape, generator=torch.Generator().manual_seed(0)))
    job = walk.arrive(1, block)
    record, before = fit_stream(job), own.self_attn.o_proj.weight.double()
    assert [stage.maps for stage in record.stages] == [("self_attn.o_proj",), ("feed_forward.down_proj",)]
    assert all(stage.error < 0.9 * stage.error_unrepaired for stage in record.stages)
    architecture.record_arguments(dense, tokens[:1])
    stream = architecture.run(dense.model.layers[0], architecture.embed(dense, tokens))
    inputs, missing = [], []
    for wanted, now in zip(stream.split(1), walk.hidden.split(1), strict=True):
        _, read = watched(architecture, own, wanted, ["pre_ff_layernorm"])
        _, reads = watched(architecture, block, now, ["self_attn.o_proj"])
        inputs.append(reads["self_attn.o_proj"][0].double())
        missing.append(read["pre_ff_layernorm"][0].double() - now[0].double() - inputs[-1] @ before.t())
    x, t = torch.cat(inputs), torch.cat(missing)
    ridge = RIDGE * float(x.square().sum(0).mean())
    stacked = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, torch.cat([t, t.new_zeros(x.shape[1], t.shape[1])])).solution.t()
    assert difference(block.self_attn.o_proj.weight.double() - before, change) < 1e-3


@torch.no_grad()
def test_an_artefact_of_all_kinds_is_cut_and_runs_in_stock_transformers(folder, tmp_path):
    result = compress(folder, out=tmp_path / "out", pattern="mlp+attention", **short(folder))
    exported = export(result.directory)
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, exported.directory))
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5
    assert (cut.config.intermediate_size, cut.config.num_attention_heads) == (18, 2)
    text = [m.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False) for m in (masked, cut)]
    assert torch.equal(*text)
    assert {"fitted", "error"} <= {word for table in tables(result) for word in table.columns}
    manifest = result.directory / "ssmc.json"
    whole = manifest.read_text(encoding="utf-8")
    manifest.write_text(json.dumps(_with_units(json.loads(whole), [0, 999])), encoding="utf-8")
    with pytest.raises(CheckpointError, match="names attention that layer"):
        export(result.directory, force=True)
    manifest.write_text(whole, encoding="utf-8")
    file = result.directory / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="still uses attention the manifest calls pruned"):
        export(result.directory, force=True)


def _with_units(manifest, units):
    """The manifest with other query heads."""
    for layer in manifest["layers"]:
        if "attention" in layer.get("kept_units", {}):
            layer["kept_units"]["attention"] = units
    return manifest


def tables(result):
    return [table for step in result.plan.steps for table in step.tables(result.outcome)]


def test_what_cannot_go_is_refused_before_any_work(folder, tmp_path):
    for options, words in (
        (
            {"pattern": "attention", "sparsity": 0.05},
            "of 4 query heads removes none; the least that can go is 2, a sparsity of 0.5",
        ),
        ({"pattern": "mlp", "refine": 3}, "efine does not go with mlp"),
        ({"pattern": "mlp", "score": "exact"}, "core exact does not go with the pattern mlp; obs"),
    ):
        with pytest.raises(UsageError, match=words):
            compress(folder, out=tmp_path / "out", **options, **short(folder))
    with pytest.raises(UsageError, match="its blocks hold a norm and a mixer and nothing else"):
        compress("tiny", out=tmp_path / "out", pattern="mlp")
    assert not (tmp_path / "out").exists()
    jamba = plan_refusal("jamba", "mlp")
    assert "experts have the same width" in jamba


def plan_refusal(family, pattern):
    model = FAMILIES[family]()
    with pytest.raises(UsageError) as refused:
        run_of(model, architecture_for(family), None, configure(model="m", pattern=pattern), {})
    return str(refused.value)


def test_whole_groups_go_where_queries_cannot_and_the_least_active_go_first():
    """One query of each group stays where half may; where a quarter may, one group goes and then one of its queries."""
    weight = torch.eye(8)
    means = torch.tensor([1.0, 1, 5, 5, 4, 4, 5, 5])  # heads of two channels: 1 5 | 4 5
    module = torch.nn.Module()
    for name, rows in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4), ("o_proj", 8)):
        setattr(module, name, torch.nn.Linear(8, rows, bias=False))
    module.head_dim = 2
    judge = registered("attention", "minitron")
    assert choose_units(judge, Attention(), module, 2, weight, None, means) == [1, 3]
    assert choose_units(judge, Attention(), module, 1, weight, None, means) == [3]


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in HAVING if name != "jamba"])
def test_layers_of_any_kind_go_and_the_others_keep_theirs(family):
    """Silent ones against a stock model that lacks them."""
    architecture, model = architecture_for(family), FAMILIES[family]()
    blocks, tokens = architecture.blocks(model), random_ids(1, 20)
    gone = [0, len(blocks) - 1] if len(blocks) > 2 else [1]
    for layer in gone:
        assert not architecture.is_removed(blocks[layer])
        architecture.remove_block(blocks[layer])
        assert architecture.is_removed(blocks[layer])
    tensors, config, cuts = architecture.cut_blocks(model.state_dict(), model.config, gone)
    assert all(cut.after == () for cut in cuts)
    smaller = type(model)(config).eval()
    smaller.load_state_dict(tensors)
    assert len(architecture.blocks(smaller)) == len(blocks) - len(gone)
    assert difference(smaller(tokens).logits, model(tokens).logits) < 1e-5


@torch.no_grad()
def test_layers_and_units_go_together_and_each_removal_is_tried(folder, tmp_path):
    options = {"pattern": "layer+mlp", "sparsity": {"layer": 0.4, "mlp": 0.25}}
    result = compress(folder, out=tmp_path / "out", **options, **short(folder))
    exported = export(result.directory)
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, exported.directory))
    assert len(result.removals) == 2
    assert cut.config.num_hidden_layers == 3
    assert "linear_attention" in cut.config.layers_block_type
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5
    assert torch.equal(
        *[m.generate(random_ids(1, 5), max_new_tokens=4, do_sample=False) for m in (masked, cut)],
    )


@pytest.mark.parametrize("score", ["mamba-shedder", "similarity", "random"])
def test_a_layer_with_a_mixer_and_one_with_attention_stay_by_every_score(folder, score, tmp_path):
    """Three of five layers, of which two have mixers and one attention: a draw would take that."""
    options = {"pattern": "layer", "sparsity": 0.6, "score": score, "repair": False, **short(folder)}
    for seed in range(4 if score == "random" else 1):
        result = compress(folder, out=tmp_path / str(seed), seed=seed, **options)
        kinds = AutoModelForCausalLM.from_pretrained(export(result.directory).directory).config.layers_block_type
        assert len(kinds) == 2
        assert {*kinds} == {"linear_attention", "full_attention"}


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_layers_go_together_with_channels_of_heads(layer, tmp_path):
    """Whichever goes, those that stay say how wide a head is."""
    dense = with_tokenizer(save_transformers(FAMILIES["falcon_h1"](vocab_size=TINY_VOCAB), tmp_path / "m"))
    seed = next(s for s in range(9) if torch.randperm(2, generator=torch.Generator().manual_seed(s))[0] == layer)
    options = {"pattern": "layer+head-dim", "sparsity": 0.5, "score": {"layer": "random"}, "repair": False}
    result = compress(dense, out=tmp_path / "out", seed=seed, **options, **short(dense))
    assert result.removals[0].layer == layer
    exported = export(result.directory)
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (result.directory, exported.directory))
    assert (cut.config.mamba_n_heads, cut.config.mamba_d_head) == (4, 4)
    ids = random_ids(1, 20)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5


def test_more_layers_than_can_go_are_refused_before_any_work(folder, tmp_path):
    """Nothing is calibrated: there is not even a text."""
    options = {"out": tmp_path / "out", "calib": tmp_path / "no-such-text.txt", "pattern": "layer"}
    with pytest.raises(UsageError, match=r"of 5 layers would remove 4; the most that can go is 3, a sparsity of 0\.6"):
        compress(folder, sparsity=0.8, **options)
    FAMILIES["falcon_h1"]().save_pretrained(tmp_path / "one")
    with pytest.raises(CheckpointError, match="without a tokenizer"):  # every layer has a mixer and attention
        compress(tmp_path / "one", sparsity=0.5, **options)
    FAMILIES["falcon_h1"](num_hidden_layers=1).save_pretrained(tmp_path / "single")
    with pytest.raises(UsageError, match="None of the 1 layers of this model can go"):
        compress(tmp_path / "single", sparsity=0.5, **options)
