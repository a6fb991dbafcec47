"""The notebook of examples/ runs from its first cell to its last, without a network."""

import json

import matplotlib as mpl
import pytest

from tests.docs.blocks import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = {"__name__": "__main__"}
    with mpl.rc_context({"backend": "svg"}):
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), names)
    said = capsys.readouterr().out
    assert "bench.json bench.html" in said
    assert "Once upon a time" not in said.splitlines()[-1]  # what follows the prompt, not the prompt
    loss = names["loss"]
    for sparsity in (0.5, 0.75):
        assert loss["exact, repaired", sparsity] < loss["magnitude, no repair", sparsity]


def test_there_is_a_notebook():
    assert NOTEBOOKS
