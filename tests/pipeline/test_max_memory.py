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
    "a goal": ("--target-params", "0.8", "--max-ppl-increase", "5"),
}


def run(*arguments):
    """Exit code, what was said, and MiB resident at most."""
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True)
    return done.returncode, " ".join(done.stderr.split()), int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say how much was resident")
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_the_least_that_is_named_is_enough(tmp_path, options):
    common = ["compress", "tiny", "--nsamples", "8", "--seqlen", "256", "--quiet", "--out", str(tmp_path / "out")]
    code, said, _ = run(*common, *options, "--max-memory", "100MB")
    assert code == 2
    least = re.search(r"at least (\d+)MiB", said)[1]
    assert not (tmp_path / "out").exists()
    code, said, peak = run(*common, *options, "--max-memory", f"{int(least) + 16}MiB")  # no two starts are alike
    assert code == 0, said
    assert peak <= int(least) + 16
