"""States of Mamba-3 mixers in memory, against loops written from the formulas of the implementations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmc
from ssmc.compressor.torch_module.mamba3 import Units, choose
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.mamba3 import RULES, find_mamba3, read_sizes


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(1 + 0.3 * torch.randn(width)), 1e-5

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Mixer(nn.Module):
    """The parameters of a Mamba-3, and its forward token by token, head by head.

    Args:
        kind: "mamba_ssm" or "mamba3-ssm", whose release 0.2.1 has A at its floor.
        rank: above 1: with ranks.
        part: of the states that turn.
    """

    def __init__(self, kind, d_model=12, d_state=16, headdim=6, rank=1, groups=1, part=0.5):
        super().__init__()
        self.kind, self.d_model, self.d_state, self.headdim, self.mimo_rank = kind, d_model, d_state, headdim, rank
        self.d_inner, self.num_bc_heads, self.A_floor = 2 * d_model, groups, 1e-4
        self.nheads = self.d_inner // headdim
        self.split_tensor_size = int(d_state * part)
        self.num_rope_angles = self.split_tensor_size // 2
        width = 2 * self.d_inner + 2 * d_state * groups * rank + 3 * self.nheads + self.num_rope_angles
        self.in_proj, self.out_proj = (
            nn.Linear(d_model, width, bias=False),
            nn.Linear(self.d_inner, d_model, bias=False),
        )
        self.dt_bias, self.D = nn.Parameter(torch.randn(self.nheads)), nn.Parameter(torch.randn(self.nheads))
        self.B_bias, self.C_bias = (nn.Parameter(torch.randn(self.nheads, rank, d_state)) for _ in range(2))
        self.B_norm, self.C_norm = Norm(d_state), Norm(d_state)
        if rank > 1:
            self.mimo_x, self.mimo_o = (nn.Parameter(torch.randn(self.nheads, rank, headdim)) for _ in range(2))
            if kind == "mamba_ssm":
                self.mimo_z = nn.Parameter(torch.randn(self.nheads, rank, headdim))

    def forward(self, u):
        return torch.stack([self.one(sequence) for sequence in u])

    def turn(self, v, angle):
        """One B or C of one head, (N,), turned."""
        out = v.clone()
        for i in range(self.num_rope_angles):
            a, b = (i, i + self.d_state // 2) if self.kind == "mamba_ssm" and self.mimo_rank > 1 else (2 * i, 2 * i + 1)
            out[a] = v[a] * angle[i].cos() - v[b] * angle[i].sin()
            out[b] = v[a] * angle[i].sin() + v[b] * angle[i].cos()
        return out

    def one(self, u):
        H, P, N, R, G = self.nheads, self.headdim, self.d_state, self.mimo_rank, self.num_bc_heads
        sizes = [self.d_inner, self.d_inner, N * G * R, N * G * R, H, H, H, self.num_rope_angles]
        state, last = torch.zeros(H, P, N), torch.zeros(H, P, N)
        angle, out = torch.zeros(H, self.num_rope_angles), []
        for token in u:
            z, x, B, C, dt, A, trap, turns = self.in_proj(token).split(sizes)
            z, x = z.view(H, P), x.view(H, P)
            B, C = self.B_norm(B.view(R, G, N)), self.C_norm(C.view(R, G, N))
            dt, gate = F.softplus(dt + self.dt_bias), trap.sigmoid()
            if self.kind == "mamba_ssm":
                A = -torch.where(A >= 0, 1 + A, 1 / (1 - A)).clamp(min=self.A_floor)
                turns = torch.tanh(turns) * math.pi
            else:
                A = torch.full_like(A, self.A_floor)
            y = torch.zeros(H, P)
            for h in range(H):
                angle[h] += turns * dt[h]
                drive = torch.zeros(P, N)
                inward = []
                for r in range(R):
                    own = x[h] * self.mimo_x[h, r] if R > 1 else x[h]
                    if R > 1 and self.kind == "mamba3-ssm":
                        own = own.sum().expand(P)
                    inward.append(own)
                    drive += torch.outer(own, self.turn(B[r, h * G // H] + self.B_bias[h, r], angle[h]))
                decay = (A[h] * dt[h]).exp()
                if self.kind == "mamba_ssm":
                    state[h] = decay * state[h] + (1 - gate[h]) * dt[h] * decay * last[h] + gate[h] * dt[h] * drive
                else:
                    blend = (1 - gate[h]) * drive + gate[h] * 0.5 * (drive + last[h])
                    state[h] = decay * state[h] + dt[h] * blend
                last[h] = drive
                for r in range(R):
                    read = state[h] @ self.turn(C[r, h * G // H] + self.C_bias[h, r], angle[h]) + self.D[h] * inward[r]
                    if R == 1:
                        y[h] = read * F.silu(z[h])
                    elif self.kind == "mamba_ssm":
                        y[h] += self.mimo_o[h, r] * read * F.silu(z[h] * self.mimo_z[h, r])
                    else:
                        y[h] += self.mimo_o[h, r] * read * F.silu(z[h])
            out.append(self.out_proj(y.flatten()))
        return torch.stack(out)


class Reader(nn.Module):
    """Two mixers where no language model is."""

    def __init__(self, kind, **sizes):
        super().__init__()
        self.first, self.second, self.head = Mixer(kind, **sizes), Mixer(kind, **sizes), nn.Linear(12, 3)

    def forward(self, x):
        x = x + self.first(x)
        return self.head(x + self.second(x))


KINDS = {
    "mamba_ssm": {"kind": "mamba_ssm"},
    "mamba_ssm, all turn": {"kind": "mamba_ssm", "part": 1.0, "groups": 2},
    "mamba_ssm, ranks": {"kind": "mamba_ssm", "rank": 2},
    "mamba3-ssm": {"kind": "mamba3-ssm"},
    "mamba3-ssm, ranks": {"kind": "mamba3-ssm", "rank": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("states", [8, 16])
def test_pairs_far_apart_lie_where_the_smaller_mixer_looks_for_them(states, groups):
    """Whichever single states stay between them: pairs are (i, i + N / 2) of fewer states then."""
    torch.manual_seed(1)
    mixer = Mixer("mamba_ssm", rank=2, groups=groups, d_state=states).eval()
    result = ssmc.compress(mixer, batches(), sparsity=0.5, repair=False)
    kept = result.mixers[0].layer.states_kept
    wanted = silence(copy.deepcopy(mixer), kept)(batches()[0])
    assert float((result.module(batches()[0]) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


def test_a_sparsity_that_removes_no_pair_is_refused():
    for sizes, words in (({}, "a sparsity of 0.25"), ({"d_state": 4}, "there is one pair")):
        with pytest.raises(UsageError, match=f"removes none: those that turn go in pairs, .*{words}"):
            ssmc.compress(Mixer("mamba_ssm", **sizes), batches(), sparsity=0.26 if sizes else 0.07)


def module_of(name):
    torch.manual_seed(1)
    return Reader(**KINDS[name]).eval()


def batches():
    g = torch.Generator().manual_seed(2)
    return [torch.randn(2, 12, 12, generator=g) for _ in range(3)]


def silence(mixer, kept):
    """The dense mixer with some states gone: no bias, no rows, and the norms' means as the cut ones have them."""
    gone = [n for n in range(mixer.d_state) if n not in kept]
    share = len(kept) / mixer.d_state
    with torch.no_grad():
        rows = mixer.in_proj.weight[2 * mixer.d_inner :][: 2 * mixer.d_state * mixer.num_bc_heads * mixer.mimo_rank]
        rows.view(-1, mixer.d_state, mixer.d_model)[:, gone] = 0
        mixer.B_bias[..., gone] = 0
        mixer.C_bias[..., gone] = 0
        for norm in (mixer.B_norm, mixer.C_norm):
            norm.eps *= share
            norm.weight *= share**0.5
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_smaller_mixer_computes_what_the_silent_one_does(name):
    """Without a repair the norms take their means over what is left; pairs that turn go together."""
    module, data = module_of(name), batches()
    result = ssmc.compress(module, data, sparsity=0.5, repair=False)
    first = result.mixers[0]
    assert (first.family, first.states) == ("mamba3", (16, 8))
    kept = first.layer.states_kept
    rules = next(r for r in RULES if r.name == KINDS[name]["kind"] and r.apart == (name == "mamba_ssm, ranks"))
    for pair in rules.pairs(find_mamba3(module)[0].sizes):
        assert len(set(pair) & set(kept)) != 1
    small = result.module.first
    assert read_sizes(small).states == small.d_state == 8
    assert small.num_rope_angles == module.first.num_rope_angles // 2
    wanted = silence(copy.deepcopy(module.first), kept)(data[0])
    assert float((small(data[0]) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert result.parameters[1] < result.parameters[0]
    assert not result.notes


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba_ssm", "mamba_ssm, ranks", "mamba3-ssm"])
def test_the_repair_lowers_the_error_of_the_mixer_and_the_record_says_it(name):
    module, data = module_of(name), batches()
    kept = ssmc.compress(module, data, sparsity=0.5)
    plain = ssmc.compress(module, data, sparsity=0.5, score="ghost", repair=False)
    error = {
        which: sum(float((r.module.first(x) - module.first(x)).square().sum()) for x in data)
        for which, r in (("exact", kept), ("ghost", plain))
    }
    assert error["exact"] < 0.7 * error["ghost"]
    record = kept.mixers[0].layer.states
    assert record.repaired
    assert record.error < record.error_unrepaired


@torch.no_grad()
def test_the_error_is_that_of_the_gated_output():
    """Measured by running mixers whose out_proj is the identity and whose skip is zero."""
    module, data = Mixer("mamba_ssm", d_model=12), batches()
    module.D.zero_()
    module.out_proj.weight = nn.Parameter(torch.eye(24)[:12] * 0 + torch.randn(12, 24))
    result = ssmc.compress(module, data, sparsity=0.5, repair=False, score="energy")
    own, small = copy.deepcopy(module), copy.deepcopy(result.module)
    for mixer in (own, small):
        mixer.out_proj.weight = nn.Parameter(torch.eye(24))
    dense = torch.cat([own(x) for x in data])
    wanted = float((dense - torch.cat([small(x) for x in data])).square().sum() / dense.square().sum())
    assert result.mixers[0].layer.states.error == pytest.approx(wanted, rel=1e-4)


def test_units_go_as_the_error_says():
    """Pairs first: 0 is (0, 1), 1 is (2, 3); the single states are 2, 3, 4. The oracle tries all sets."""
    units, g = Units(((0, 1), (2, 3), (4,), (5,), (6,)), 2), torch.Generator().manual_seed(4)
    x = torch.randn(40, 5, generator=g).double()
    Q = x.t() @ x
    assert units.counts(4) == (1, 2)
    left = choose(units, (2, 2), Q, scaled=False)
    costs = {unit: float(Q[unit, unit]) for unit in (2, 3, 4)}
    assert left == [unit for unit in range(5) if unit != min(costs, key=costs.get)]

    def repaired(gone):
        stay = [u for u in range(5) if u != gone]
        solution = torch.linalg.lstsq(x[:, stay], x.sum(1)[:, None]).solution[:, 0]
        return float((x.sum(1) - x[:, stay] @ solution).square().sum())

    best = min((2, 3, 4), key=repaired)
    assert choose(units, (2, 2), Q, scaled=True) == [unit for unit in range(5) if unit != best]


@torch.no_grad()
def test_in_place_and_after_a_failure():
    module, data = module_of("mamba_ssm"), batches()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ssmc.runtime.errors.CalibrationError, match="in batch 1"):
        ssmc.compress(module, [data[0], torch.zeros(2, 3)], in_place=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    ssmc.compress(module, data, in_place=True)
    assert module.first.d_state == 8
    assert module.first.in_proj.out_features == len(module.first.in_proj.weight)


def test_what_does_not_go_is_refused():
    module, data = module_of("mamba_ssm"), batches()
    for options, words in (
        ({"pattern": "channel"}, "Of Mamba-3 mixers only states are removed"),
        ({"score": "sparsessm"}, "a Mamba-3 has none: its A comes from the data"),
        ({"refine": 5}, "no gradient steps for Mamba-3"),
    ):
        with pytest.raises(UsageError, match=words):
            ssmc.compress(module, data, **options)
    other = module_of("mamba_ssm")
    other.first.forward = other.second.forward = lambda u: u
    with pytest.raises(CheckpointError, match="computes something else than mamba_ssm or mamba3-ssm"):
        ssmc.compress(other, data)


@torch.no_grad()
@pytest.mark.parametrize("ranks", [False, True])
def test_mixers_of_the_package_mamba3_ssm(ranks):
    package = pytest.importorskip("mamba3_ssm", reason="the package mamba3-ssm is not installed")
    torch.manual_seed(0)
    mixer = package.Mamba3(d_model=12, d_state=16, headdim=6, is_mimo=ranks, mimo_rank=2).eval()
    result = ssmc.compress(mixer, batches(), sparsity=0.5)
    assert result.mixers[0].states == (16, 8)
    assert result.module.split_tensor_size == 4
    data = torch.cat(batches())
    left = float((result.module(data) - mixer(data)).square().sum() / mixer(data).square().sum())
    assert left < 0.5
