"""Peak memory of running a model, each in a fresh process: a process's high-water mark never falls again.

`python -m ssmc.runtime.measure.memory '{"source": ...}'` is that process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from ssmc.runtime.measure.workloads import decode, decoding, prefill, random_tokens
from ssmc.runtime.models.generation import check_runtime, is_onnx_export, load_onnx_export
from ssmc.runtime.models.llama_cpp import is_gguf_export, load_gguf_export

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
    state_dtype: str = "float32"


@dataclass(frozen=True)
class Memory:
    """High-water marks in bytes, each including everything before it.

    On a CPU they are of the whole process's resident memory: Python, torch, transformers and numba's compiled code
    as well as weights, activations and pages of the weight files; nothing is subtracted. On CUDA they are what torch's
    allocator handed out (`reserved`: what it took from the GPU), without the CUDA context of some hundred MB.

    `steady` and `steady_reserved` are no high-water marks: what is held between two steps of decoding.
    """

    libraries: int  # everything imported, no model yet
    loaded: int  # the most while loading
    peak: int  # the most while loading, prefilling and decoding
    reserved: int | None  # CUDA only
    steady: int  # weights, and the states of the sequences of `decode_batch`
    steady_reserved: int | None  # CUDA only
    state: int  # of one sequence, as the model holds it: SSM states and convolution windows of all layers
    capacity: int  # for a model: CUDA: what the GPU has without its context; CPU: RAM available before loading
    sequence: int  # what one more sequence takes: CUDA: state and activations of a step, measured; CPU: its state

    weights: int  # all parameters, a tied head once

    @property
    def sequences(self) -> int:
        """How many sequences fit beside the weights while decoding."""
        return max(0, self.capacity - self.weights) // self.sequence

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
    command = [sys.executable, "-m", "ssmc.runtime.measure.memory", json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise MemoryProcessError(f"it was ended by signal {-done.returncode}, most likely for lack of memory")
    if done.returncode > 0:
        lines = done.stderr.strip().splitlines()
        raise MemoryProcessError(lines[-1] if lines else f"exit code {done.returncode}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def run_task(task: MemoryTask) -> Memory:
    """Do the work in this process and read its marks."""
    from ssmc.runtime.models.checkpoints import load_checkpoint
    from ssmc.runtime.models.fast import use_fast_scan

    if is_onnx_export(task.source):
        return _run_onnx_task(task)
    if is_gguf_export(task.source):
        return _run_gguf_task(task)
    device = torch.device(task.device)
    cuda = device.type == "cuda"
    high_water = torch.cuda.max_memory_allocated if cuda else _resident_peak
    libraries, available = high_water(), psutil.virtual_memory().available
    checkpoint = load_checkpoint(task.source, dtype=getattr(torch, task.dtype), codes=True)
    model = use_fast_scan(checkpoint.model.to(device), task.backend, task.state_dtype)
    loaded, weights = high_water(), sum(parameter.nbytes for parameter in model.parameters())
    prefill(model, task.prefill_batch, task.length)()
    step = decoding(model, task.decode_batch)
    for _ in range(DECODE_STEPS):
        step.run()
    peak, reserved = high_water(), torch.cuda.max_memory_reserved(device) if cuda else None
    state = sum(tensor.nbytes for tensor in step.states()) // task.decode_batch
    steady = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    steady_reserved = torch.cuda.memory_reserved(device) if cuda else None
    del step
    return Memory(
        libraries=libraries,
        loaded=loaded,
        peak=max(peak, steady),  # Linux counts pages a thread at a time, so that its mark can lag behind by some
        reserved=reserved,
        steady=steady,
        steady_reserved=steady_reserved,
        state=state,
        capacity=_capacity(device) if cuda else available,
        sequence=_sequence_on_gpu(model, task.decode_batch, device) if cuda else state,
        weights=weights,
    )


def _run_onnx_task(task: MemoryTask) -> Memory:
    """The same for an ONNX export on a CPU; onnxruntime, its threads and its arena are in all marks but the first."""
    check_runtime(task.device)
    libraries, available = _resident_peak(), psutil.virtual_memory().available
    export = load_onnx_export(task.source, task.device)
    loaded = _resident_peak()
    prefill(export.model, task.prefill_batch, task.length)()
    step = decode(export.model, task.decode_batch)
    for _ in range(DECODE_STEPS):
        step()
    # what a step reads and what it writes, keys and values of attention included
    state = 2 * (export.state_bytes + 4 * export.kept_per_token * task.length)
    steady = psutil.Process().memory_info().rss
    return Memory(
        libraries=libraries,
        loaded=loaded,
        peak=max(_resident_peak(), steady),
        reserved=None,
        steady=steady,
        steady_reserved=None,
        state=state,
        capacity=available,
        sequence=state,
        weights=export.weight_bytes,
    )


def _run_gguf_task(task: MemoryTask) -> Memory:
    """The same for a GGUF export, one sequence at a time; the marks are of llama.cpp's own process."""
    available = psutil.virtual_memory().available
    export = load_gguf_export(task.source, context=task.length + 2 * DECODE_STEPS)
    try:
        llama = export.model.llama
        export.model.time(random_tokens(export.model, 1, task.length), DECODE_STEPS)
        steady = llama.resident_bytes()
    finally:
        export.model.close()
    return Memory(
        libraries=llama.memory["before"],
        loaded=llama.memory["resident"],
        peak=steady,
        reserved=None,
        steady=steady,
        steady_reserved=None,
        state=export.state_bytes,
        capacity=available,
        sequence=export.state_bytes,
        weights=export.weight_bytes,
    )


def _capacity(device: torch.device) -> int:
    """What a GPU has for tensors: what is free and what torch's allocator holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _sequence_on_gpu(model: nn.Module, batch: int, device: torch.device) -> int:
    """Bytes that one more sequence takes at the highest point of a decoding step, from two batches."""
    peaks = []
    for size in (batch, 2 * batch):
        step = decoding(model, size, prompt=1)
        torch.cuda.reset_peak_memory_stats(device)
        step.run()
        peaks.append(torch.cuda.max_memory_allocated(device))
        del step
    return max(1, (peaks[1] - peaks[0]) // batch)


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
