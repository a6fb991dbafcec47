"""The command line where everything goes well: help, versions, completion, the three commands."""

import inspect
import os
import platform
import shutil
import subprocess
import sys
from typing import get_args

import pytest
import torch

import ssmc
from ssmc.cli import options
from ssmc.cli.commands.bench import bench as bench_command
from ssmc.cli.commands.bench import numbers as parse_numbers
from ssmc.cli.commands.compress import compress as compress_command
from ssmc.cli.commands.export import export as export_command
from ssmc.compressor import CompressConfig, Goal
from ssmc.compressor.options.flags import flags_of
from ssmc.compressor.options.patterns import patterns, score_names
from ssmc.exporters import all_formats
from ssmc.runtime import errors
from ssmc.runtime.scan import BACKENDS
from tests.support.commandline import SSMC, run

HEAVY = {"torch", "transformers", "numba", "matplotlib", "pydantic_settings", "datasets"}


AXES = ("attention", "channel", "expert", "expert-width", "head", "head-dim", "layer", "mlp", "width")  # beside states


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


# --- help, version, completion ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_the_commands_in_order(capsys, arguments):
    outcome = run(capsys, *arguments)
    assert outcome.code == 0
    assert (
        0 < outcome.words.index("compress Prune") < outcome.words.index("export Make") < outcome.words.index("bench M")
    )


def test_help_documents_every_exit_code(capsys):
    help_text = run(capsys, "--help").words
    classes = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.SsmcError)]
    for code in {0, 130, *(c.exit_code for c in classes)}:
        assert f" {code}: " in help_text


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "compress",
            "MODEL --pattern --sparsity --score --repair --no-repair --round-to --calib --nsamples --seqlen --seed "
            "--tokenizer --device --out --force --verbose --quiet",
        ),
        ("export", "DIR --format --out --force --verbose --quiet"),
        (
            "bench",
            "DIR --dense --model --lengths --batch-sizes --decode-tokens --repeats --time-budget --device --dtype "
            "--backend --runtime --stock --no-stock --text --tokenizer --window --max-windows --out --verbose --quiet",
        ),
    ],
)
def test_help_of_a_command_explains_every_option_and_gives_examples(capsys, command, options):
    help_text = run(capsys, command, "--help").words
    assert all(option in help_text for option in options.split())
    assert f"Examples ssmc {command}" in help_text


def test_version(capsys):
    outcome = run(capsys, "--version")
    assert outcome.code == 0
    assert outcome.out.startswith(f"ssmc {ssmc.__version__} (Python {platform.python_version()}, torch ")


def test_help_version_and_completion_load_nothing_heavy(empty):
    program = (
        "import os, sys, ssmc\n"
        "from ssmc.cli import main\n"
        "main(['--help']); main(['compress', '--help']); main(['--version'])\n"
        "os.environ.update(_SSMC_COMPLETE='complete_bash', COMP_WORDS='ssmc compress --score ', COMP_CWORD='3')\n"
        "main([])\n"
        f"print('HEAVY', sorted({HEAVY} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=empty, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ssmc ", {"compress", "distill", "export", "bench", "eval", "generate", "inspect", "push"}),
        ("ssmc compress ti", {"tiny", "tiny-mamba2", "tiny-hybrid"}),
        ("ssmc compress my", {"my-model/"}),
        ("ssmc compress tiny --pattern 2", {"2:4"}),
        ("ssmc compress tiny --pattern column+", {f"column+{axis}" for axis in AXES}),
        ("ssmc compress tiny --score spar", {"sparsegpt", "sparsessm", "sparsessm-l2", "sparsessm-vote"}),
        ("ssmc compress tiny --score column=ex", {"column=exact"}),
        ("ssmc compress tiny --device ", set(get_args(options.Device))),
        ("ssmc export --format ", set(all_formats())),
    ],
)
def test_completion(capsys, monkeypatch, tmp_path, typed, offered):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_SSMC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    outcome = run(capsys)
    assert set(outcome.out.split()) == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="this system has no bash")
def test_completion_installed_in_bash_completes(tmp_path):
    """All the way: bash sources what was installed, presses the key, and is offered the word."""
    install = f"'{SSMC}' --install-completion; exit $?"
    press = f"""source .bash_completions/ssmc.sh; PATH='{SSMC.parent}':$PATH
        COMP_WORDS=(ssmc exp); COMP_CWORD=1; _ssmc_completion ssmc; echo "${{COMPREPLY[@]}}" """
    for script, answer in ((install, "completion installed"), (press, "export")):
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer in done.stdout


# --- the words and defaults of the command line are those of the library ----------------------------------------------


def test_the_words_to_choose_from():
    assert get_args(options.Device) == get_args(CompressConfig.model_fields["device"].annotation)
    assert get_args(options.ScanBackend) == BACKENDS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in get_args(options.Dtype))


def test_the_defaults_of_export_and_bench():
    for command, function in ((export_command, ssmc.export), (bench_command, ssmc.benchmark)):
        typed, library = inspect.signature(command).parameters, inspect.signature(function).parameters
        for name in typed.keys() & library.keys() - {"lengths", "batch_sizes"}:
            assert str(typed[name].default) == str(library[name].default), name
    assert parse_numbers(typed["lengths"].default) == library["lengths"].default
    assert parse_numbers(typed["batch_sizes"].default) == library["batch_sizes"].default


def test_compress_has_every_option_of_a_run_and_of_a_goal_with_its_default():
    parameters = inspect.signature(compress_command).parameters
    for model in (CompressConfig, Goal):
        assert set(model.model_fields) - {"model"} <= set(parameters)
    typed = {name: parameters[name].default for name in CompressConfig.model_fields if name != "model"}
    assert CompressConfig(model="tiny", **typed) == CompressConfig(model="tiny")
    library = inspect.signature(ssmc.compress).parameters
    assert all(str(parameters[name].default) == str(library[name].default) for name in ("out", "force"))


def test_every_option_of_compress_is_explained(capsys):
    """The help text of each field stands in the help of the command, and the old names do not."""
    shown = run(capsys, "compress", "--help").words
    for model in (CompressConfig, Goal):
        for name, flag, _, _ in flags_of(model):
            first = flag.text.replace("`", "").split(". ")[0].split(", ")[0].split(":")[0]
            assert first in shown, name
    assert "--target " not in shown
    for name in (*patterns(), *score_names()):
        assert name in shown


# --- the Python interface ---------------------------------------------------------------------------------------------


def test_the_public_names():
    names = ["benchmark", "compress", "export", "generate", "load", "open_session", "push"]
    assert ssmc.__all__ == ["__version__", *names]
    assert set(ssmc.__all__) <= set(dir(ssmc))
    assert all(callable(getattr(ssmc, name)) for name in ssmc.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        ssmc.prune  # noqa: B018
