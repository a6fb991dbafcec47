"""What the Triton kernels of the scan compile to, without a GPU: registers, spills, and instructions.

    python benchmarks/gpu_kernels.py                       # for Hopper (sm_90)
    python benchmarks/gpu_kernels.py --capability 80       # for Ampere

A multiprocessor starts ordinary instructions for 128 lanes a cycle, but those of its special-function unit (MUFU: 2^x
and 1/x) for 16. So a loop that needs I instructions for 32 lanes, M of them special, takes at least max(I, 8 M) cycles
of a scheduler, of which there are 4. Nothing here is a measurement of time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmc.runtime.scan.gpu import chunks, lanes, parts_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SEQUENCES = ("u_ptr", "dt_ptr", "z_ptr", "B_ptr", "C_ptr", "y_ptr", "skip_ptr")
SLICES = ("B_ptr", "C_ptr", "B_token", "C_token")  # of wider rows: nothing is known of their alignment
SLOTS_PER_MUFU = 8  # cycles of a scheduler that one special-function instruction of a warp takes
LANES = 32  # of a warp


@dataclass(frozen=True)
class Loop:
    """A loop of one compiled kernel."""

    registers: int
    spilled: int  # bytes of stack
    instructions: Counter[str]  # of one turn

    def per(self, share: float) -> tuple[str, str, str, str]:
        """Instructions, cycles of the special-function unit, loads, shuffles and shared memory, over `share`."""
        counts = self.instructions
        moved = sum(counts[i] for i in ("SHFL", "BAR", "LDS", "STS", "LDSM", "STSM"))
        figures = (counts.total(), SLOTS_PER_MUFU * counts["MUFU"], counts["LDG"], moved)
        return tuple(f"{figure / share:.1f}" for figure in figures)


def compiled(
    kernel: triton.JITFunction, capability: int, types: dict[str, str], warps: int, **constants: object
) -> list[Loop]:
    """Compile a kernel and take apart its loops that compute exponentials, the longest first."""
    names = kernel.arg_names
    types = {name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    known = [n for n in names if n.endswith(("_ptr", "_batch", "_token")) or n in ("channels", "padded")]
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in known if n not in (*SLICES, *constants)},
    )
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (_output(tool, file.name) for tool in (["cuobjdump", "-res-usage"], ["nvdisasm"]))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    loops = sorted((loop for loop in _loops(code) if loop["MUFU"]), key=Counter.total, reverse=True)
    return [Loop(int(found[1]), int(found[2]), loop) for loop in loops]


def _output(tool: list[str], file: str) -> str:
    name, *options = tool
    return subprocess.run([TOOLS / name, *options, file], capture_output=True, text=True, check=True).stdout


def _loops(code: str) -> list[Counter[str]]:
    """The instructions of every loop: from a label to the branch back to it."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    found = []
    for end, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_\w+)\)", line)
        if target and labels.get(target[1], end + 1) <= end:
            body = lines[labels[target[1]] : end + 1]
            found.append(Counter(re.sub(r"^@!?U?P\w+\s+", "", each).split()[0].split(".")[0] for each in body))
    return found


def lanes_table(capability: int, dtype: str) -> Table:
    """The design with time along the lanes: what a token costs, and what a state of a token costs."""
    title = f"Time along the lanes, sm_{capability}, {dtype}, triton {triton.__version__}; per 32 lanes of one token"
    table = Table(title=title, title_justify="left")
    for column in ("", "registers", "spilled", "I", "8 M", "loads", "shuffles, shared"):
        table.add_column(column, justify="left" if not column else "right")
    ones = {"u_channel": 1, "dt_channel": 1, "z_channel": 1}
    flags = {"SOFTPLUS": True, "GATED": True, "CONTINUES": False, **ones}
    for channels, warps, tokens, wide in ((4, 4, 8, 0), (4, 4, 16, 0), (4, 4, 16, 1), (8, 4, 8, 0), (2, 2, 16, 0)):
        pairs = dtype == "bf16" and not wide
        vector = 8 if dtype == "fp16" and not wide else 4
        packed = "*i32" if pairs else "*fp32" if wide else f"*{dtype}"
        types = dict.fromkeys(SEQUENCES, f"*{dtype}") | {"packed_ptr": packed}
        options = {"CHANNELS": channels, "V": vector, "RUNS": tokens // vector, "PAIRS": pairs, "AHEAD": False, **flags}
        outer, inner = compiled(lanes.lanes_kernel, capability, types, warps, **options)
        share = tokens * channels / warps
        outer = Loop(outer.registers, outer.spilled, outer.instructions - inner.instructions)
        for what, loop in (("a state of a token", inner), ("a token", outer)):
            cut = f"{channels} channels, {warps} warps, {tokens} tokens a lane{', wide' if wide else ''}: {what}"
            table.add_row(cut, str(loop.registers), str(loop.spilled), *loop.per(share))
    return table


def chunks_table(capability: int, dtype: str) -> Table:
    """The design with channels along the lanes: both passes, all states of a token."""
    title = f"Chunks of time, sm_{capability}, {dtype}, triton {triton.__version__}; per 32 channels of one token"
    table = Table(title=title, title_justify="left")
    for column in ("pass", "N", "channels", "tokens", "registers", "spilled", "I", "8 M", "loads", "shared"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    types = dict.fromkeys(SEQUENCES, f"*{dtype}")
    for states in (16, 12, 8, 4, 2):
        for block, tokens in ((64, 2), (64, 4), (32, 4)):
            options = {"PARTS": parts_of(states), "BLOCK": block, "LANE": block // LANES, "TOKENS": tokens}
            options |= {"B_ALIGNED": 16, "C_ALIGNED": 8 if states == 12 else 16, "SOFTPLUS": True, "GATED": True}
            for name, mode in (("1", chunks.ENDS), ("2", chunks.OUTPUTS)):
                started = {"MODE": mode.value, "STARTED": mode is chunks.OUTPUTS, "OVERLAP": False}
                loop = compiled(chunks.chunk_kernel, capability, types, 1, **options, **started)[0]
                cells = (name, states, block, tokens, loop.registers, loop.spilled, *loop.per(block // LANES * tokens))
                table.add_row(*map(str, cells))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of u, dt, z, B, C and y")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, with which Triton compiles nothing. Unset it and try again.")
    for table in (lanes_table, chunks_table):
        Console(width=120).print(table(args.capability, args.dtype))


if __name__ == "__main__":
    main()
