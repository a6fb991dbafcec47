"""Files as people really have them: other names, a body alone, quantised weights, adapters, old configurations."""

import json

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.support.checkpoints import HEAD, change_json, refused
from tests.support.commandline import run
from tests.support.families import bamba, jamba, nemotron_h
from tests.support.models import logits, random_model, random_tokens, save_mamba_ssm, save_transformers


def rename(directory, change):
    """Give the tensors of a model other names."""
    path = directory / "model.safetensors"
    if path.is_file():
        tensors = {change(name): tensor for name, tensor in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    else:
        path = directory / "pytorch_model.bin"
        torch.save({change(name): tensor for name, tensor in torch.load(path, weights_only=True).items()}, path)
    return directory


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_model, jamba, bamba, nemotron_h])
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "net."])
def test_a_prefix_of_all_names_is_taken_away_with_a_note(tmp_path, make, prefix):
    model = make()
    directory = rename(save_transformers(model, tmp_path / "m"), lambda name: prefix + name)
    checkpoint = load_checkpoint(directory)
    tokens = random_tokens()
    assert torch.equal(checkpoint.model(tokens).logits, model(tokens).logits)
    assert all(part in checkpoint.notes[0] for part in prefix.split(".") if part)


def test_compiled_parts_and_models_of_mamba_ssm_too(tmp_path):
    inside = rename(
        save_transformers(random_model(), tmp_path / "a"), lambda n: n.replace("mixer.", "mixer._orig_mod.")
    )
    behind = rename(save_mamba_ssm(random_model(), tmp_path / "b"), lambda name: "module." + name)
    for directory in (inside, behind):
        checkpoint = load_checkpoint(directory)
        assert torch.equal(logits(checkpoint.model, random_tokens()), logits(random_model(), random_tokens()))
        assert len(checkpoint.notes) == 1


@pytest.mark.parametrize("make", [random_model, jamba, bamba])
def test_a_body_saved_alone_is_read_as_stock_reads_it(tmp_path, make):
    model = make(tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "CausalLM" not in config["architectures"][0]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    checkpoint = load_checkpoint(tmp_path / "m")
    tokens = random_tokens()
    assert torch.equal(checkpoint.model(tokens).logits, stock(tokens).logits)
    assert "the body of the model was saved alone" in checkpoint.notes[0]


def test_a_body_of_mamba_ssm_saved_alone(tmp_path):
    directory = save_mamba_ssm(random_model(), tmp_path / "m")
    path = directory / "pytorch_model.bin"
    stored = torch.load(path, weights_only=True)
    body = {name.removeprefix("backbone."): tensor for name, tensor in stored.items() if name != HEAD}
    assert "embedding.weight" in body
    torch.save(body, path)
    checkpoint = load_checkpoint(directory)
    assert torch.equal(logits(checkpoint.model, random_tokens()), logits(random_model(), random_tokens()))
    assert "'backbone.'" in checkpoint.notes[0]


def test_a_body_without_the_head_it_needs_is_refused(tmp_path):
    random_model(tie_word_embeddings=False).base_model.save_pretrained(tmp_path / "m")
    refused(tmp_path / "m", HEAD, "only the body", "AutoModelForCausalLM")


def test_what_is_made_of_such_a_model_has_the_names_of_all_others(tmp_path, tiny):
    wrapped = rename(save_transformers(tiny.model, tmp_path / "m"), lambda name: "_orig_mod." + name)
    result = compress(wrapped, out=tmp_path / "out", score="magnitude", repair=False)
    assert any("'_orig_mod.'" in note for note in result.notes)
    assert load_checkpoint(tmp_path / "out").notes == ()


def test_names_that_nothing_helps_stay_what_they_are_in_the_message(tmp_path):
    directory = rename(
        save_transformers(random_model(), tmp_path / "m"), lambda name: name.replace("embeddings", "words")
    )
    refused(directory, "lacks the tensor backbone.embeddings.weight")


# --- other kinds of files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        ({"bits": 4}, "is quantised, says"),
    ],
)
def test_quantised_models_are_refused_by_name(tmp_path, settings, named):
    """As GPTQ leaves one: packed integers in place of weights."""
    directory = rename(
        save_transformers(random_model(), tmp_path / "m"), lambda n: n.replace("_proj.weight", "_proj.qweight")
    )
    change_json(directory / "config.json", quantization_config=settings)
    refused(directory, named, "full-precision")


def test_an_adapter_alone_names_its_model(tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/stories", "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "an adapter (LORA) of owner/stories", "merge_and_unload")
    with pytest.raises(UsageError, match=r"holds an adapter, not a compressed model.*merge_and_unload"):
        export(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    refused(tmp_path, "holds an adapter, not a model", "merge_and_unload")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("in_proj.weight", "in_proj.base_layer.weight", "an adapter that was not merged"),
        ("in_proj.weight", "in_proj.qweight", "quantised by GPTQ or AWQ"),
        ("in_proj.weight", "in_proj.weight_packed", "quantised by compressed-tensors"),
        ("dt_proj.bias", "in_proj.weight_scale", "numbers of 8 bits with scales"),
        ("dt_proj.bias", "in_proj.weight.quant_state.bitsandbytes__nf4", "quantised by bitsandbytes"),
    ],
)
def test_adapters_and_codes_are_known_by_names_where_no_configuration_tells(tmp_path, capsys, old, new, named):
    directory = rename(save_transformers(random_model(), tmp_path / "m"), lambda name: name.replace(old, new))
    refused(directory, named, new)
    assert named in run(capsys, "inspect", directory).sentence(3)


def test_an_outdated_generation_config_loses_only_what_is_outdated(tmp_path):
    directory = save_transformers(random_model(), tmp_path / "m")
    values = {"cache_implementation": "mamba", "eos_token_id": 7, "temperature": 0.7, "do_sample": True}
    (directory / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cache_implementation"):
        GenerationConfig(**values)
    checkpoint = load_checkpoint(directory)
    read = checkpoint.model.generation_config
    assert (read.eos_token_id, read.temperature, read.do_sample) == (7, 0.7, True)
    assert "generation_config.json has cache_implementation" in checkpoint.notes[0]


@pytest.mark.parametrize("ends", ["</s>", [7, "</s>"], 0.5])
def test_ends_that_are_no_tokens_are_left_out_with_a_note(tmp_path, ends):
    directory = save_transformers(random_model(), tmp_path / "m")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "top_k": 3}))
    checkpoint = load_checkpoint(directory)
    read = checkpoint.model.generation_config
    assert (read.eos_token_id, read.top_k) == (None, 3)
    assert "generation_config.json has eos_token_id" in checkpoint.notes[0]


def test_an_index_may_name_a_tied_head_that_no_shard_has(tmp_path):
    directory = save_transformers(random_model(), tmp_path / "m", max_shard_size="8KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"][HEAD] = index["weight_map"]["backbone.embeddings.weight"]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    stock = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert torch.equal(logits(load_checkpoint(directory).model, random_tokens()), logits(stock, random_tokens()))
    change_json(directory / "config.json", tie_word_embeddings=False)
    refused(directory, HEAD)


def test_models_quantised_by_mlx_are_refused_by_name(tmp_path):
    directory = save_transformers(random_model(), tmp_path / "m")
    change_json(directory / "config.json", quantization={"group_size": 64, "bits": 4})
    refused(directory, "quantised by MLX")


@pytest.mark.parametrize(
    ("name", "named"),
    [("m.gguf", "llama.cpp"), ("best.pth", "ssmc.compress(module, batches)"), ("model.safetensors", "Name the folder")],
)
def test_a_file_says_what_to_name_instead(tmp_path, name, named):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, "is a file", named)
    refused(tmp_path, "holds no config.json", named)
