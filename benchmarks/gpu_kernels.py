"""What the Triton kernels of the scan compile to, without a GPU: registers, spills, and instructions per token.

    python benchmarks/gpu_kernels.py                       # for Hopper (sm_90)
    python benchmarks/gpu_kernels.py --capability 80       # for Ampere

A multiprocessor starts ordinary instructions for 128 lanes a cycle, but those of its special-function unit (MUFU: 2^x
and 1/x) for 16. So a loop that needs I instructions for 32 channels of one token, M of them special, takes at least
max(I, 8 M) cycles of a scheduler, of which there are 4. Nothing here is a measurement of time.
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

from ssmc.runtime.scan.gpu import kernels, parts_of

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SEQUENCES = ("u_ptr", "dt_ptr", "z_ptr", "B_ptr", "C_ptr", "y_ptr")
SLOTS_PER_MUFU = 8  # cycles of a scheduler that one special-function instruction of a warp takes


@dataclass(frozen=True)
class Loop:
    """The loop over tokens of one compiled kernel."""

    registers: int
    spilled: int  # bytes of stack
    instructions: Counter[str]  # of one turn


def compiled(kernel: triton.JITFunction, capability: int, dtype: str, **constants: object) -> Loop:
    """Compile a kernel for tensors of `dtype` and take apart its longest loop."""
    names = kernel.arg_names
    types = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    types |= {name: f"*{dtype}" for name in SEQUENCES if name in names}
    aligned = [name for name in names if name.endswith(("_ptr", "_batch", "_token")) or name == "channels"]
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": 1, "enable_fp_fusion": True}).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (_output(tool, file.name) for tool in (["cuobjdump", "-res-usage"], ["nvdisasm"]))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Loop(int(found[1]), int(found[2]), max(_loops(code), key=Counter.total))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of u, dt, z, B, C and y")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set, with which Triton compiles nothing. Unset it and try again.")
    table = Table(
        title=f"Loops over tokens, sm_{args.capability}, {args.dtype}, triton {triton.__version__}",
        title_justify="left",
    )
    for column in ("pass", "N", "channels", "tokens", "registers", "spilled", "I", "8 M", "shared, shuffles"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for states in (16, 12, 8, 4, 2, 64):
        for block, tokens in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 1)):
            if states == 64 and block > 32:
                continue
            options = {"PARTS": parts_of(states), "BLOCK": block, "LANE": block // 32, "TOKENS": tokens}
            options |= {"WHOLE": True, "SOFTPLUS": True}
            more = {"GATED": True, "CONTINUES": False}
            for name, kernel, extra in (("1", kernels.chunk_ends_kernel, {}), ("2", kernels.scan_kernel, more)):
                loop = compiled(kernel, args.capability, args.dtype, **options, **extra)
                share = block // 32 * tokens
                counts = loop.instructions
                moved = sum(counts[i] for i in ("SHFL", "BAR", "LDS", "STS", "LDSM", "STSM"))
                issue, mufu = counts.total() / share, SLOTS_PER_MUFU * counts["MUFU"] / share
                cells = (
                    name,
                    states,
                    block,
                    tokens,
                    loop.registers,
                    loop.spilled,
                    f"{issue:.0f}",
                    f"{mufu:.0f}",
                    moved,
                )
                table.add_row(*map(str, cells))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
