"""What a newcomer waits for: commands that only look at options and paths must not load what takes seconds to load."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "numba",
    "matplotlib",
    "lm_eval",
    "onnx",
    "onnxruntime",
    "triton",
    "datasets",
    "scipy",
)

RUN = """
import sys
from ssmc.cli import main
for arguments in ARGUMENTS:
    main(arguments)
    loaded = [name for name in HEAVY if name in sys.modules]
    print("LOADED", arguments, loaded)
"""


def loaded_by(folder, commands):
    """Which heavy packages each command loads, all run in one process of their own, one after the other."""
    source = RUN.replace("ARGUMENTS", repr(commands)).replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", source], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("LOADED")]


@pytest.mark.parametrize(
    "commands",
    [
        [
            ["--help"],
            *([name, "--help"] for name in ("inspect", "compress", "distill", "export", "bench", "eval", "generate")),
        ],
        [
            ["compress", "tiny", "--sparsity", "2"],
            ["compress", "tiny", "--pattern", "checkers"],
            ["compress", "tiny", "--score", "best"],
            ["compress", "tiny", "--target-params", "2"],
            ["compress", "tiny", "--recipe", "nowhere.yaml"],
            ["compress", "tiny", "--out", "occupied"],
            ["compress", "tiny", "--speed", "9"],
            ["shrink"],
        ],
        [
            ["inspect", "nowhere"],
            ["compress", "nowhere"],
            ["export", "nowhere"],
            ["export", "nowhere", "--format", "onnx"],
            ["bench", "nowhere"],
            ["bench", "--model", "nowhere"],
            ["eval", "nowhere"],
            ["eval"],
            ["generate", "nowhere", "Once"],
            ["distill", "nowhere"],
            ["export", "nowhere", "--format", "gguf"],
        ],
        [["inspect", "tiny"], ["inspect", "tiny-mamba2", "--json", "found.json"]],
    ],
    ids=["help", "options", "paths", "inspect"],
)
def test_what_only_looks_loads_nothing_heavy(tmp_path, commands):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "notes.txt").write_text("mine")
    lines = loaded_by(tmp_path, commands)
    assert lines == [f"LOADED {arguments} []" for arguments in commands]


def test_a_command_that_computes_is_seen_to_load_torch(tmp_path):
    """The test above would pass with a list of names that nothing ever loads."""
    assert "'torch', 'transformers'" in loaded_by(tmp_path, [["generate", "tiny", "Once", "--max-new-tokens", "1"]])[0]
