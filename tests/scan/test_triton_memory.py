"""Forward and gradients of both scans on a GPU take no more than twice the memory of the forward alone."""

from __future__ import annotations

import pytest
import torch

from ssmc.runtime.scan import ScanInputs, SsdInputs, selective_scan, ssd_scan
from tests.support.gpu import bytes_above, needs_cuda

LENGTH, D_INNER, HEAD_DIM = 2048, 1536, 64  # shapes of 130M
MAMBA1 = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
MAMBA2 = ("u", "dt", "A", "B", "C", "D")


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def mamba1(batch: int, d_state: int) -> ScanInputs:
    u, dt, z = (normal(batch, LENGTH, D_INNER) for _ in range(3))
    B, C = (normal(batch, LENGTH, d_state) for _ in range(2))
    A = -torch.rand(D_INNER, d_state, device="cuda") - 0.1
    return ScanInputs(u=u, dt=dt, A=A, B=B, C=C, D=normal(D_INNER), z=z, dt_bias=normal(D_INNER) - 4)


def mamba2(batch: int, d_state: int) -> SsdInputs:
    heads = D_INNER // HEAD_DIM
    B, C = (normal(batch, LENGTH, 1, d_state) for _ in range(2))
    dt = 0.1 * torch.rand(batch, LENGTH, heads, device="cuda")
    A, D = -torch.rand(heads, device="cuda") - 0.1, normal(heads)
    return SsdInputs(u=normal(batch, LENGTH, D_INNER), dt=dt, A=A, B=B, C=C, D=D)


@needs_cuda
@pytest.mark.parametrize(
    ("make", "scan", "names", "batch", "d_state"),
    [
        *((mamba1, selective_scan, MAMBA1, batch, n) for batch in (1, 8) for n in (16, 8)),
        *((mamba2, ssd_scan, MAMBA2, batch, n) for batch in (1, 8) for n in (128, 64)),
    ],
)
def test_gradients_take_twice_the_memory_of_the_forward_at_most(make, scan, names, batch, d_state):
    inputs = make(batch, d_state)
    tensors = [getattr(inputs, name) for name in names]
    weight = torch.ones_like(inputs.u)
    read = sum(tensor.nbytes for tensor in tensors)

    def forward():
        with torch.no_grad():
            scan(inputs)

    def train():
        torch.autograd.grad(scan(inputs)[0], tensors, weight)

    forward()  # what is compiled and chosen once
    alone = bytes_above(forward)
    for tensor in tensors:
        tensor.requires_grad_()
    train()
    assert (read + bytes_above(train)) / (read + alone) <= 2
