"""Families are found by the names of their files and by nothing else; the rest of the package names none."""

import ast
import sys
from pathlib import Path

import pytest

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.architectures.interface import Architecture, HeadReaders, NormedReaders
from ssmc.runtime.models.families import architecture_for, families, find_family, model_types
from ssmc.runtime.registry import Registry

ROOT = Path(__file__).parent.parent.parent


def names_in(tree: ast.AST) -> list[str]:
    """The string literals of a file that are the name of a family."""
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [value for value in found if value in model_types()]


def test_no_other_file_names_a_family():
    found = {}
    for folder in ("runtime", "compressor", "exporters", "cli", "ssmc"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.parent != ROOT / "runtime/models/families" and (
                names := names_in(ast.parse(file.read_text(encoding="utf-8")))
            ):
                found[str(file.relative_to(ROOT))] = names
    assert found == {}
    assert names_in(ast.parse('if family == "mamba2": pass')) == ["mamba2"]


def test_every_file_of_the_folder_is_a_family():
    files = {file.stem for file in (ROOT / "runtime/models/families").glob("*.py")} - {"__init__"}
    assert files <= set(model_types())
    assert files <= {family.model_type for family in families()}
    assert len(files) >= 9


def methods(protocol: type) -> set[str]:
    """Everything that a protocol and those it is made of promise."""
    own = [base for base in protocol.__mro__ if base.__module__ == Architecture.__module__]
    return {name for base in own for name in (*vars(base), *base.__annotations__) if not name.startswith("_")}


OWN = [family for family in families() if type(family).__module__.startswith("ssmc.")]


@pytest.mark.parametrize("family", OWN, ids=lambda family: family.model_type)
def test_a_family_keeps_what_its_capabilities_promise(family):
    promised = methods(Architecture)
    promised |= methods(HeadReaders) if family.capabilities.heads else set()
    promised |= methods(NormedReaders) if family.capabilities.normed_readers else set()
    assert len(promised) > 30
    assert {name for name in promised if not hasattr(family, name)} == set()


def test_an_unknown_name_is_refused_and_never_imported(tmp_path):
    for name in ("llama", "__init__", "..checkpoints", "os", None):
        assert find_family(name) is None
    with pytest.raises(CheckpointError, match=r"model_type 'llama', ssmc knows bamba, .*zamba2"):
        architecture_for("llama", "x")


def test_things_from_outside_stand_beside_the_files_and_never_replace_them():
    registry = Registry("ssmc.runtime.models.families", "FAMILY")
    with pytest.raises(ValueError, match="mamba"):
        registry.register("mamba", object())
    mine = registry.register("mine", object())
    assert registry.find("mine") is mine
    assert registry.names() == tuple(sorted((*model_types(), "mine")))
    assert find_family("mine") is None


def test_an_installed_package_offers_a_family_by_an_entry_point(tmp_path, monkeypatch):
    """It is imported when it is asked for, and not before."""
    (tmp_path / "plug.py").write_text("from ssmc.runtime.registry import LOADED\nLOADED.register('plugged', 'mine')\n")
    about = tmp_path / "plug-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssmc.test-families]\nplugged = plug\nmamba = nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("ssmc.runtime.models.families", "FAMILY", group="ssmc.test-families")
    monkeypatch.setattr("ssmc.runtime.registry.LOADED", registry, raising=False)
    assert "plugged" in registry.names()
    assert "plug" not in sys.modules
    assert registry.find("plugged") == "mine"
    assert registry.find("mamba") is find_family("mamba")
