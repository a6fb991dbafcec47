"""Imports go one way: cli -> exporters, compressor -> runtime; inside runtime down from level to level; never in a
circle between files. Those inside functions and under TYPE_CHECKING count.
"""

import ast
import subprocess
import sys
from functools import cache
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
        used -= {"cli"} if file.name == "__main__.py" else set()  # the same door by another name
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


# Inside runtime: files of a level import those of their own and of lower levels. The longest prefix that fits counts.
LEVELS = {
    "ssmc.runtime": 0,  # errors, files, progress, ...
    "ssmc.runtime.tiny": 0,
    "ssmc.runtime.scan": 1,
    "ssmc.runtime.models": 2,
    "ssmc.runtime.sparse24": 1,
    "ssmc.runtime.measure": 3,
    "ssmc.runtime.sparse24.use": 4,  # times both ways
    "ssmc.runtime.bench": 5,
    "ssmc.runtime.evaluation": 5,
}
# Inside compressor likewise. Its package itself registers the methods and is imported by everything in it.
STEPS = {
    "ssmc.compressor.options": 0,  # what a run is told
    "ssmc.compressor.calibration": 1,  # text, samples, where hidden states are
    "ssmc.compressor.methods": 2,  # what can be done to a layer
    "ssmc.compressor.plan": 3,
    "ssmc.compressor.pipeline": 3,  # the loop over layers
    "ssmc.compressor.families": 3,
    "ssmc.compressor.fit": 3,
    "ssmc.compressor.foreseen": 3,
    "ssmc.compressor.notes": 3,
    "ssmc.compressor.artefact": 3,
    "ssmc.compressor.records": 3,
    "ssmc.compressor.memory": 3,
    "ssmc.compressor.streaming": 3,  # layers come from files and go to files
    "ssmc.compressor.distillation": 3,  # the whole model, after its layers
    "ssmc.compressor.search": 4,  # a goal in place of a sparsity
    "ssmc.compressor.torch_module": 4,
    "ssmc.compressor.run": 5,
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the package by its full name, parsed."""
    found = {}
    for folder in ALLOWED:
        for file in source_files(folder):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            name = ".".join(parts if folder == "ssmc" else ("ssmc", *parts))
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


@cache
def homes() -> dict[str, str]:
    """Names that packages offer and import when they are used: "package.name" -> the module that has it."""
    found = {}
    for package, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOMES":
                table = node.value.args[0] if isinstance(node.value, ast.Call) else node.value
                for key, value in ast.literal_eval(table).items():
                    module, names = (key, value.split()) if key in modules() else (value, [key])
                    found |= {f"{package}.{name}": module for name in names}
    return found


def imports_of(tree: ast.AST) -> set[str]:
    """The files a file imports; a name that a package imports when it is used stands for the file that has it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                full = homes().get(full, full)
                found.add(full if full in modules() else node.module)
    return found & modules().keys()


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that all reach each other, by what each can reach."""
    reached = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            todo += (new := graph[todo.pop()] - seen)
            seen |= new
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return sorted(map(list, groups))


@cache
def graph() -> dict[str, set[str]]:
    return {name: imports_of(tree) - {name} for name, tree in modules().items()}


def test_there_is_no_circle_between_files():
    assert len(graph()) > 100
    assert circles(graph()) == []


def test_a_circle_would_be_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    inside = ast.parse("if TYPE_CHECKING:\n    from ssmc import benchmark\ndef f():\n    import ssmc.runtime.errors")
    assert imports_of(inside) == {"ssmc.runtime.bench", "ssmc.runtime.errors"}
    assert imports_of(ast.parse("from ssmc.runtime.bench import benchmark")) == {"ssmc.runtime.bench.run"}


def level(module: str, levels: dict[str, int] = LEVELS) -> int:
    """The level of a file of runtime, or of compressor."""
    return levels[max((p for p in levels if module == p or module.startswith(p + ".")), key=len)]


def room(module: str) -> str:
    return module.split(".")[2] if module.count(".") > 1 else ""


def test_inside_runtime_imports_go_down():
    wrong = []
    for module, imported in graph().items():
        for other in imported if module.startswith("ssmc.runtime") else ():
            beside = level(other) == level(module) == 5 and room(other) != room(module)
            if level(other) > level(module) or beside:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_inside_compressor_imports_go_down():
    inside = {name: imported for name, imported in graph().items() if name.startswith("ssmc.compressor.")}
    assert len(inside) > 40
    wrong = [
        f"{module} imports {other}"
        for module, imported in inside.items()
        for other in imported & inside.keys()
        if level(other, STEPS) > level(module, STEPS)
    ]
    assert not wrong


def test_options_load_no_torch():
    program = "import sys, ssmc.compressor, ssmc.compressor.options.goal; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
