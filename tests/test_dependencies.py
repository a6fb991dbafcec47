"""Imports go one way: cli -> exporters, compressor -> runtime."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "runtime": {"runtime"},
    "compressor": {"compressor", "runtime"},
    "exporters": {"exporters", "runtime"},
    "cli": {"cli", "compressor", "exporters", "runtime"},
    "ssmc": {"compressor", "exporters", "runtime"},
}


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of all modules that a module of `package` imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def folders_of_ssmc(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("ssmc.")} & set(ALLOWED)


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    wrong = []
    files = source_files(folder)
    for file in files:
        parts = file.relative_to(ROOT).parent.parts
        package = ".".join(parts if folder == "ssmc" else ("ssmc", *parts))
        used = folders_of_ssmc(imported_modules(file.read_text(encoding="utf-8"), package))
        wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in sorted(used - ALLOWED[folder])]
    assert files
    assert not wrong


def test_the_top_level_names_are_only_imported_as_parts_of_ssmc():
    """`import runtime` would work in a checkout and fail for everybody who installed the wheel."""
    wrong = []
    for folder in (*ALLOWED, "tests", "benchmarks"):
        for file in source_files(folder):
            roots = {name.split(".")[0] for name in imported_modules(file.read_text(encoding="utf-8"), "ssmc.x.y.z")}
            wrong += [f"{file.relative_to(ROOT)} imports {name}" for name in sorted(roots & (set(ALLOWED) - {"ssmc"}))]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "used"),
    [
        ("from ..errors import SsmcError", {"runtime"}),
        ("from ... import cli", {"cli"}),
        ("from ssmc import compressor", {"compressor"}),
        ("def f():\n    import ssmc.exporters.pipeline", {"exporters"}),
        ("import torch.nn", set()),
    ],
)
def test_every_way_to_import_is_seen(line, used):
    assert folders_of_ssmc(imported_modules(line, "ssmc.runtime.scan")) == used
