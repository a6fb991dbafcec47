"""Mixers with the parameters, attributes and arithmetic of mamba_ssm and mamba-minimal, one time step after the other,
and models around them that are no language models."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, INNER, STATES, RANK, TAPS, HEADS = 10, 16, 5, 3, 4, 4


def loop(u, dt, A, B, C, D):
    """y (B, L, D) of the recurrence, from the formula; A is (D, N), B and C are (B, L, N)."""
    h = u.new_zeros(len(u), *A.shape)
    rows = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        rows.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(rows, 1)


def convolve(conv1d, x):
    return conv1d(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class _Parts(nn.Module):
    """The parts of a Mamba-1."""

    def __init__(self, n=STATES):
        super().__init__()
        self.in_proj = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, TAPS, groups=INNER, padding=TAPS - 1)
        self.x_proj = nn.Linear(INNER, RANK + 2 * n, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.empty(INNER, n))
        self.D = nn.Parameter(torch.empty(INNER))
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def compute(self, x, z, sizes):
        u = F.silu(convolve(self.conv1d, x))
        dt, B, C = self.x_proj(u).split(sizes, dim=-1)
        y = loop(u, F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log), B, C, self.D)
        return self.out_proj(y * F.silu(z))


class MambaSsm(_Parts):
    """mamba_ssm.Mamba: sizes as plain attributes."""

    def __init__(self):
        super().__init__()
        self.d_model, self.d_inner, self.d_state, self.dt_rank, self.d_conv = WIDTH, INNER, STATES, RANK, TAPS
        self.activation, self.act = "silu", nn.SiLU()

    def forward(self, hidden_states, inference_params=None):
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        return self.compute(x, z, [self.dt_rank, self.d_state, self.d_state])


class Minimal(_Parts):
    """mamba-minimal's MambaBlock: sizes in `args`, which all blocks of a model share; N from A_log."""

    def __init__(self, args):
        super().__init__()
        self.args = args

    def forward(self, x):
        x, z = self.in_proj(x).split([self.args.d_inner, self.args.d_inner], dim=-1)
        n = self.A_log.shape[1]
        return self.compute(x, z, [self.args.dt_rank, n, n])


class HardCoded(_Parts):
    """Cannot run with another number of states."""

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.compute(x, z, [RANK, STATES, STATES])


class GatedNorm(nn.Module):
    """mamba_ssm's RMSNormGated, gate first."""

    def __init__(self, width, group_size):
        super().__init__()
        self.weight, self.eps, self.group_size = nn.Parameter(torch.empty(width)), 1e-5, group_size

    def forward(self, x, z=None):
        x = (x * F.silu(z)).unflatten(-1, (-1, self.group_size))
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight


class MambaSsm2(nn.Module):
    """mamba_ssm.Mamba2 with two groups."""

    def __init__(self):
        super().__init__()
        self.d_model, self.d_inner, self.d_ssm, self.d_state, self.d_conv = WIDTH, INNER, INNER, STATES, TAPS
        self.ngroups, self.nheads, self.headdim, self.dt_limit = 2, HEADS, INNER // HEADS, (0.0, float("inf"))
        channels = INNER + 2 * self.ngroups * STATES
        self.in_proj = nn.Linear(WIDTH, INNER + channels + HEADS, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, TAPS, groups=channels, padding=TAPS - 1)
        self.act = nn.SiLU()
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(HEADS)) for _ in range(3))
        self.norm = GatedNorm(INNER, INNER // self.ngroups)
        self.out_proj = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, u, seqlen=None):
        states, per = self.ngroups * self.d_state, self.nheads // self.ngroups
        z, xBC, dt = self.in_proj(u).split([self.d_ssm, self.d_ssm + 2 * states, self.nheads], dim=-1)
        x, B, C = self.act(convolve(self.conv1d, xBC)).split([self.d_ssm, states, states], dim=-1)
        dt, rows = F.softplus(dt + self.dt_bias), []
        for head in range(self.nheads):
            group = slice(head // per * self.d_state, (head // per + 1) * self.d_state)
            own = x[..., head * self.headdim : (head + 1) * self.headdim]
            A = -torch.exp(self.A_log[head]).expand(self.headdim, self.d_state)
            steps = dt[..., head, None].expand_as(own)
            rows.append(loop(own, steps, A, B[..., group], C[..., group], self.D[head]))
        return self.out_proj(self.norm(torch.cat(rows, -1), z))


class Bidirectional(nn.Module):
    """Reads a series forwards and backwards with the same mixers and puts out one number a series."""

    def __init__(self, mixers, width=WIDTH):
        super().__init__()
        self.embed, self.head = nn.Linear(2, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleDict({f"stage{i}": nn.ModuleList([mixer]) for i, mixer in enumerate(mixers)})

    def forward(self, series):
        x = self.embed(series)
        for (mixer,) in self.blocks.values():
            normed = F.rms_norm(x, x.shape[-1:])
            x = x + mixer(normed) + mixer(normed.flip(1)).flip(1)
        return self.head(x.mean(1))


def randomised(module, seed=0):
    """Parameters with no structure to hide behind."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            noise = torch.randn(tensor.shape, generator=g)
            if name.endswith(("A_log", "dt_bias", "dt_proj.bias", ".D")):
                tensor.copy_(0.6 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(1.2 * noise / math.sqrt(math.prod(tensor.shape[1:])))
    return module


def model_of(kind, count=2, seed=0):
    """A bidirectional model of mixers of one layout."""
    args = SimpleNamespace(d_inner=INNER, dt_rank=RANK, d_state=STATES, d_conv=TAPS)
    make = {"mamba_ssm": MambaSsm, "minimal": lambda: Minimal(args), "mamba_ssm-2": MambaSsm2, "hard": HardCoded}[kind]
    return randomised(Bidirectional([make() for _ in range(count)]), seed)


def series(count=4, batch=3, length=9, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, 2, generator=g) for _ in range(count)]
