"""The selective scan alone: our CPU kernel, our plain torch reference, and the loop transformers runs on CPU.

    python benchmarks/scan.py                                  # one Mamba-130M layer, 2048 tokens
    python benchmarks/scan.py --d-state 8 --json scan.json

All three read the same tensors, after softplus, and apply the skip and the gate. The contenders take turns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from reporting import as_json, print_conditions, print_timings, write_json
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.utils import logging

from ssmc.runtime.bench.timing import interleave
from ssmc.runtime.scan import ScanInputs, selective_scan


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--d-inner", type=int, default=1536)
    parser.add_argument("--d-state", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    now = print_conditions()
    with torch.no_grad():
        ways = contenders(layer_inputs(args.batch, args.length, args.d_inner, args.d_state))
        timings = interleave(ways, torch.device("cpu"), args.repeats, budget=300)
    sizes = f"B = {args.batch}, L = {args.length}, D = {args.d_inner}, N = {args.d_state}"
    print_timings(f"Selective scan, {sizes}", timings, "transformers")
    settings = {"batch": args.batch, "length": args.length, "d_inner": args.d_inner, "d_state": args.d_state}
    write_json(args.json, now, settings, {"scan": as_json(timings, "transformers")})


if __name__ == "__main__":
    main()
