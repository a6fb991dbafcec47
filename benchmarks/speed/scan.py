"""The selective scan alone: our CPU kernel, our plain torch reference, and the loop transformers runs on CPU.

    python -m benchmarks.speed.scan  # one Mamba-130M layer, 2048 tokens
    python -m benchmarks.speed.scan --d-state 8 --json scan.json
    python -m benchmarks.speed.scan --gradients  # forward and backward, ours and the reference

All three read the same tensors, after softplus, and apply the skip and the gate. The contenders take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.utils import logging

from benchmarks.reporting import as_json, print_conditions, print_timings, write_json
from ssmc.runtime.measure.timing import interleave
from ssmc.runtime.scan import ScanInputs, SsdInputs, selective_scan, ssd_scan


def layer_inputs(batch: int, length: int, d_inner: int, d_state: int) -> ScanInputs:
    """Inputs with the strides of a real layer: z, B and C are slices of wider projections."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    low_rank = normal(batch, length, 48 + 2 * d_state)
    return ScanInputs(
        u=F.silu(normal(batch, length, d_inner)),
        dt=F.softplus(normal(batch, length, d_inner) - 4),
        A=-torch.arange(1.0, d_state + 1).repeat(d_inner, 1),
        B=low_rank[..., 48 : 48 + d_state],
        C=low_rank[..., 48 + d_state :],
        D=torch.ones(d_inner),
        z=normal(batch, length, 2 * d_inner)[..., d_inner:],
    )


def transformers_scan(inputs: ScanInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own function on the same inputs; its layout is (B, D, L), as transposed views (no copies)."""
    u, dt, B, C, z = (t.transpose(1, 2) for t in (inputs.u, inputs.dt, inputs.B, inputs.C, inputs.z))
    return mamba_selective_scan(u, dt, inputs.A, B, C, D=inputs.D, z=z, return_last_state=True)


def contenders(inputs: ScanInputs, reference: bool = True) -> dict:
    """What to time, by name; each has been checked against transformers."""
    ways = {"transformers": lambda: transformers_scan(inputs), "ours": lambda: selective_scan(inputs, backend="cpu")}
    if reference:
        ways["reference"] = lambda: selective_scan(inputs, backend="reference")
    wanted = transformers_scan(inputs)[0].transpose(1, 2)
    for name in ("ours", "reference") if reference else ("ours",):
        error = float((ways[name]()[0] - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, f"{name} differs from transformers by {error:.1e} relative"
    return ways


def ssd_layer_inputs(batch: int, length: int, heads: int, head_dim: int, d_state: int) -> SsdInputs:
    """Inputs of a Mamba-2 scan with the strides of a real layer: x, B and C are slices of what conv1d puts out."""
    generator = torch.Generator().manual_seed(0)
    d_inner = heads * head_dim
    conv = F.silu(torch.randn(batch, length, d_inner + 2 * d_state, generator=generator))
    u, B, C = conv.split([d_inner, d_state, d_state], dim=-1)
    return SsdInputs(
        u=u,
        dt=F.softplus(torch.randn(batch, length, heads, generator=generator) - 4),
        A=-torch.arange(1.0, heads + 1),
        B=B[:, :, None],
        C=C[:, :, None],
        D=torch.ones(heads),
    )


def ssd_contenders(inputs: SsdInputs) -> dict:
    """The scans of Mamba-2 by name: transformers' own, our kernel, and our chunks of matrix products."""
    u = inputs.u.unflatten(2, (inputs.heads, inputs.head_dim))

    def stock() -> tuple[torch.Tensor, torch.Tensor]:
        scanned = (u, inputs.dt, inputs.A, inputs.B, inputs.C)
        return mamba2_chunk_scan(*scanned, chunk_size=256, D=inputs.D, return_final_states=True)

    ways = {"transformers": stock, "ours": lambda: ssd_scan(inputs, backend="cpu")}
    ways["chunks"] = lambda: ssd_scan(inputs, backend="reference")
    wanted = stock()[0].flatten(2)
    for name in ("ours", "chunks"):
        error = float((ways[name]()[0] - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, f"{name} differs from transformers by {error:.1e} relative"
    return ways


def with_gradients(inputs: ScanInputs) -> dict:
    """Forward and backward of ours and of the reference, by name.

    Each has been checked against transformers on a few tokens; timing that is no use, since autograd through its loop
    over slices takes time and memory quadratic in the length.
    """

    def gradients(scan: Callable[[ScanInputs], tuple[torch.Tensor, torch.Tensor]], tokens: int) -> list[torch.Tensor]:
        cut = {n: t[:, :tokens] if t.dim() == 3 else t for n, t in vars(inputs).items() if t is not None}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in cut.items()}
        y, _ = scan(ScanInputs(**leaves))
        return torch.autograd.grad(y.square().sum(), list(leaves.values()))

    scans = {name: partial(selective_scan, backend=name) for name in ("reference", "cpu")}
    names = [name for name, tensor in vars(inputs).items() if tensor is not None]
    wanted = gradients(lambda i: (transformers_scan(i)[0].transpose(1, 2), None), 32)
    for name, scan in scans.items():
        for field, got, right in zip(names, gradients(scan, 32), wanted, strict=True):
            error = float((got - right).abs().max() / right.abs().max())
            assert error < 1e-4, f"the gradient of {field} by {name} differs from transformers by {error:.1e} relative"
    return {name: partial(gradients, scan, inputs.length) for name, scan in scans.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--d-inner", type=int, default=1536)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gradients", action="store_true", help="time forward and backward")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    now = print_conditions()
    inputs = layer_inputs(args.batch, args.length, args.d_inner, args.d_state)
    baseline = "reference" if args.gradients else "transformers"
    with torch.set_grad_enabled(args.gradients):
        ways = with_gradients(inputs) if args.gradients else contenders(inputs)
        timings = interleave(ways, torch.device("cpu"), args.repeats, budget=300)
    what = "Selective scan, forward and backward" if args.gradients else "Selective scan"
    sizes = f"B = {args.batch}, L = {args.length}, D = {args.d_inner}, N = {args.d_state}"
    print_timings(f"{what}, {sizes}", timings, baseline)
    settings = {name: getattr(args, name) for name in ("batch", "length", "d_inner", "d_state", "gradients")}
    write_json(args.json, now, settings, {"scan": as_json(timings, baseline)})


if __name__ == "__main__":
    main()
