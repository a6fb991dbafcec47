"""The families beside Mamba-1 and Mamba-2: stock transformers judges our scan, our reading, and every export."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress
from ssmc.compressor.families import limits
from ssmc.exporters import export
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.measure.perplexity import perplexity
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from ssmc.runtime.models.generation import open_session
from ssmc.runtime.scan import scan_states
from tests.support.commandline import run
from tests.support.families import (
    FAMILIES,
    NOISE,
    NORMED,
    TINY_VOCAB,
    difference,
    random_ids,
    short,
    with_tokenizer,
)
from tests.support.models import save_transformers


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family):
    """The stock model, and a copy with our scan."""
    stock = FAMILIES[family]()
    return stock, use_fast_scan(copy.deepcopy(stock))


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """A model with the tokenizer of `tiny`, as a user has it."""
    directory = save_transformers(FAMILIES[family](vocab_size=TINY_VOCAB), tmp_path_factory.mktemp("dense") / family)
    return with_tokenizer(directory)


@pytest.fixture(scope="module")
def artefact(folder, tmp_path_factory):
    """Half of the states gone, and the export."""
    out = tmp_path_factory.mktemp("out") / "masked"
    result = compress(folder, out=out, **short(folder))
    return result, export(out)


@torch.no_grad()
def test_our_scan_computes_what_stock_transformers_does(models):
    stock, fast = models
    ids = random_ids(2, 40)
    wanted = stock(ids).logits
    assert difference(fast(ids).logits, wanted) < NOISE
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    wanted = stock(ids, attention_mask=mask).logits
    assert difference(fast(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()]) < NOISE
    assert difference(use_stock_scan(copy.deepcopy(fast))(ids).logits, stock(ids).logits) == 0


@torch.no_grad()
def test_decoding_and_pieces_continue_from_the_states(models, folder):
    for how in ({"do_sample": False}, {"num_beams": 2}):
        texts = [m.generate(random_ids(2, 9), max_new_tokens=8, **how) for m in models]
        assert torch.equal(*texts)
    session = open_session(folder).session
    ids = random_ids(1, 24)
    wanted = load_checkpoint(folder).model(ids).logits
    session.prefill(ids[:, :11])
    session.prefill(ids[:, 11:20])
    for t in range(20, 24):
        last = session.step(ids[:, t])
        assert difference(last, wanted[:, t]) < 1e-4


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(folder):
    """A prompt of 9 tokens beside one of 14: each as if it were alone, in prefill and in the steps after it."""
    session, alone = open_session(folder).session, load_checkpoint(folder).model
    ids, mask = random_ids(2, 18), torch.ones(2, 14, dtype=torch.long)
    mask[0, :5] = 0
    last = session.prefill(ids[:, :14], mask)
    for t in range(14, 18):
        for row, first in ((0, 5), (1, 0)):
            wanted = alone(ids[row : row + 1, first:t]).logits[0, -1]
            assert difference(last[row], wanted) < 1e-4
        last = session.step(ids[:, t])


def test_other_ways_to_prune_states(family, folder, tmp_path):
    steps = family in ("falcon_mamba", "jamba", "falcon_h1", "zamba2")
    options = {"refine": 3} if steps else {"score": "energy", "repair": False}
    result = compress(folder, out=tmp_path / "out", **options, **short(folder))
    for layer in (layer for layer in result.layers if layer.states_kept and "refine" in options):
        assert layer.refined.error <= layer.refined.error_before
    exported = export(tmp_path / "out")
    assert load_checkpoint(exported.directory).dimensions.d_state == 4


@torch.no_grad()
def test_checkpoints_are_read_and_written_as_stock_does(folder, tmp_path):
    checkpoint = load_checkpoint(folder)
    stock, _ = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    constants = sum(b.numel() for name, b in stock.named_buffers() if name in stock.state_dict())
    assert checkpoint.parameters == stock.num_parameters() + constants
    ids = random_ids(2, 30)
    assert difference(checkpoint.model(ids).logits, stock(ids).logits) < 1e-6
    for name, buffer in stock.named_buffers():
        assert torch.equal(checkpoint.model.get_buffer(name), buffer), name
    write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config)
    written, own = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == own.keys(), "other software looks for these names"
    assert all(torch.equal(written[name], own[name]) for name in own)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again(ids).logits, stock(ids).logits)
    with pytest.raises(CheckpointError, match="mamba_ssm has no models of type"):
        write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config, format="mamba-ssm")


@torch.no_grad()
def test_perplexity_is_that_of_the_stock_logits(folder):
    ids = random_ids(66)
    found = perplexity(load_checkpoint(folder).model, ids, window=33)
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids.view(2, 33)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids.view(2, 33)[:, 1:].flatten())
    assert abs(found.nll_per_token - float(loss)) < 1e-4


@torch.no_grad()
def test_masked_equals_cut_in_stock_transformers(artefact, folder):
    result, exported = artefact
    dense, masked, cut = (
        AutoModelForCausalLM.from_pretrained(d) for d in (folder, result.directory, exported.directory)
    )
    ids = random_ids(2, 40)
    wanted = masked(ids).logits
    assert difference(wanted, dense(ids).logits) > 1e-3, "something was removed"
    assert difference(cut(ids).logits, wanted) < 1e-4
    assert exported.comparison.max_difference <= exported.comparison.tolerance
    sizes = [architecture_for(m.config.model_type).dimensions(m.config) for m in (dense, cut)]
    assert sizes[1].d_state == sizes[0].d_state // 2
    assert cut.num_parameters() < dense.num_parameters()
    text = cut.generate(random_ids(1, 5), max_new_tokens=6, do_sample=False)
    assert torch.equal(text, masked.generate(random_ids(1, 5), max_new_tokens=6, do_sample=False))


def test_repair_loses_less_than_none(artefact, family):
    result, _ = artefact
    layers = [layer for layer in result.layers if layer.states_kept]
    assert sum(layer.out_proj.error for layer in layers) < 0.9 * sum(
        layer.out_proj.error_unrepaired for layer in layers
    )
    unrepaired = sum(layer.states.error_unrepaired for layer in layers)
    assert sum(layer.states.error for layer in layers) < (0.9 if family in NORMED else 1.001) * unrepaired


@torch.no_grad()
@pytest.mark.parametrize("length", [13, 40])
def test_blocks_run_alone_as_they_do_in_the_model(models, family, length):
    """The arguments that were recorded on one text serve another of its length."""
    stock, fast = models
    architecture, ids = architecture_for(family), random_ids(2, length)
    architecture.record_arguments(fast, ids[:1])
    hidden = architecture.embed(fast, ids[1:])
    for block in architecture.blocks(fast):
        hidden = architecture.run(block, architecture.enter(block, hidden))
    assert difference(architecture.head(fast, hidden), stock(ids[1:]).logits) < NOISE


@torch.no_grad()
def test_linear_maps_of_attention_and_mlp_are_pruned_with_the_mixers(family, folder, tmp_path):
    pattern = "2:4" if family in ("jamba", "bamba") else "unstructured"
    options = {"pattern": pattern, "scope": "ffn" if pattern == "2:4" else "all", "sparsity": 0.4, "alpha": 0}
    result = compress(folder, out=tmp_path / "out", **options, **short(folder))
    dense, pruned = (AutoModelForCausalLM.from_pretrained(d) for d in (folder, tmp_path / "out"))
    shared = {n for n, _ in dense.named_modules() if "shared_transformer" in n or n.endswith(".linear")}
    wanted = 0.5 if pattern == "2:4" else 0.4
    linears = [name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        weight, before = pruned.get_submodule(name).weight, dense.get_submodule(name).weight
        if name == "lm_head" or name in shared or (pattern == "2:4" and weight.shape[1] % 4):
            assert torch.equal(weight, before), name
        else:
            assert abs(float((weight == 0).float().mean()) - wanted) < 0.03, name
            assert not torch.equal(weight, before * (weight != 0)), "SparseGPT moves what stays"
    untouched = [name for name, p in dense.named_parameters() if "experts" in name and p.ndim == 3]
    assert all(torch.equal(pruned.get_parameter(name), dense.get_parameter(name)) for name in untouched)
    assert any("stay dense" in note for note in result.notes) != architecture_for(family).capabilities.uniform
    done = [module.name for layer in result.layers if layer.weights for module in layer.weights.modules]
    for layer in (layer for layer in result.layers if layer.states_kept and pattern != "2:4"):
        assert 0 < layer.entries.pruned < 0.6
    convolutions = sum(1 for layer in result.layers if layer.states_kept)
    assert len(done) == len([name for name in linears if name != "lm_head" and name not in shared]) + convolutions


def test_inspect_says_what_a_family_is_not_for(family, folder, capsys, tmp_path):
    file = tmp_path / "found.json"
    done = run(capsys, "inspect", folder, "--json", file)
    assert done.code == 0, done.err
    lacks = json.loads(file.read_text())["not_for_this_family"]
    assert ("--format gguf" in lacks) == (family == "zamba2")  # llama.cpp has no layout of it
    expected = {"--format mamba-ssm", *limits(architecture_for(family))}
    assert expected == {*lacks} - {"--format sparse24", "--format gguf"}
    assert f"Not for {family}" in done.words
    for option in limits(architecture_for(family)):
        assert option.split(",")[0] in done.words


def test_formats_a_family_lacks_are_refused_in_one_sentence(artefact, capsys):
    result, _ = artefact
    done = run(capsys, "export", result.directory, "--format", "mamba-ssm")
    assert "of type" in done.sentence(done.code)
    assert not (result.directory / "mamba-ssm").exists()


@pytest.mark.parametrize("changes", [{}, {"mamba_norm_before_gate": False}], ids=str)
@torch.no_grad()
def test_falcon_h1_with_a_gated_norm(changes):
    stock = FAMILIES["falcon_h1"](mamba_rms_norm=True, **changes)
    fast, ids = use_fast_scan(copy.deepcopy(stock)), random_ids(2, 40)
    assert difference(fast(ids).logits, stock(ids).logits) < NOISE
    check_readers_and_gains(stock, architecture_for("falcon_h1"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NORMED])
@torch.no_grad()
def test_what_calibration_takes_for_readers_and_gains_is_what_the_mixer_does(name):
    check_readers_and_gains(FAMILIES[name](), architecture_for(name))


def check_readers_and_gains(model, architecture):
    """C from the rows that are fitted, and the output from read-outs times gains, are those of the mixer itself."""
    block = next(block for block in architecture.blocks(model) if architecture.mixer(block) is not None)
    mixer = architecture.mixer(block)
    width = 3 if architecture.capabilities.shared_blocks else 1
    hidden = torch.randn(1, 30, 24 * width, generator=torch.Generator().manual_seed(2))
    inputs = architecture.scan_inputs(mixer, *architecture.expand(mixer, architecture.normed(block, hidden)))
    wanted, parts = architecture.scan(mixer, inputs)[0], []
    for group, own in enumerate(architecture.scan_groups(mixer, inputs)):
        readers = architecture.readers(mixer, group)
        drive = architecture.read_by_in_proj(block, hidden) @ readers.weight.t()
        assert readers.in_bias is None
        padded = torch.nn.functional.pad(drive, (0, 0, readers.taps.shape[1] - 1, 0))
        windows = padded.unfold(1, readers.taps.shape[1], 1)  # (1, L, N, d_conv)
        C = torch.nn.functional.silu((windows * readers.taps).sum(-1) + readers.bias)
        assert difference(C, own.C) < 1e-5
        states = scan_states(own, own.initial_state())[:, 1:]  # (1, L, N, D)
        gains = architecture.gains(mixer, group, own, states)
        gains = torch.nn.functional.silu(own.z) if gains is None else gains
        read = (own.C[:, :, None] @ states).squeeze(2) + own.D * own.u
        parts.append(read * gains)
    assert difference(torch.cat(parts, dim=-1), wanted) < 1e-5


def test_patterns_a_family_lacks_are_refused(family, folder, tmp_path):
    for option, reason in limits(architecture_for(family)).items():
        pattern = option.removeprefix("--pattern ")
        if pattern != option:
            with pytest.raises(UsageError, match=f"pattern {pattern} is not carried out for {family}"):
                compress(folder, out=tmp_path / "out", pattern=pattern, **short(folder))
            assert reason
