"""Run the blocks of one page, in the order in which they stand there."""

from __future__ import annotations

import re
import shutil
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from ssmc.cli import main
from ssmc.compressor.options.config import configure
from ssmc.compressor.options.recipe import read_recipe
from ssmc.runtime.tiny import TINY_DIRECTORY, calibration_path, heldout_path
from tests.docs.blocks import LANGUAGES, ROOT, Block, blocks, small

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def lay_out(folder: Path) -> Path:
    """What a reader of the pages has: a model and texts."""
    shutil.copytree(TINY_DIRECTORY, folder / "my-model", ignore=shutil.ignore_patterns("*.py", "__*", "*.jsonl"))
    for name, source in (("my-text.jsonl", calibration_path()), ("my-heldout.jsonl", heldout_path())):
        lines = source.read_text(encoding="utf-8").splitlines()[:200]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_page(page: Path) -> None:
    """Run a page in the current folder, which `lay_out` has filled; a failed assertion says where."""
    names: dict[str, Any] = {"__name__": "page"}
    printed = None  # by a command that fails, as the page says
    outputs: dict[str, str] = {}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where} is not marked as one of {', '.join(LANGUAGES)}"
        for command in block.first:
            code, _, err = ssmc(command.split())
            assert code == 0, f"{block.where}: {command}\n{err}"
        if printed is not None and block.language == "text":
            assert " ".join(block.text.split()) == printed, f"{block.where} is not what is printed"
        printed = None
        if block.not_run is None:
            printed = run_block(block, names, outputs)
        if block.output_of is not None:
            check_output(block, outputs[block.output_of])


def run_block(block: Block, names: dict[str, Any], outputs: dict[str, str]) -> str | None:
    """Run one block; what its last command says where it fails as the page says."""
    if block.language == "bash":
        return run_commands(block, outputs)
    if block.language == "python":
        exec(compile(block.text, block.where, "exec", dont_inherit=True), names)
    elif block.language == "yaml":
        Path("block.yaml").write_text(block.text, encoding="utf-8")
        configure(**{"model": "tiny"} | read_recipe("block.yaml"))
    elif block.language == "toml":
        tomllib.loads(block.text)
    return None


def run_commands(block: Block, outputs: dict[str, str]) -> str | None:
    """Run a block's commands; the error of the last one where the page says that it fails."""
    commands = block.commands()
    for number, words in enumerate(commands):
        if words[0] != "ssmc":
            check_other(words, block)
            continue
        code, out, err = ssmc(words)
        outputs[words[1]] = out
        expected = block.exit_code if number == len(commands) - 1 else 0
        assert code == expected, f"{block.where}: {' '.join(words)}: {code}\n{out}\n{err}"
        if expected:
            return " ".join(err.split())
    return None


def check_output(block: Block, printed: str) -> None:
    """Every line of a block was printed, numbers and the widths of columns aside."""
    lines = set(map(_without_numbers, printed.splitlines()))
    for line in block.text.splitlines():
        assert line == "..." or _without_numbers(line) in lines, f"{block.where}: {line!r} is not what is printed"


def _without_numbers(line: str) -> str:
    words = re.sub(r"[┏┓┡┩└┘┳╇┴━─┃│]", " ", line)
    return " ".join(re.sub(r"\S*\d\S*", "#", words).split()).replace("# #", "#").replace("# #", "#")


def ssmc(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command at a small size."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(small(words))
    return code, out.getvalue(), err.getvalue()


def check_other(words: list[str], block: Block) -> None:
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


if __name__ == "__main__":
    run_page(Path(sys.argv[1]))
