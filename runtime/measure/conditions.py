"""What a measurement was taken on: enough to judge and repeat it, nothing that says whose machine it was."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from ssmc.runtime.versions import versions


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as nvidia-smi reports it; what it does not tell is None."""

    name: str
    memory_bytes: int
    compute_capability: str  # "9.0"
    driver: str | None
    cuda: str | None  # version torch was built for
    power_limit_w: float | None
    sm_clock_mhz: float | None  # at the time of asking
    max_sm_clock_mhz: float | None
    memory_clock_mhz: float | None  # at the time of asking
    power_draw_w: float | None  # likewise


@dataclass(frozen=True)
class Conditions:
    """The machine and the software of one run. Host and user names are left out on purpose."""

    date: str  # ISO 8601, UTC, when the run ended
    system: str  # "Linux x86_64"
    python: str
    versions: dict[str, str]  # ssmc, torch, transformers, ...
    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    torch_threads: int
    numba_threads: int  # at most; our scan takes as many as torch has
    memory_bytes: int
    load_average: tuple[float, float, float] | None  # over 1, 5 and 15 minutes, before the run
    device: str  # "cpu" or "cuda"
    dtype: str  # of weights and activations, "float32"
    gpu: Gpu | None


def conditions(device: torch.device, dtype: torch.dtype, load_before: tuple[float, float, float] | None) -> Conditions:
    """Read the conditions now, except for the load, which is that of before the run."""
    import numba  # slow to import. Its get_num_threads would start its threads and set torch's number to theirs

    return Conditions(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions(),
        cpu=_cpu_model(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        torch_threads=torch.get_num_threads(),
        numba_threads=numba.config.NUMBA_NUM_THREADS,
        memory_bytes=psutil.virtual_memory().total,
        load_average=load_before,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        gpu=_gpu(device) if device.type == "cuda" else None,
    )


def busy_note(load: tuple[float, float, float] | None) -> list[str]:
    """What to say where more was going on before the run than the machine has cores for."""
    cores = psutil.cpu_count()
    if load is None or cores is None or load[0] <= 1.25 * cores:
        return []
    return [
        f"The machine was busy when this began (load {load[0]:.1f} on {cores} cores). If it stayed so, the timings are "
        "longer and less certain than they need be."
    ]


def load_average() -> tuple[float, float, float] | None:
    """Processes that ran or wanted to, over 1, 5 and 15 minutes; None where the system does not count them."""
    if not hasattr(os, "getloadavg"):
        return None
    one, five, fifteen = os.getloadavg()
    return round(one, 2), round(five, 2), round(fifteen, 2)


def _cpu_model() -> str:
    """The CPU's marketing name; Python knows it on no platform, Linux tells it in /proc, macOS by sysctl."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "cpu model"):
                return value.strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    fields = ("driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw")
    # nvidia-smi counts the GPUs of the machine, torch only the visible ones: the UUID says which one it is
    uuid = str(getattr(properties, "uuid", "0"))
    answer = _output(
        "nvidia-smi",
        f"--id={uuid if uuid.isdigit() or uuid.startswith('GPU-') else 'GPU-' + uuid}",
        "--query-gpu=" + ",".join(fields),
        "--format=csv,noheader,nounits",
    )
    values = [value.strip() for value in answer.split(",")]
    if len(values) != len(fields):
        values = [""] * len(fields)
    return Gpu(
        name=properties.name,
        memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=values[0] or None,
        cuda=torch.version.cuda,
        power_limit_w=_number(values[1]),
        sm_clock_mhz=_number(values[2]),
        max_sm_clock_mhz=_number(values[3]),
        memory_clock_mhz=_number(values[4]),
        power_draw_w=_number(values[5]),
    )


def _output(*command: str) -> str:
    """What a command prints, or nothing where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
