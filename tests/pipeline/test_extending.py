"""Scores and methods from outside the package, through the public registry: what docs/extending.md shows, run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmc.compressor.methods.registry import load_entry_points, register_method, register_score
from ssmc.compressor.methods.states.method import States
from ssmc.compressor.methods.states.score import StateScore

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def run_in(folder, program):
    """In a process of its own, as what is registered stays registered."""
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder in which the blocks of the page ran, one after the other; then the command line with its score."""
    folder = tmp_path_factory.mktemp("extended")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 4
    command = [
        "from ssmc.cli import main",
        "options = '--score state-energy --no-repair --nsamples 2 --seqlen 64 --out by-command'",
        "assert main(['compress', 'tiny', *options.split()]) == 0",
    ]
    done = run_in(folder, "\n".join([*blocks, *command]))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_page_runs_and_its_score_decides(extended):
    from ssmc.runtime.manifest import read_manifest

    folder, shown = extended
    manifest = read_manifest(folder / "with-my-score")
    assert manifest.config["score"] == "state-energy"
    assert all(len(layer.kept) == 8 for layer in manifest.layers)
    assert "score state-energy" in shown
    assert (folder / "by-command" / "recipe.yaml").read_text().count("state-energy") == 1


def test_the_method_of_the_page_did_what_it_says(extended):
    from ssmc.runtime.models.checkpoints import load_checkpoint

    tensors = load_checkpoint(extended[0] / "without-some-skips").tensors()
    skips = [tensor for name, tensor in tensors.items() if name.endswith("mixer.D")]
    assert skips
    assert all(int((skip == 0).sum()) == round(0.25 * len(skip)) for skip in skips)
    assert all(torch.isfinite(skip).all() for skip in skips)


def test_a_name_that_is_taken_is_refused():
    class Other(StateScore):
        name, help = "energy", "another score of that name"

    with pytest.raises(ValueError, match="there is a score 'energy' of column already"):
        register_score(Other)

    class OtherStates(States):
        pass

    with pytest.raises(ValueError, match="there is a method 'states' already"):
        register_method(OtherStates())


def test_a_package_whose_methods_cannot_be_imported_is_named(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ssmc.methods]\nmine = broken_scores\n")
    (tmp_path / "broken_scores.py").write_text("raise RuntimeError('out of date')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = load_entry_points()
    assert problem.startswith("The methods of broken_scores cannot be used (RuntimeError: out of date)")
