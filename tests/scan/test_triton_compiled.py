"""The Triton kernels compiled for a GPU that need not be there: what their inner loops consist of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")

COMPILE = r"""
import re, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ssmc.runtime.errors import UsageError
from ssmc.runtime.scan import ScanInputs, selective_scan
from ssmc.runtime.scan.gpu import chunks, kernels, lanes, step
x = torch.ones(1, 2, 4)
inputs = ScanInputs(x, x, -torch.ones(4, 4), x, x, torch.ones(4))
assert selective_scan(inputs)[0].shape == x.shape
try:
    selective_scan(inputs, backend="triton")
except UsageError as error:
    print(error)
HALF = ("u_ptr", "dt_ptr", "z_ptr", "B_ptr", "C_ptr", "y_ptr", "x_ptr", "added_ptr", "window_ptr", "out_ptr")
UNKNOWN = ("B_ptr", "C_ptr", "B_token", "C_token")  # slices of wider rows: no alignment but what the launcher finds
def compiled(kernel, warps=1, **constants):
    names = kernel.arg_names
    types = {n: "*fp32" if n.endswith("_ptr") else "i32" for n in names} | {n: "*bf16" for n in HALF if n in names}
    types |= {"packed_ptr": "*bf16" if "B_ptr" in names else "*i32"}
    known = [n for n in names if n.endswith(("_ptr", "_batch", "_token")) or n in ("channels", "padded")]
    source = ASTSource(
        kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in known if n not in (*UNKNOWN, *constants)},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
def loops(ptx):
    ends = [(m.start(), m[1]) for m in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\w+);", ptx)]
    starts = [(ptx.find(label + ":"), end) for end, label in ends]
    return [ptx[start:end] for start, end in starts if 0 <= start < end]
def say(loop):
    exponentials = len(re.findall(r"ex2\.approx\.ftz\.f32", loop))
    print(exponentials, len(re.findall("bar.sync|shared", loop)), len(re.findall("shfl", loop)), end=" ")
    print(len(re.findall(r"ld\.global", loop)))
options = dict(PARTS=(8, 4), BLOCK=64, LANE=2, TOKENS=2, B_ALIGNED=16, C_ALIGNED=8, SOFTPLUS=True, GATED=True)
options |= dict(OVERLAP=False)
for mode in (chunks.ENDS, chunks.OUTPUTS):
    found = loops(compiled(chunks.chunk_kernel, MODE=mode.value, STARTED=mode is chunks.OUTPUTS, **options))
    say(max(found, key=len))
ones = dict(u_channel=1, dt_channel=1, z_channel=1)
runs = dict(V=4, RUNS=4, PAIRS=True)
flags = dict(AHEAD=True, SOFTPLUS=True, GATED=True, CONTINUES=False)
ptx = compiled(lanes.lanes_kernel, 4, CHANNELS=4, **runs, **flags, **ones)
say(min((loop for loop in loops(ptx) if "ex2" in loop), key=len))
# a stride or a size of 1 is a number for Triton, and has no type of a number
compiled(lanes.lanes_kernel, 1, CHANNELS=1, **runs, **flags, **ones, channels=1, u_token=1, dt_token=1, z_token=1)
states = options | dict(MODE=chunks.STATES.value, SOFTPLUS=False, GATED=False, STARTED=True)
compiled(chunks.chunk_kernel, **states)
compiled(chunks.carry_kernel, 4, CONTINUES=True, BLOCK=32, GROUP=64, OVERLAP=False)
overlapping = options | dict(OVERLAP=True, MODE=chunks.OUTPUTS.value, STARTED=True)
for ptx in (
    compiled(chunks.chunk_kernel, **overlapping),
    compiled(chunks.carry_kernel, 4, CONTINUES=False, BLOCK=32, GROUP=64, OVERLAP=True),
):
    before, after = ptx.split("griddepcontrol.wait")
    print(before.count("ld.global"), before.count("st.global"), after.count("st.global") > 0)
ones = dict(B_state=1, C_state=1)
compiled(lanes.pack_kernel, 4, **runs, STATES=16, POSITIONS=128, **ones)
whole = dict(BLOCK=64, SOFTPLUS=False)
compiled(kernels.token_kernel, PARTS=(8, 4), STATES=12, WHOLE=False, GATED=False, LOG_RATES=True, **whole)
compiled(kernels.moments_kernel, PART=16, GATED=True, STARTED=True, **whole)
compiled(step.conv_token_kernel, 4, WIDTH=4, BIASED=True, BLOCK=256)
compiled(step.rms_norm_kernel, 2, ADDED=True, AS_WEIGHT=True, BLOCK=512)
compiled(kernels.conv_kernel, WIDTH=4, TOKENS=16, BLOCK=128, BIASED=True, CONTINUES=True)
"""


@pytest.fixture(scope="module")
def without_interpreter() -> list[str]:
    """What a Python without TRITON_INTERPRET says: to a scan on the CPU, and of each compiled kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_scan_on_the_cpu_is_refused(without_interpreter):
    assert without_interpreter[0].startswith("The triton scan cannot run here: its kernels need a GPU and the tensors")


def test_chunks_need_one_exponential_a_state_and_only_registers(without_interpreter):
    """12 states and softplus, in the second pass the gate as well, for two tokens of two channels a lane: no shared
    memory, no word to another lane, and rows of B and C in as few loads as their alignment allows."""
    assert without_interpreter[1] == f"{2 * 2 * 13} 0 0 {2 * (2 + 2)}"
    assert without_interpreter[2] == f"{2 * 2 * 14} 0 0 {2 * (3 + 2 + 3)}"


def test_lanes_need_one_exponential_a_token_and_state_and_one_for_the_lane(without_interpreter):
    """A turn of the loop over states, 16 tokens a lane: five shuffles of a pair and one of the state before the lane;
    B and C in four loads, a decay rate, a state."""
    assert without_interpreter[3] == f"{16 + 1} 0 {2 * 5 + 1} 6"


def test_kernels_that_overlap_load_before_they_wait_and_write_after(without_interpreter):
    """The second pass asks for two tokens of u, dt and z, for bias, D and 12 rates of two channels; the sums over
    chunks for rates of 16 lanes, each number once."""
    assert without_interpreter[4].split()[1:] == ["0", "True"]
    assert int(without_interpreter[4].split()[0]) >= 2 * 3 + 2
    assert without_interpreter[5].split()[1:] == ["0", "True"]
