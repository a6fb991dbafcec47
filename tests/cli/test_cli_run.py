"""The three commands as a stranger types them, and what happens when they are disturbed."""

import errno
import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch
import transformers

import ssmc
import ssmc.compressor.run
from ssmc.runtime.models.fast import use_stock_scan
from tests.support.commandline import SSMC, run, run_process

QUICK = ("--nsamples", "4", "--seqlen", "256")
QUICK_BENCH = (
    "--time-budget",
    "1",
    "--repeats",
    "2",
    "--lengths",
    "32,64",
    "--batch-sizes",
    "1",
    "--decode-tokens",
    "4",
)
QUICK_BENCH += ("--window", "256", "--max-windows", "2", "--no-stock")
NOTHING_WRITTEN = "Error: interrupted, nothing was written."


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The commands of the README, with less text and fewer timings, one after the other in an empty folder."""
    folder = tmp_path_factory.mktemp("empty")
    commands = {
        "compress": ("tiny", "--pattern", "column", "--sparsity", "0.5", *QUICK),
        "export": ("--format", "safetensors"),
        "bench": QUICK_BENCH,
    }
    outcomes = {name: run_process(name, *arguments, cwd=folder, COLUMNS="200") for name, arguments in commands.items()}
    return folder, outcomes


@pytest.mark.parametrize("command", ["compress", "export", "bench"])
def test_each_command_succeeds_and_says_nothing_on_stderr(story, command):
    _, outcomes = story
    assert outcomes[command].code == 0, outcomes[command].err
    assert outcomes[command].err == ""


def test_compress_says_what_it_did_and_what_comes_next(story):
    folder, outcomes = story
    manifest = json.loads((folder / "ssmc-out" / "ssmc.json").read_text())
    shown = outcomes["compress"].out
    memory, layers = re.split(r"\nStates *\n", shown)
    rows = [line.split("│") for line in layers.splitlines() if line.startswith("│")]
    assert "1 GiB beside the weights" in memory  # what it is for comes first
    assert [int(row[1]) for row in rows] == list(range(6))
    assert [int(row[2]) for row in rows] == [len(layer["kept"]) for layer in manifest["layers"]] == [8] * 6
    assert [float(row[4]) for row in rows] == pytest.approx([layer["error"] for layer in manifest["layers"]], rel=0.01)
    assert manifest["command"].startswith("ssmc compress tiny --pattern column --sparsity 0.5")
    assert shown.splitlines()[-1] == "Next: ssmc export --format safetensors"


def test_export_shows_cuts_difference_and_runtimes(story):
    folder, outcomes = story
    shown = outcomes["export"].words
    assert shown.count("x_proj 512 -> 48 => 512 -> 32") == 1  # one row for all six layers
    assert shown.count("A_log 512 x 16 => 512 x 8") == 1
    assert all(name in shown for name in ("transformers", "vLLM", "llama.cpp", "mlx-lm"))
    manifest = json.loads((folder / "ssmc-out" / "safetensors" / "ssmc.json").read_text())
    assert f"{manifest['comparison']['max_difference']:.2e}" in shown
    assert f"{manifest['parameters']:,}" in shown
    assert outcomes["export"].out.splitlines()[-1] == "Next: ssmc bench"


def test_bench_shows_and_writes_the_report(story):
    folder, outcomes = story
    report = json.loads((folder / "ssmc-out" / "bench.json").read_text())
    shown = outcomes["bench"].words
    for model in report["models"]:
        assert model["name"] in shown
        assert f"{model['parameters']:,}" in shown
        assert f"{model['perplexity']['ppl']:.5g}" in shown
    assert (folder / "ssmc-out" / "bench.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_stock_transformers_generates_from_the_export(story):
    folder, _ = story
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ssmc-out" / "safetensors", dtype=torch.float32)
    assert model.config.state_size == 8
    prompt = torch.tensor([[5, 17, 42]])
    assert model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 7)


def test_load_gives_the_same_model_with_the_fast_scan_and_its_tokenizer(story):
    folder, _ = story
    model, tokenizer = ssmc.load(folder / "ssmc-out" / "safetensors", dtype=torch.float32)
    tokens = tokenizer("Once upon a time there was a fox.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        fast, stock = model(tokens).logits, use_stock_scan(model)(tokens).logits
    assert tokens.shape[1] > 4
    torch.testing.assert_close(fast, stock, rtol=1e-4, atol=1e-4)
    plain, _ = ssmc.load(folder / "ssmc-out" / "safetensors", fast=False)
    assert plain.dtype == torch.float16
    mixers = [m.get_submodule("backbone.layers.0.mixer") for m in (plain, ssmc.load("tiny")[0])]
    assert ["forward" in vars(mixer) for mixer in mixers] == [False, True]  # an instance's own forward is the fast one


def test_what_the_user_should_know_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = run(capsys, "compress", "tiny", "--score", "magnitude", "--no-repair", "--sparsity", "0.25")
    assert "Note: 12 states is not a power of two" in outcome.out
    assert "not measured" in outcome.out


# --- how much is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("-q", "compress"), ("--quiet", "compress"), ("compress", "--quiet")])
def test_quiet_says_nothing(capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    before, after = arguments[: arguments.index("compress") + 1], arguments[arguments.index("compress") + 1 :]
    outcome = run(capsys, *before, "tiny", "--score", "magnitude", "--no-repair", *after)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (tmp_path / "ssmc-out" / "ssmc.json").is_file()


def test_quiet_still_says_what_went_wrong(capsys):
    assert "sparsity" in run(capsys, "--quiet", "compress", "tiny", "--sparsity", "2").sentence(2)


@pytest.mark.parametrize("arguments", [("--verbose", "compress", "./no"), ("compress", "./no", "-v")])
def test_verbose_shows_the_traceback_before_the_sentence(capsys, arguments):
    outcome = run(capsys, *arguments)
    assert outcome.code == 3
    assert "Traceback (most recent call last)" in outcome.err
    assert "CheckpointError" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("Error: ")


# --- disturbances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, how):
    with subprocess.Popen(
        [SSMC, "compress", "tiny"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as p:
        assert p.stdout.readline().startswith(b"Removing 0.5")  # torch is loaded, the work begins
        time.sleep(2)
        p.send_signal(how)
        _, err = p.communicate(timeout=120)
    assert p.returncode == 130
    assert err.decode().splitlines()[-1:] == [NOTHING_WRITTEN]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_closed_pipe_is_no_error(tmp_path, option):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([SSMC, option], cwd=tmp_path, env=buffered, **pipes) as p:
        p.stdout.close()
        assert p.stderr.read() == b""
    assert p.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_stdout_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([SSMC, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("shapes differ"), 1, "this is a bug in ssmc: ValueError: shapes differ."),
        (KeyError("kind"), 1, "this is a bug in ssmc: KeyError: 'kind'."),
        (MemoryError(), 1, "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "memory ran out"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 5, "(x.bin): No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 1, "Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted, nothing was written."),
    ],
)
def test_what_nobody_foresaw_is_one_line_as_well(capsys, monkeypatch, error, code, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ssmc.compressor.run, "compress", fail)
    outcome = run(capsys, "compress", "tiny")
    assert outcome.code == code
    (line,) = outcome.err.splitlines()
    assert said in line
    assert ("--verbose" in line) == ("bug" in line)


def test_the_wide_world_needs_no_terminal(tmp_path):
    """No stdin, no locale, no home that can be written: as in a container."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/nonexistent"}
    done = subprocess.run([SSMC, "--help"], env=environment, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_option_of_0_1_is_read_by_its_old_name_with_a_note(capsys, tmp_path):
    done = run(
        capsys, "compress", "tiny", "--target", "ssm", "--score", "magnitude", "--no-repair", "--out", tmp_path / "out"
    )
    assert done.code == 0
    assert "Note: The option target is now called scope" in done.words
    assert "scope: ssm" in (tmp_path / "out" / "recipe.yaml").read_text()
