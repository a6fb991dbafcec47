"""Sums over a Mamba-2's states from Triton's kernel against the states themselves; see `test_triton`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.contributions import Contributions
from ssmc.compressor.methods.states.statistics import SquaredReadout, SquaredStates
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.scan import ssd_moments
from tests.families.test_mamba2 import random_inputs, random_state
from tests.support.families import FAMILIES
from tests.support.models import random_mamba2
from tests.support.pruning import job_of

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
pytest.importorskip("ssmc.runtime.scan.gpu")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT = 2e-6 if DEVICE.type == "cpu" else 5e-5


def difference(got: torch.Tensor, wanted) -> float:
    """||difference|| relative to ||wanted||."""
    wanted = torch.as_tensor(wanted)
    assert got.shape == wanted.shape
    return float((got.cpu().double() - wanted.double()).norm() / wanted.double().norm())


def all_states(inputs, state):
    """h before every token and after the last, (B, L + 1, H, P, N) float64."""
    u, dt, A, B = (getattr(inputs, name).double().numpy() for name in ("u", "dt", "A", "B"))
    u = u.reshape(*dt.shape, -1)
    h = [state.double().numpy()]
    for t in range(dt.shape[1]):
        drive = (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]  # one group: B (B, 1, 1, N)
        h.append(np.exp(dt[:, t] * A)[..., None, None] * h[-1] + drive)
    return np.stack(h, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 2, "length": 37, "heads": 2, "head_dim": 3, "d_state": 12},
        {"batch": 1, "length": 70, "heads": 1, "head_dim": 18, "d_state": 70},  # three pairs of tiles, one not full
    ],
    ids=str,
)
def test_sums_are_those_of_the_states(sizes):
    inputs = random_inputs(groups=1, **sizes)
    state = random_state(inputs)
    gain = torch.rand(inputs.u.shape, generator=torch.Generator().manual_seed(4))
    moved = replace(inputs, **{k: t.to(DEVICE) for k, t in vars(inputs).items() if isinstance(t, torch.Tensor)})
    got = ssd_moments(moved, gain.to(DEVICE), state.to(DEVICE), "triton")
    h, C = all_states(inputs, state), inputs.C.double().numpy()[:, :, 0]
    gains, u = (t.double().numpy().reshape(*inputs.dt.shape, -1) for t in (gain, inputs.u))
    read = h[:, 1:] * C[:, :, None, None]  # (B, L, H, P, N)
    x = read * gains[..., None]
    by_channel = {"before": h[:, :-1], "after": h[:, 1:], "readouts": read}
    for name, values in by_channel.items():
        assert difference(getattr(got, name), (values**2).sum((0, 1)).reshape(-1, inputs.d_state).T) < EXACT, name
    assert difference(got.state, h[:, -1]) < EXACT
    assert difference(got.readers, (C**2).sum((0, 1))) < EXACT
    assert difference(got.gram, np.einsum("blhpn,blhpm->nm", x, x)) < EXACT
    assert difference(got.cross, np.einsum("blhpn,blhp->hn", x, gains * u)) < EXACT
    assert difference(got.skip, ((gains * u) ** 2).sum((0, 1, 3))) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba2", "falcon_h1", "falcon_h1 normed"])
def test_calibration_takes_the_sums_where_it_took_the_states(family):
    if family == "mamba2":
        model = random_mamba2(num_heads=4, head_dim=12)
    else:
        model = FAMILIES["falcon_h1"](mamba_rms_norm="normed" in family)
    architecture = architecture_for(model.config.model_type)
    block = copy.deepcopy(architecture.blocks(model)[0])
    hidden = torch.randn(2, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    heads = architecture.dimensions(model.config).heads // 2

    def collected(backend: str) -> list[torch.Tensor]:
        squares, readout, contributions = SquaredStates(), SquaredReadout(), Contributions(heads)
        block.to(DEVICE if backend == "triton" else "cpu")
        statistics = [squares, readout, contributions]
        weights = torch.linspace(1, 4, 22).view(2, 11)
        collect(job_of(architecture, block, hidden), statistics, group=1, backend=backend, weights=weights)
        found = [squares.value, readout.states, readout.readers, readout.products]
        return [*found, contributions.gram, contributions.cross, contributions.skip]

    for got, wanted in zip(collected("triton"), collected("cpu"), strict=True):
        assert difference(got, wanted) < 10 * EXACT


def test_what_has_no_kernel_is_refused():
    inputs = random_inputs(length=2)
    there = {name: t.to(DEVICE) for name, t in vars(inputs).items() if isinstance(t, torch.Tensor)}
    with pytest.raises(UsageError, match="need a GPU"):
        ssd_moments(inputs, inputs.u, backend="cpu")
    with pytest.raises(ValueError, match="one group"):
        ssd_moments(replace(inputs, **there), there["u"], backend="triton")
