"""Every command and every Python block of README.md, CONTRIBUTING.md and docs/ does what the page says it does."""

import json
import re
import shutil
import tomllib

import pytest

from ssmc.cli import main
from ssmc.compressor.options.config import configure
from ssmc.compressor.options.recipe import read_recipe
from ssmc.runtime.tiny import TINY_DIRECTORY, calibration_path, heldout_path
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, blocks, small

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture(scope="session")
def belongings(tmp_path_factory):
    """What a reader of the pages has: a model and texts."""
    folder = tmp_path_factory.mktemp("belongings")
    shutil.copytree(TINY_DIRECTORY, folder / "my-model", ignore=shutil.ignore_patterns("*.py", "__*", "*.jsonl"))
    for name, source in (("my-text.jsonl", calibration_path()), ("my-heldout.jsonl", heldout_path())):
        lines = source.read_text(encoding="utf-8").splitlines()[:200]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page, belongings, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(belongings, tmp_path / "page")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names, failed = {"__name__": "page"}, None
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where} is not marked as one of {', '.join(LANGUAGES)}"
        for command in block.first:
            assert main(small(command.split())) == 0, f"{block.where}: {command}"
        if failed is not None and block.language == "text":
            assert " ".join(block.text.split()) == failed, f"{block.where} is not what is printed"
        failed = None
        if block.not_run is not None:
            continue
        if block.language == "bash":
            failed = run_commands(block, capsys)
        elif block.language == "python":
            exec(compile(block.text, block.where, "exec"), names)
        elif block.language == "yaml":
            (folder / "block.yaml").write_text(block.text, encoding="utf-8")
            configure(**{"model": "tiny"} | read_recipe("block.yaml"))


def run_commands(block, capsys):
    """Run a block's commands; the error of the last one where the page says that it fails."""
    commands = block.commands()
    for number, words in enumerate(commands):
        if words[0] != "ssmc":
            check_other(words, block)
            continue
        capsys.readouterr()
        code = main(small(words))
        captured = capsys.readouterr()
        expected = block.exit_code if number == len(commands) - 1 else 0
        assert code == expected, f"{block.where}: {' '.join(words)}: {code}\n{captured.out}\n{captured.err}"
        if expected:
            return " ".join(captured.err.split())
    return None


def check_other(words, block):
    """Commands of other programs are not run: they install things or take minutes. What they name must be there."""
    if words[0] == "make":
        assert all(word in TARGETS for word in words[1:] if "=" not in word), f"{block.where}: {words}"
    elif words[:2] == ["python", "-m"]:
        path = ROOT / f"{words[2].replace('.', '/')}.py"
        assert path.is_file() or words[2] in ("pytest", "venv"), f"{block.where}: {words[2]} is not there"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), f"{block.where}: {words[1]} is not there"
    elif words[:2] == ["pip", "install"]:
        extras = {extra for word in words for extra in re.findall(r"\[(.*?)\]", word)}
        assert {e for extra in extras for e in extra.split(",")} <= set(PROJECT["optional-dependencies"]), block.where
    else:
        assert words[0] in ("cd", "git", "hf", ".venv/bin/python"), f"{block.where}: who runs {words[0]}?"


def test_the_links_of_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10 * 1024


def test_figures_of_the_documentation_are_in_the_results():
    """A table on a page names its script; the JSON it names exists and is what the script writes."""
    named = {name for page in PAGES for name in re.findall(r"benchmarks/results/[\w/]+\.json", page.read_text("utf-8"))}
    assert named
    for name in named:
        assert json.loads((ROOT / name).read_text(encoding="utf-8")), name
