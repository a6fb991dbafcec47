"""The wheel holds everything that runs and nothing else."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssmc

ROOT = Path(__file__).parent.parent
FOLDERS = {"ssmc": "ssmc", "cli": "ssmc/cli", "compressor": "ssmc/compressor"}
FOLDERS |= {"exporters": "ssmc/exporters", "runtime": "ssmc/runtime"}
LEFT_BEHIND = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc", "*.tmp", ".*")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the sources: a stale `build` folder of the checkout must not help."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=LEFT_BEHIND)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def source_files(source):
    """Path in the wheel of every file below the five folders."""
    for folder, target in FOLDERS.items():
        for file in (source / folder).rglob("*"):
            if file.is_file():
                yield f"{target}/{file.relative_to(source / folder).as_posix()}"


def test_the_wheel_holds_every_file_and_nothing_else(source, wheel):
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == set(source_files(source))


def test_every_folder_with_code_is_a_package(source):
    missing = [
        str(folder.relative_to(source))
        for top in FOLDERS
        for folder in (source / top, *(p for p in (source / top).rglob("*") if p.is_dir()))
        if any(folder.glob("*.py")) and not (folder / "__init__.py").is_file()
    ]
    assert not missing


def test_only_ssmc_is_installed(wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist()} - {"ssmc"}
    assert info == f"ssmc-{ssmc.__version__}.dist-info"


def test_the_embedded_model_is_inside(wheel):
    data = {Path(name).name for name in wheel.namelist() if name.startswith("ssmc/runtime/tiny/")}
    assert {"config.json", "model.safetensors", "tokenizer.json", "calibration.jsonl", "heldout.jsonl"} <= data
    for folder in ("tiny2", "tiny_hybrid"):
        other = {Path(name).name for name in wheel.namelist() if name.startswith(f"ssmc/runtime/{folder}/")}
        assert {"config.json", "model.safetensors"} <= other


def test_every_module_of_the_wheel_can_be_imported_on_its_own(wheel, tmp_path):
    """From the wheel alone, where no folder called `runtime` lies about."""
    wheel.extractall(tmp_path / "site")
    modules = [
        n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in wheel.namelist() if n[-3:] == ".py"
    ]
    if importlib.util.find_spec("triton") is None:  # an extra
        modules = [module for module in modules if not module.startswith("ssmc.runtime.scan.gpu")]
    program = f"import importlib, sys\nfor m in {modules}: assert 'site' in importlib.import_module(m).__file__, m"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_metadata(wheel):
    info = f"ssmc-{ssmc.__version__}.dist-info"
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert entry_points["console_scripts"]["ssmc"] == "ssmc.cli:main"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {ssmc.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(wheel.namelist())


def test_the_changelog_knows_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{ssmc.__version__}]" in text


def test_pins_are_exact_and_name_no_build_of_torch():
    """A local version such as +cpu would tie the pins to one machine's index."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)
