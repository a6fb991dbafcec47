"""Mixers of several directions: Vim and SS2D of VMamba in memory, against loops written from their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmc
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError

D_MODEL, INNER, STATES, RANK, TAPS = 6, 12, 8, 2, 3


def scan(u, dt, A_log, B, C, D):
    """(L, D) of one sequence, token by token, in float32 whatever the parameters are."""
    stored, (u, dt, A_log, B, C, D) = u.dtype, (part.float() for part in (u, dt, A_log, B, C, D))
    state, out = torch.zeros_like(A_log), []
    for t in range(len(u)):
        state = torch.exp(-A_log.exp() * dt[t][:, None]) * state + (dt[t] * u[t])[:, None] * B[t]
        out.append(state @ C[t] + D * u[t])
    return torch.stack(out).to(stored)


def ssm(u, x_proj, dt_proj, bias, A_log, D):
    """A direction on (L, D), from its weights; N is what A_log says."""
    n = A_log.shape[1]
    low, B, C = (u @ x_proj.t()).split([RANK, n, n], -1)
    return scan(u, F.softplus(low @ dt_proj.t() + bias), A_log, B, C, D)


def convolve(x, conv):
    """Causal, (L, D)."""
    padded = torch.cat([x.new_zeros(TAPS - 1, INNER), x])
    taps = conv.weight[:, 0]  # (D, K)
    return F.silu(torch.stack([(padded[t : t + TAPS].t() * taps).sum(1) + conv.bias for t in range(len(x))]))


class Vim(nn.Module):
    """Two directions; tied: one convolution, x_proj, dt_proj and D for both."""

    def __init__(self, tied=False, mean=False):
        super().__init__()
        self.tied, self.if_divide_out, self.d_state = tied, mean, STATES
        self.in_proj, self.out_proj = nn.Linear(D_MODEL, 2 * INNER, bias=False), nn.Linear(INNER, D_MODEL, bias=False)
        for end in ("",) if tied else ("", "_b"):
            setattr(self, f"conv1d{end}", nn.Conv1d(INNER, INNER, TAPS, groups=INNER, padding=TAPS - 1))
            setattr(self, f"x_proj{end}", nn.Linear(INNER, RANK + 2 * STATES, bias=False))
            setattr(self, f"dt_proj{end}", nn.Linear(RANK, INNER))
            setattr(self, f"D{end}", nn.Parameter(torch.randn(INNER)))
        self.A_log, self.A_b_log = (nn.Parameter(0.5 * torch.randn(INNER, STATES)) for _ in range(2))

    def forward(self, hidden):
        return torch.stack([self.one(sequence) for sequence in hidden])

    def one(self, u):
        x, z = self.in_proj(u).chunk(2, -1)
        y = ssm(convolve(x, self.conv1d), *self.weights(""), self.A_log, self.D)
        if self.tied:
            back = ssm(convolve(x, self.conv1d).flip(0), *self.weights(""), self.A_b_log, self.D).flip(0)
        else:
            back = ssm(convolve(x.flip(0), self.conv1d_b), *self.weights("_b"), self.A_b_log, self.D_b).flip(0)
        total = (y + back) * F.silu(z)
        return self.out_proj(total / 2 if self.if_divide_out else total)

    def weights(self, end):
        dt_proj = getattr(self, f"dt_proj{end}")
        return getattr(self, f"x_proj{end}").weight, dt_proj.weight, dt_proj.bias


class SS2D(nn.Module):
    """Four directions over an image (B, H, W, d_model), their parameters stacked."""

    def __init__(self):
        super().__init__()
        self.d_state = STATES
        self.in_proj, self.out_proj = nn.Linear(D_MODEL, 2 * INNER, bias=False), nn.Linear(INNER, D_MODEL, bias=False)
        self.conv2d, self.out_norm = nn.Conv2d(INNER, INNER, 3, groups=INNER, padding=1), nn.LayerNorm(INNER)
        self.x_proj_weight = nn.Parameter(torch.randn(4, RANK + 2 * STATES, INNER) / INNER**0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(4, INNER, RANK))
        self.dt_projs_bias = nn.Parameter(torch.randn(4, INNER) - 1)
        self.A_logs, self.Ds = nn.Parameter(0.5 * torch.randn(4 * INNER, STATES)), nn.Parameter(torch.randn(4 * INNER))

    def forward(self, images):
        return torch.stack([self.one(image) for image in images])

    def one(self, image):
        x, z = self.in_proj(image).chunk(2, -1)
        rows, columns = image.shape[:2]
        x = F.silu(self.conv2d(x.permute(2, 0, 1)[None]))[0].permute(1, 2, 0)
        by_rows = [(r, c) for r in range(rows) for c in range(columns)]
        by_columns = [(r, c) for c in range(columns) for r in range(rows)]
        total = image.new_zeros(rows, columns, INNER)
        for k, path in enumerate((by_rows, by_columns, by_rows[::-1], by_columns[::-1])):
            own = slice(k * INNER, (k + 1) * INNER)
            u = torch.stack([x[r, c] for r, c in path])
            weights = (self.x_proj_weight[k], self.dt_projs_weight[k], self.dt_projs_bias[k])
            for (r, c), y in zip(path, ssm(u, *weights, self.A_logs[own], self.Ds[own]), strict=True):
                total[r, c] += y
        return self.out_proj(self.out_norm(total) * F.silu(z))


KINDS = {
    "vim": lambda: Vim(),
    "vim, mean": lambda: Vim(mean=True),
    "vim, tied": lambda: Vim(tied=True),
    "ss2d": lambda: SS2D(),
}


class Reader(nn.Module):
    """Two mixers in a row."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.second = KINDS[kind](), KINDS[kind]()

    def forward(self, x):
        return self.second(x + self.first(x))


def module_of(kind):
    torch.manual_seed(3)
    return Reader(kind).eval()


def batches(kind):
    g = torch.Generator().manual_seed(4)
    shape = (2, 3, 4, D_MODEL) if kind == "ss2d" else (2, 10, D_MODEL)
    return [torch.randn(shape, generator=g) for _ in range(2)]


def silence(mixer, kept):
    """The dense mixer with some states of each direction gone: rows of B and C are zero."""
    with torch.no_grad():
        stacks = [mixer.x_proj_weight] if isinstance(mixer, SS2D) else [mixer.x_proj.weight[None]]
        if hasattr(mixer, "x_proj_b"):
            stacks.append(mixer.x_proj_b.weight[None])
        number = 0
        for stack in stacks:
            for weight in stack:
                gone = [n for n in range(STATES) if number * STATES + n not in kept]
                weight[[RANK + n for n in gone] + [RANK + STATES + n for n in gone]] = 0
                number += 1
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_mixer_computes_what_the_silent_one_does(kind):
    module, data = module_of(kind), batches(kind)
    result = ssmc.compress(module, data, sparsity=0.5, repair=False)
    first = result.mixers[0]
    assert not result.notes
    assert first.family == kind.split(",")[0]
    assert first.states == (STATES, STATES // 2)
    small, dense = result.module.first, module.first
    assert small.d_state == STATES // 2
    assert result.parameters[1] < result.parameters[0]
    wanted = silence(copy.deepcopy(dense), first.layer.states_kept)(data[0])
    assert float((small(data[0]) - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert float((wanted - dense(data[0])).abs().max()) > 1e-3 * float(wanted.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_in_half_precision_stays_in_it(kind, dtype):
    module, data = module_of(kind).to(dtype), [batch.to(dtype) for batch in batches(kind)]
    result = ssmc.compress(module, data, sparsity=0.5)
    assert result.mixers[0].states == (STATES, STATES // 2)
    assert {parameter.dtype for parameter in result.module.parameters()} == {dtype}
    dense, small = module.first(data[0]).float(), result.module.first(data[0]).float()
    assert float((small - dense).square().sum()) < 0.01 * float(dense.square().sum())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_repair_lowers_the_error_of_the_mixer(kind):
    module, data = module_of(kind), batches(kind)
    found = {
        score: ssmc.compress(module, data, sparsity=0.5, score=score, repair=score == "exact")
        for score in ("exact", "ghost")
    }
    error = {
        score: sum(float((result.module.first(x) - module.first(x)).square().sum()) for x in data)
        for score, result in found.items()
    }
    assert error["exact"] < 0.7 * error["ghost"]
    record = found["exact"].mixers[0].layer.states
    assert record.repaired
    assert record.error < record.error_unrepaired


@torch.no_grad()
def test_tied_directions_lose_states_by_both_of_them():
    """The oracle tries every state, with rows of B and C zero, on what both directions put out behind the gate."""
    torch.manual_seed(5)
    mixer, data = Vim(tied=True).eval(), batches("vim")

    def directions(own):
        out = []
        for u in torch.cat(data):
            x, z = own.in_proj(u).chunk(2, -1)
            x = convolve(x, own.conv1d)
            for path, A_log in ((x, own.A_log), (x.flip(0), own.A_b_log)):
                gate = F.silu(z if A_log is own.A_log else z.flip(0))
                out.append(ssm(path, *own.weights(""), A_log, own.D) * gate)
        return torch.stack(out)

    dense, errors = directions(mixer), []
    for state in range(STATES):
        without = silence(copy.deepcopy(mixer), [n for n in range(STATES) if n != state])
        errors.append(float((dense - directions(without)).square().sum()))
    result = ssmc.compress(mixer, data, sparsity=1 / STATES, score="exact", repair=False)
    (gone,) = set(range(STATES)) - set(result.mixers[0].layer.states_kept)
    assert gone == min(range(STATES), key=errors.__getitem__)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vim", "ss2d"])
def test_in_place_and_after_a_failure(kind):
    module, data = module_of(kind), batches(kind)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ssmc.runtime.errors.CalibrationError, match="in batch 1 is not finite"):
        ssmc.compress(module, [data[0], data[0] * torch.nan], in_place=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    ssmc.compress(module, data, in_place=True)
    assert module.first.d_state == STATES // 2


def test_what_does_not_go_is_refused():
    module, data = module_of("vim"), batches("vim")
    for options, words in (
        ({"pattern": "channel"}, "states are removed by a sparsity"),
        ({"score": "sparsessm-vote"}, "needs the sequences of a mixer all together"),
    ):
        with pytest.raises(UsageError, match=words):
            ssmc.compress(module, data, **options)
    module.first.forward = module.second.forward = lambda u: u
    with pytest.raises(CheckpointError, match="computes something else than Vim or SS2D do"):
        ssmc.compress(module, data)


def test_a_batch_of_nan_is_named_as_the_cause():
    with pytest.raises(CalibrationError, match="NaN or infinity on the first batch"):
        ssmc.compress(nn.Sequential(Vim()), [torch.full((1, 5, D_MODEL), torch.nan)])
