"""Peak memory of running a model, each in a fresh process: a process's high-water mark never falls again.

`python -m ssmc.runtime.bench.memory '{"source": ...}'` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .workloads import decode, prefill

DECODE_STEPS = 4


@dataclass(frozen=True)
class MemoryTask:
    """What the fresh process does: load `source`, prefill (prefill_batch, length), decode with decode_batch."""

    source: str
    device: str
    dtype: str  # "float32"
    length: int
    prefill_batch: int
    decode_batch: int
    backend: str


@dataclass(frozen=True)
class Memory:
    """High-water marks in bytes, each including everything before it.

    On a CPU they are of the whole process's resident memory: Python, torch, transformers and numba's compiled code
    as well as weights, activations and pages of the weight files; nothing is subtracted. On CUDA they are what torch's
    allocator handed out (`reserved`: what it took from the GPU), without the CUDA context of some hundred MB.
    """

    libraries: int  # everything imported, no model yet
    loaded: int  # the most while loading
    peak: int  # the most while loading, prefilling and decoding
    reserved: int | None  # CUDA only

    @property
    def above_libraries(self) -> int:
        """What the model added to a process that had everything imported."""
        return self.peak - self.libraries


class MemoryProcessError(Exception):
    """The process ended without an answer; the message says how."""


def measure_memory(task: MemoryTask) -> Memory:
    """Run `task` in a fresh process.

    Raises:
        MemoryProcessError: it failed or was killed, most likely for lack of memory.
    """
    if Path(task.source).exists():
        task = replace(task, source=str(Path(task.source).resolve()))
    command = [sys.executable, "-m", "ssmc.runtime.bench.memory", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise MemoryProcessError(f"it was ended by signal {-done.returncode}, most likely for lack of memory")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        raise MemoryProcessError(lines[-1] if lines else f"exit code {done.returncode}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def run_task(task: MemoryTask) -> Memory:
    """Do the work in this process and read its marks."""
    from ..checkpoints import load_checkpoint
    from ..fast import use_fast_scan

    device = torch.device(task.device)
    high_water = _resident_peak if device.type == "cpu" else torch.cuda.max_memory_allocated
    libraries = high_water()
    model = use_fast_scan(
        load_checkpoint(task.source, dtype=getattr(torch, task.dtype)).model.to(device), backend=task.backend
    )
    loaded = high_water()
    prefill(model, task.prefill_batch, task.length)()
    step = decode(model, task.decode_batch)
    for _ in range(DECODE_STEPS):
        step()
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Memory(libraries=libraries, loaded=loaded, peak=high_water(), reserved=reserved)


def _resident_peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: Linux starts it at what the parent had resident when it forked
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return _ru_maxrss()


def _ru_maxrss() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def main(argument: str, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Run the task given as JSON and write the answer as one line of JSON."""
    write(json.dumps(asdict(run_task(MemoryTask(**json.loads(argument))))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
