"""`ssmc inspect`: its counts against transformers' own models, its sentences."""

from __future__ import annotations

import json

import pytest
import torch

from ssmc.compressor.families import prospects
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE
from ssmc.runtime.models.inspection import inspect
from ssmc.runtime.models.outline import outline
from tests.support.commandline import run
from tests.support.models import LAYERS, random_mamba2, random_model, save_transformers

FAMILIES = {"mamba": random_model, "mamba2": random_mamba2}


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    return load_checkpoint(save_transformers(FAMILIES[request.param](), tmp_path / request.param))


@torch.no_grad()
def test_counts_are_those_of_the_model(checkpoint):
    found, model = inspect(outline(checkpoint)), checkpoint.model
    assert found.parameters == sum(part.parameters for part in found.parts) == model.num_parameters()
    assert found.weight_bytes == 4 * found.parameters
    by_name = {part.name: part for part in found.parts}
    linears = dict.fromkeys(by_name, 0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            linears["head" if name == "lm_head" else name.split(".")[-1]] += module.weight.numel()
    for name in ("in_proj", "out_proj", "head"):
        assert by_name[name].multiply_adds == linears[name] > 0
    cache = model(torch.ones(1, 9, dtype=torch.long), use_cache=True).cache_params
    assert found.ssm_state_bytes == 4 * sum(cache.layers[i].recurrent_states[0].numel() for i in range(LAYERS))
    assert found.conv_state_bytes == 4 * sum(cache.layers[i].conv_states[0].numel() for i in range(LAYERS))
    assert by_name["scan"].multiply_adds * 4 == 3 * found.ssm_state_bytes


def test_what_columns_bring_is_what_cutting_them_brings(checkpoint):
    sizes, architecture = checkpoint.dimensions, checkpoint.architecture
    half = sizes.d_state // 2
    kept = [[g * sizes.d_state + n for g in range(sizes.groups) for n in range(half)]] * sizes.n_layer
    tensors, _, _ = architecture.cut(checkpoint.tensors(), checkpoint.config, STATE, kept)
    left = sum(tensor.numel() for tensor in tensors.values()) / inspect(outline(checkpoint)).parameters
    gains = {prospect.pattern: prospect.gain for prospect in prospects(outline(checkpoint))}
    assert f"{1 - left:.1%} fewer parameters" in gains["column"]


@pytest.mark.parametrize("model", ["tiny", "tiny-mamba2"])
def test_the_command_says_it_and_writes_it(tmp_path, capsys, model):
    file = tmp_path / "found.json"
    done = run(capsys, "inspect", model, "--json", file)
    assert done.code == 0
    for words in (
        "Parameters and work",
        "What can be pruned",
        "Runtimes for an export",
        "Recurrent state of one sequence",
    ):
        assert words in done.out
    found = json.loads(file.read_text())
    assert found["model_type"] == ("mamba" if model == "tiny" else "mamba2")
    assert {p["pattern"] for p in found["prunable"]} >= {"column", "layer"}
    assert {r["name"] for r in found["runs_where"]} >= {"transformers", "onnxruntime, CPU", "llama.cpp, CUDA"}
    again = run(capsys, "inspect", model, "--json", file)
    assert "exists already" in again.sentence(5)
