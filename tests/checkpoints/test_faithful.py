"""What comes along: config.json in its author's own words, and every file that is neither sizes nor weights.

The configurations are worded as transformers 4.57 words them, which other software reads; version 5 has other words.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.config_reading import read_config
from ssmc.runtime.models.checkpoints.stored_config import in_own_words
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.families import roughen
from tests.support.models import random_mamba2, random_model, save_mamba_ssm

STORED = json.loads((Path(__file__).parent.parent / "support" / "configs_457.json").read_text())
STATES = {"nemotron_h": "ssm_state_size", "mamba": "state_size", "mamba2": "state_size", "falcon_mamba": "state_size"}
TIED, ENDLESS = {"tie_word_embeddings": True}, {"time_step_limit": [0.0, math.inf]}
NEEDED = {"mamba": TIED, "falcon_mamba": TIED, "zamba2": TIED, "mamba2": {"intermediate_size": 48}}
NEEDED |= {
    "bamba": ENDLESS,
    "falcon_h1": ENDLESS | {"head_dim": 6},
    "granitemoehybrid": ENDLESS,
    "nemotron_h": {"num_experts_per_tok": 2},
}
"""What mlx-lm has no default for, or another one, where a source leaves it out."""
OTHERS = {
    "generation_config.json": '{"eos_token_id": [60, 7], "do_sample": true}',
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": '{"size": 3}',
    "special_tokens_map.json": '{"eos_token": "</s>"}',
    "added_tokens.json": "{}",
    "LICENSE": "You may.",
    "USE_POLICY.md": "Be nice.",
    "README.md": "---\nlicense: mit\n---\n# A model",
    "modeling_custom.py": "raise SystemExit",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
LEFT = ("optimizer.pt", "training_args.bin", "other.gguf", "notes.jsonl", ".gitattributes")


def save(folder, stored):
    """A random model whose config.json is exactly `stored`."""
    model = roughen(AutoModelForCausalLM.from_config(read_config(stored, Path("config.json"))))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


def differences(folder, stored):
    """What config.json says otherwise; nothing may be missing, nor stand elsewhere."""
    found = json.loads((folder / "config.json").read_text())
    assert list(found)[: len(stored)] == list(stored)
    return {key: value for key, value in found.items() if stored.get(key, "absent") != value}


@pytest.mark.parametrize("family", STORED)
def test_a_configuration_is_its_sources_but_for_what_was_cut(tmp_path, family):
    stored = STORED[family]
    source = save(tmp_path / "source", stored)
    compress(source, out=tmp_path / "out", score="random", repair=False, sparsity=0.5)
    assert differences(tmp_path / "out", stored) == {}
    exported = export(tmp_path / "out").directory
    changed = differences(exported, stored)
    assert changed.pop("ssmc")["pattern"] == "column"
    for key, value in NEEDED.get(family, {}).items():
        assert changed.pop(key) == value
    state = STATES.get(family, "mamba_d_state")
    assert changed == {state: stored[state] // 2}
    assert load_checkpoint(exported).dimensions.d_state == stored[state] // 2


def test_what_a_source_leaves_to_defaults_is_said_by_an_export(tmp_path):
    """transformers leaves out what is the default of its class; mlx-lm has no defaults, or others."""
    left_out = ("conv_kernel", "use_bias", "use_conv_bias", "time_step_limit", "time_step_rank", "layer_norm_epsilon")
    stored = {key: value for key, value in STORED["mamba2"].items() if key not in left_out}
    source = save(tmp_path / "source", stored)
    compress(source, out=tmp_path / "out", score="random", repair=False, sparsity=0.5)
    assert differences(tmp_path / "out", stored) == {}
    changed = differences(export(tmp_path / "out").directory, stored)
    said = {key: changed[key] for key in left_out if key in changed}
    wanted = {key: STORED["mamba2"][key] for key in left_out}
    assert said | {"time_step_rank": 2} == wanted
    assert changed["state_size"] == 4


def test_keys_that_say_the_same_change_together(tmp_path):
    twice = {"n_layer": 3, "d_inner": 48, "intermediate_size": 48, "d_model": 24, "ssm_cfg": {"d_state": 8, "layer": 1}}
    stored = STORED["mamba"] | twice
    source = save(tmp_path / "source", stored)
    sparsity = {"layer": 0.34, "channel": 0.5, "column": 0.5}
    options = {"score": "layer=random,channel=random,column=random", "repair": False}
    compress(source, out=tmp_path / "out", pattern="layer+column+channel", sparsity=sparsity, **options)
    changed = differences(export(tmp_path / "out").directory, stored)
    del changed["ssmc"]
    states, width = changed.pop("state_size"), changed.pop("intermediate_size")
    assert (states, width) == (4, 24)
    cfg = {"d_state": states, "layer": 1}
    assert changed == {"num_hidden_layers": 2, "n_layer": 2, "d_inner": width, "ssm_cfg": cfg} | TIED


def test_kinds_of_layers_keep_their_words():
    for family, word, kinds in (
        ("nemotron_h", "hybrid_override_pattern", "M-*"),
        ("granitemoehybrid", "layer_types", ["mamba", "attention"]),
        ("zamba2", "layers_block_type", ["mamba", "hybrid", "hybrid"]),
    ):
        stored = STORED[family]
        before = read_config(stored, Path("config.json"))
        after = copy.deepcopy(before)
        field = "layer_types" if family == "granitemoehybrid" else "layers_block_type"
        setattr(after, field, getattr(before, field)[: len(kinds)])
        if family != "nemotron_h":  # which counts its list
            after.num_hidden_layers = len(kinds)
        after.dtype = torch.float32
        written = in_own_words(stored, after, torch.float32)
        assert written[word] == kinds
        assert written["num_hidden_layers"] == len(kinds)
        assert read_config(written, Path("config.json")).to_dict()[field] == getattr(after, field)


@pytest.mark.parametrize(("key", "wanted"), [("torch_dtype", "bfloat16"), ("dtype", "bfloat16")])
def test_the_dtype_is_said_where_it_was_said(tmp_path, key, wanted):
    stored = {k: v for k, v in STORED["mamba"].items() if k != "dtype"} | {key: "float32", "hidden_size": 32}
    save(tmp_path / "source", stored)
    compress(tmp_path / "source", out=tmp_path / "out", pattern="2:4", ffn_score="magnitude")
    assert differences(tmp_path / "out", stored) == {}
    changed = differences(export(tmp_path / "out", format="sparse24").directory, stored)
    assert changed.keys() == {key, "ssmc", *TIED}
    assert changed[key] == wanted


def test_new_words_can_be_read_by_every_release(tmp_path):
    """A model of mamba_ssm's layout has no words to keep; infinity is written by none in the same way."""
    save_mamba_ssm(random_mamba2(), tmp_path / "source")
    compress(tmp_path / "source", out=tmp_path / "out", score="random", repair=False, sparsity=0.5)
    exported = export(tmp_path / "out").directory
    for folder, said in ((tmp_path / "out", False), (exported, True)):  # mlx-lm wants it to be said
        text = (folder / "config.json").read_text()
        assert "__float__" not in text
        assert ("Infinity" in text) == said
        assert tuple(load_checkpoint(folder).config.time_step_limit) == (0.0, float("inf"))


def test_everything_beside_sizes_and_weights_comes_along(tmp_path):
    source = save(tmp_path / "source", STORED["mamba"] | {"hidden_size": 32})
    for name, text in OTHERS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    for name in LEFT:
        (source / name).write_text("not for others")
    (source / "checkpoint-100").mkdir()
    (source / "checkpoint-100" / "trainer_state.json").write_text("{}")
    out = tmp_path / "out"
    compress(source, out=out, pattern="2:4", ffn_score="magnitude")
    exports = [export(out, format=format).directory for format in ("safetensors", "mamba-ssm", "onnx", "sparse24")]
    for folder in (out, *exports):
        assert {name: (folder / name).read_text() for name in OTHERS} == OTHERS
        assert not [name for name in (*LEFT, "checkpoint-100") if (folder / name).exists()]
        assert set(OTHERS) <= json.loads((folder / "ssmc.json").read_text())["files"].keys()
        assert not (folder / "recipe.yaml").exists() or folder == out
    packed = export(out, format="sparse24", packed=True).directory
    assert "Only ssmc reads" in (packed / "README.md").read_text()
    assert (packed / "README-model.md").read_text() == OTHERS["README.md"]
    assert GenerationConfig.from_pretrained(exports[0]).eos_token_id == [60, 7]


def test_another_tokenizer_is_not_mixed_with_the_models_own(tmp_path):
    source = tmp_path / "source"
    random_model(vocab_size=4096).save_pretrained(source)
    for name in ("special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json"):
        (source / name).write_text("{}")
    compress(source, out=tmp_path / "out", tokenizer="tiny", score="magnitude", repair=False)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY_DIRECTORY / "tokenizer.json").read_bytes()
    assert "preprocessor_config.json" in written
    assert not written & {"special_tokens_map.json", "chat_template.jinja"}
