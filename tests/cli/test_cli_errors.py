"""Wrong inputs: one clear sentence, the documented exit code, and nothing left behind."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmc.cli import main
from ssmc.runtime.tiny import TINY_DIRECTORY
from tests.support.commandline import run, run_process

USAGE, CHECKPOINT, CALIBRATION, OUTPUT = 2, 3, 4, 5
QUICK = ("--score", "magnitude", "--no-repair")
X_PROJ = "backbone.layers.1.mixer.x_proj.weight"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Commands run in an empty folder; whatever goes wrong, no output and no remains of one may appear in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert [p.name for p in folder.iterdir() if p.name.startswith((".", "ssmc-out"))] in ([], ["ssmc-out"])


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model to damage."""
    return shutil.copytree(TINY_DIRECTORY, tmp_path / "model", ignore=shutil.ignore_patterns("__*", "*.py"))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    out = tmp_path_factory.mktemp("compressed") / "ssmc-out"
    assert main(["compress", "tiny", *QUICK, "--quiet", "--out", str(out)]) == 0
    return out


@pytest.fixture
def artefact(compressed, folder):
    """A copy of a compressed model to damage, where `export` and `bench` look for it."""
    return shutil.copytree(compressed, folder / "ssmc-out")


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def fails(capsys, code, *arguments):
    """Run, expect the exit code and one sentence; no output folder may have appeared."""
    before = Path("ssmc-out").exists()
    sentence = run(capsys, *arguments).sentence(code)
    assert Path("ssmc-out").exists() == before
    assert sentence[-1] in ".!?)`'"
    assert "Traceback" not in sentence
    return sentence


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0", "1", "-1", "2", "nan", "inf"])
@pytest.mark.parametrize("form", ["{option} {value}", "{option}={value}"])
def test_sparsity_outside_its_range(capsys, sparsity, form):
    options = form.format(option="--sparsity", value=sparsity).split()
    sentence = fails(capsys, USAGE, "compress", "tiny", *options)
    assert "sparsity" in sentence
    assert "between 0 and 1" in sentence
    assert repr(sparsity) in sentence


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sparsity", "half"], ["sparsity", "half", "number"]),
        (["--sparsity", "0.01"], ["0.01", "16 states", "none"]),
        (["--sparsity", "0.99"], ["0.99", "16 states", "none"]),
        (["--score", "best"], ["score", "best", "exact"]),
        (["--pattern", "checkers"], ["pattern", "checkers", "column"]),
        (["--pattern", "column+checkers"], ["pattern", "checkers", "combined"]),
        (["--sparsity", "channel=0.5"], ["sparsity", "channel", "no part of the pattern column"]),
        (["--nsamples", "0"], ["nsamples", "0", "greater than or equal to 1"]),
        (["--seqlen", "1"], ["seqlen", "1"]),
        (["--seed", "-3"], ["seed", "-3"]),
        (["--round-to", "0"], ["round_to", "0"]),
        (["--round-to", "few"], ["round_to", "few", "power-of-two"]),
        (["--round-to", "17"], ["17", "16 states"]),
        (["--device", "abacus"], ["--device", "abacus", "cpu"]),
        (["--speed", "9"], ["--speed", "ssmc compress --help"]),
        (["--out"], ["--out", "argument"]),
    ],
)
def test_wrong_options(capsys, options, named):
    sentence = fails(capsys, USAGE, "compress", "tiny", *QUICK, *options)
    assert all(word in sentence for word in named), sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_is_not_there(capsys):
    assert "CUDA" in fails(capsys, USAGE, "compress", "tiny", *QUICK, "--device", "cuda")


def test_unknown_command_and_missing_model(capsys):
    assert "shrink" in fails(capsys, USAGE, "shrink")
    assert "MODEL" in fails(capsys, USAGE, "compress")
    assert "tensorrt" in fails(capsys, USAGE, "export", "--format", "tensorrt")


# --- models -----------------------------------------------------------------------------------------------------------


def test_no_such_path(capsys):
    assert "./nowhere" in fails(capsys, CHECKPOINT, "compress", "./nowhere")


def test_a_file_that_is_not_a_model(capsys, folder):
    (folder / "notes.txt").write_text("hello")
    assert "notes.txt" in fails(capsys, CHECKPOINT, "compress", "./notes.txt")


def test_an_empty_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in fails(capsys, CHECKPOINT, "compress", tmp_path / "empty")


def test_another_architecture(capsys, model):
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    sentence = fails(capsys, CHECKPOINT, "compress", model)
    assert "llama" in sentence
    assert "mamba" in sentence.lower()


def test_config_that_is_not_json(capsys, model):
    (model / "config.json").write_text('{"model_type": "mam')
    assert "config.json" in fails(capsys, CHECKPOINT, "compress", model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number(capsys, model, value):
    change_tensors(model, lambda tensors: tensors[X_PROJ][3].fill_(value))
    assert X_PROJ in fails(capsys, CHECKPOINT, "compress", model, *QUICK)


def test_a_missing_tensor(capsys, model):
    change_tensors(model, lambda tensors: tensors.pop(X_PROJ))
    assert X_PROJ in fails(capsys, CHECKPOINT, "compress", model, *QUICK)


def test_a_misshapen_tensor(capsys, model):
    change_tensors(model, lambda tensors: tensors.update({X_PROJ: tensors[X_PROJ][:-1].clone()}))
    assert X_PROJ in fails(capsys, CHECKPOINT, "compress", model, *QUICK)


@pytest.mark.parametrize("left", [0, 5, 1000, -1])
def test_truncated_safetensors(capsys, model, left):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    assert "model.safetensors" in fails(capsys, CHECKPOINT, "compress", model, *QUICK)


def test_missing_weights(capsys, model):
    (model / "model.safetensors").unlink()
    assert str(model) in fails(capsys, CHECKPOINT, "compress", model, *QUICK)


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("modern", [True, False], ids=["torch.save", "bare pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(capsys, model, tmp_path, modern):
    (model / "model.safetensors").unlink()
    weights, proof = model / "pytorch_model.bin", tmp_path / "the-code-ran"
    if modern:
        torch.save({"backbone.norm_f.weight": Attack(proof)}, weights)
    else:
        weights.write_bytes(pickle.dumps({"backbone.norm_f.weight": Attack(proof)}))
    sentence = fails(capsys, CHECKPOINT, "compress", model, *QUICK)
    assert not proof.exists()
    assert "pytorch_model.bin" in sentence


def test_a_model_without_a_tokenizer(capsys, model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "--tokenizer" in run(capsys, "compress", model).sentence(CHECKPOINT)


# --- calibration text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("text.txt", b"", "no text"),
        ("text.txt", b" \n\n \t\n", "no text"),
        ("text.jsonl", b"", "no text"),
        ("text.jsonl", b'{"text": ""}\n', "no text"),
        ("text.jsonl", b'{"text": "good"}\n{"text": ', "line 2"),
        ("text.jsonl", b'{"story": "x"}\n', '"text"'),
        ("text.txt", b"bad \xff text", "UTF-8"),
        ("text.parquet", b"not parquet", "parquet"),
        ("text.txt", b"Once upon a time.", "2048"),
    ],
)
def test_unusable_calibration_text(capsys, folder, name, content, named):
    (folder / name).write_bytes(content)
    sentence = fails(capsys, CALIBRATION, "compress", "tiny", "--calib", name)
    assert name in sentence
    assert named in sentence


def test_calibration_text_that_is_not_there(capsys, folder):
    assert "nowhere.txt" in fails(capsys, CALIBRATION, "compress", "tiny", "--calib", "nowhere.txt")
    (folder / "no-text").mkdir()
    assert "no-text" in fails(capsys, CALIBRATION, "compress", "tiny", "--calib", "no-text")


# --- output -----------------------------------------------------------------------------------------------------------


def snapshot(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_existing_output_is_refused_and_left_alone(capsys, artefact):
    before = snapshot(artefact)
    assert "--force" in run(capsys, "compress", "tiny", *QUICK, "--sparsity", "0.75").sentence(OUTPUT)
    assert snapshot(artefact) == before
    assert run(capsys, "compress", "tiny", *QUICK, "--sparsity", "0.75", "--force").code == 0
    assert snapshot(artefact) != before


def test_force_replaces_only_what_ssmc_wrote(capsys, folder):
    (folder / "ssmc-out").mkdir()
    (folder / "ssmc-out" / "thesis.tex").write_text("years of work")
    run(capsys, "compress", "tiny", *QUICK, "--force").sentence(OUTPUT)
    assert (folder / "ssmc-out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("parent", ["file", "/proc", "/sys/kernel"])
def test_output_where_nothing_can_be_written(capsys, folder, parent):
    if not (parent == "file" or Path(parent).is_dir()):
        pytest.skip(f"this system has no {parent}")
    (folder / "file").write_text("in the way")
    out = f"{parent}/ssmc-out"
    assert out in fails(capsys, OUTPUT, "compress", "tiny", *QUICK, "--out", out)


def test_an_existing_export_is_refused_and_left_alone(capsys, artefact):
    assert run(capsys, "export").code == 0
    before = snapshot(artefact)
    assert "--force" in run(capsys, "export").sentence(OUTPUT)
    assert snapshot(artefact) == before
    assert run(capsys, "export", "--force").code == 0
    assert snapshot(artefact) == before


# --- the steps in the wrong order -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "bench"])
@pytest.mark.parametrize("directory", [[], ["elsewhere"], [TINY_DIRECTORY]])
def test_nothing_was_compressed(capsys, command, directory):
    assert "ssmc compress" in fails(capsys, USAGE, command, *directory)


def test_bench_without_export(capsys, artefact):
    assert "ssmc export" in run(capsys, "bench").sentence(USAGE)


def test_export_of_an_export(capsys, artefact):
    assert run(capsys, "export").code == 0
    assert "export already" in run(capsys, "export", "ssmc-out/safetensors").sentence(USAGE)


def test_a_damaged_manifest(capsys, artefact):
    (artefact / "ssmc.json").write_text('{"schema": 1, "kind"')
    assert "ssmc.json" in run(capsys, "export").sentence(CHECKPOINT)
    (artefact / "ssmc.json").write_text("{}")
    assert "ssmc.json" in run(capsys, "export").sentence(CHECKPOINT)
    (artefact / "ssmc.json").write_text('{"schema": 1}')
    assert "lacks kind, source" in run(capsys, "export").sentence(CHECKPOINT)
    (artefact / "ssmc.json").write_text('{"schema": 1, "kind": "masked", "source": {}}')
    assert "lacks versions, config, dimensions, layers, removed" in run(capsys, "export").sentence(CHECKPOINT)


@pytest.mark.parametrize("command", ["export", "bench"])
@pytest.mark.parametrize("left", ['{"schema": 1}', '{"schema": 1, "kind": "masked"}'])
def test_a_manifest_with_parts_missing(capsys, artefact, command, left):
    (artefact / "ssmc.json").write_text(left)
    assert "ssmc.json" in run(capsys, command).sentence(CHECKPOINT)


def test_weights_changed_after_compressing(capsys, artefact):
    change_tensors(artefact, lambda tensors: tensors[X_PROJ].add_(1))
    assert "Layer 1" in run(capsys, "export").sentence(CHECKPOINT)
    assert not (artefact / "safetensors").exists()


# --- as its own process -----------------------------------------------------------------------------------------------


def test_a_real_process_prints_the_same_sentence(capsys, folder):
    outcome = run_process("compress", "tiny", "--sparsity", "-1", cwd=folder)
    assert outcome.sentence(USAGE) == fails(capsys, USAGE, "compress", "tiny", "--sparsity", "-1")
