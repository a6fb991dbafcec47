"""--max-memory is kept to, measured in processes of their own, or what is the least is said before anything is read."""

import re
import subprocess
import sys

import pytest

PEAK = (
    "import sys; from ssmc.cli import main; code = main(sys.argv[1:]); "
    "print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]); sys.exit(code)"
)
RUNS = {
    "layer by layer": ("--score", "energy", "--no-repair"),
    "with repair": (),
    "distilled": ("--distill", "2"),
    "whole layers": ("--pattern", "layer"),
    "width": ("--pattern", "width"),
    "a goal": ("--target-params", "0.8", "--max-ppl-increase", "5"),
}


def run(*arguments):
    """Exit code, what was said, and MiB resident at most."""
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split()), int(done.stdout.split()[-1]) / 1024


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the system does not say how much was resident"),
]


def assert_the_least_is_enough(out, *command):
    code, said, _ = run(*command, "--out", str(out), "--quiet", "--max-memory", "100MB")
    assert code == 2
    least = int(re.search(r"at least (\d+)MiB", said)[1]) + 16  # no two starts are alike
    assert not out.exists()
    code, said, peak = run(*command, "--out", str(out), "--quiet", "--max-memory", f"{least}MiB")
    assert code == 0, said
    assert peak <= least


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_of_compress(tmp_path, options):
    assert_the_least_is_enough(tmp_path / "out", "compress", "tiny", "--nsamples", "8", "--seqlen", "256", *options)


@pytest.mark.parametrize("format", ["safetensors", "onnx", "gguf"])
def test_of_export(tmp_path, format):
    pytest.importorskip({"onnx": "onnxruntime", "gguf": "gguf"}.get(format, "torch"))
    out = tmp_path / "out"
    assert run("compress", "tiny", "--score", "magnitude", "--no-repair", "--out", str(out))[0] == 0
    assert_the_least_is_enough(tmp_path / "exported", "export", str(out), "--format", format)
