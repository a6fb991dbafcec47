"""What several tests of benchmarks and evaluations read; nobody may change them."""

import shutil

import pytest
import safetensors.torch
import torch

from ssmc.runtime.bench import benchmark
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from ssmc.runtime.models.tokenizers import copy_tokenizer, load_tokenizer
from ssmc.runtime.text import read_texts
from ssmc.runtime.tiny import TINY_DIRECTORY, heldout_path
from tests.support.benches import KEPT, SMALL, random_model, save
from tests.support.models import write_manifest
from tests.support.tasks import HERE, write_lines


@pytest.fixture(scope="session")
def artefact(tmp_path_factory):
    """A dense model beside `ssmc-out` with the same three of its states in two formats, as compress and export leave
    them."""
    base = tmp_path_factory.mktemp("bench")
    model = random_model()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    dense, out = base / "dense", base / "ssmc-out"
    save(dense, tensors, model.config)
    copy_tokenizer(load_checkpoint("tiny").directory, dense)
    cut, config, _ = architecture_for("mamba").cut(tensors, model.config, STATE, [KEPT, KEPT])
    source = {"model": str(dense), "format": "transformers", "relative": "../dense"}
    manifest = {
        "kind": "masked",
        "source": source,
        "config": {"pattern": "column", "sparsity": 0.6, "calib": str(base)},
    }
    out.mkdir()
    write_manifest(out, manifest)
    for name, format in (("safetensors", "transformers"), ("mamba-ssm", "mamba-ssm")):
        save(out / name, cut, config, format)
        write_manifest(out / name, manifest | {"kind": "export"})
    return out


@pytest.fixture(scope="session")
def report(artefact):
    return benchmark(artefact, **SMALL, window=64, max_windows=9)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Local documents in all three places they may lie in."""
    folder = tmp_path_factory.mktemp("data")
    for number, (task, rows) in enumerate(HERE.items()):
        write_lines(folder / (f"{task}.jsonl" if number % 2 else f"tasks/{task}.jsonl"), rows)
    stories = read_texts(heldout_path()).documents[:12]
    write_lines(folder / "wikitext2" / "test.jsonl", [{"text": story} for story in stories])
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(TINY_DIRECTORY)


@pytest.fixture(scope="session")
def changed(tmp_path_factory):
    """The embedded model with noise in its output projections: one that scores differently."""
    directory = tmp_path_factory.mktemp("changed") / "noisy"
    shutil.copytree(TINY_DIRECTORY, directory, ignore=shutil.ignore_patterns("__*", "*.py"))
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    g = torch.Generator().manual_seed(0)
    for name in tensors:
        if name.endswith("out_proj.weight"):
            tensors[name] += 0.03 * torch.randn(tensors[name].shape, generator=g).half()
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
