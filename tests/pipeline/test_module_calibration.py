"""Any torch module: what its statistics are, and what a user may rely on."""

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssmc
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.scan import ScanInputs
from tests.support.layouts import (
    RANK,
    STATES,
    convolve,
    model_of,
    series,
)
from tests.support.models import random_model
from tests.support.modules import mixers_of, outputs, stock
from tests.support.naive import hidden_states, scan_output

LAYOUTS = ("mamba_ssm", "minimal", "mamba_ssm-2")


# --- statistics -------------------------------------------------------------------------------------------------------


def scan_of(mixer, hidden):
    """What the recurrence of a Mamba-1 reads, from the formula."""
    with torch.no_grad():
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        u = F.silu(convolve(mixer.conv1d, x))
        dt, B, C = mixer.x_proj(u).split([RANK, STATES, STATES], dim=-1)
        return ScanInputs(u, F.softplus(mixer.dt_proj(dt)), -torch.exp(mixer.A_log), B, C, mixer.D, z)


def naive_error(mixer, read, kept):
    """Squared error of what the states add to the gated output, over all that a mixer reads, relative to its energy."""
    error = energy = 0.0
    for hidden in read:
        inputs = scan_of(mixer, hidden)
        h = hidden_states(inputs)
        whole = scan_output(inputs, h)
        error += float(np.square(whole - scan_output(inputs, h, kept=kept)).sum())
        energy += float(np.square(whole).sum())
    return error / energy


def what_is_read(model, index, batches):
    """Everything a mixer is called with."""
    read = []
    handle = mixers_of(model)[index].register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone()))
    outputs(model, batches)
    handle.remove()
    return read


def test_errors_are_those_of_a_naive_loop_and_later_mixers_read_what_pruned_ones_put_out():
    model, batches = model_of("minimal"), series(count=2)
    result = ssmc.compress(model, batches, score="exact", repair=False)
    first, second = mixers_of(model)
    for index, dense in enumerate((first, second)):
        layer = result.mixers[index].layer
        read = what_is_read(result.module, index, batches)  # mixers before it are pruned there
        assert len(read) == 4  # two directions of two batches
        assert layer.states.error == pytest.approx(naive_error(dense, read, layer.states_kept), rel=1e-3)
    stale = what_is_read(model, 1, batches)
    assert result.mixers[1].layer.states.error != pytest.approx(naive_error(second, stale, layer.states_kept), rel=1e-2)


def test_the_repair_lowers_the_error_and_exact_finds_the_best_state_to_lose():
    model, batches = model_of("mamba_ssm", count=1), series(count=2)
    read = what_is_read(model, 0, batches)
    result = ssmc.compress(model, batches, repair=False, states=(STATES - 1,))
    errors = [naive_error(mixers_of(model)[0], read, [k for k in range(STATES) if k != gone]) for gone in range(STATES)]
    assert set(range(STATES)) - set(result.mixers[0].layer.states_kept) == {int(np.argmin(errors))}
    assert result.mixers[0].layer.states.error == pytest.approx(min(errors), rel=1e-3)
    repaired = ssmc.compress(model, batches, states=(STATES - 1,)).mixers[0].layer.states
    assert repaired.error < 0.9 * repaired.error_unrepaired


@pytest.mark.parametrize("score", ["exact", "sparsessm", "sparsessm-vote"])
def test_how_batches_are_cut_does_not_matter(score):
    """Streamed sums, and scores that need all samples of a time step together."""
    model, batches = model_of("mamba_ssm", seed=5), series(count=6, batch=1, seed=2)
    one, many = (ssmc.compress(model, given, score=score) for given in ([torch.cat(batches)], batches))
    for a, b in zip(one.mixers, many.mixers, strict=True):
        assert a.layer.states_kept == b.layer.states_kept
        assert a.layer.states.error == pytest.approx(b.layer.states.error, rel=1e-3)


def test_memory_does_not_grow_with_the_batches():
    """Batches of several lengths come one by one; nothing of an earlier one is alive when the next is made."""
    alive = []

    class Loader:
        def __iter__(self):
            for length in (5, 7, 9, 6):
                assert sum(ref() is not None for ref in alive) <= 2  # the first, which is kept, and the one before
                batch = torch.randn(2, length, 2, generator=torch.Generator().manual_seed(length))
                alive.append(weakref.ref(batch))
                yield batch

    result = ssmc.compress(model_of("minimal"), Loader())
    assert len(alive) >= 8
    assert all(mixer.states == (5, 2) for mixer in result.mixers)


def test_padding_is_not_counted():
    lm = random_model().backbone
    g = torch.Generator().manual_seed(4)
    short, whole = torch.randn(1, 6, 24, generator=g), torch.randn(1, 9, 24, generator=g)
    padded = {"inputs_embeds": torch.cat([F.pad(short, (0, 0, 0, 3), value=3.0), whole])}
    padded["attention_mask"] = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    apart = [{"inputs_embeds": whole}, {"inputs_embeds": short}]
    for a, b in zip(*(ssmc.compress(lm, given).mixers for given in ([padded], apart)), strict=True):
        assert a.layer.states_kept == b.layer.states_kept
        assert a.layer.states.error == pytest.approx(b.layer.states.error, rel=1e-3)


def test_half_precision():
    model, batches = stock(random_model()), series()
    half = ssmc.compress(copy.deepcopy(model).bfloat16(), [batch.bfloat16() for batch in batches], repair=False)
    assert all(mixer.states == (6, 3) for mixer in half.mixers)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    whole = ssmc.compress(model, batches, repair=False)
    for a, b in zip(half.mixers[:1], whole.mixers[:1], strict=True):
        assert a.layer.states.error == pytest.approx(b.layer.states.error, rel=0.1)


# --- what a user may rely on ------------------------------------------------------------------------------------------


def test_the_module_given_stays_as_it_is_unless_asked_otherwise():
    model, batches = model_of("minimal").train(), series()
    model.head.eval()
    before = copy.deepcopy(model.state_dict())
    result = ssmc.compress(model, iter(batches))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.module.training
    assert not result.module.head.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.module.modules())
    again = ssmc.compress(model, batches, in_place=True)
    assert again.module is model
    for a, b in zip(model.parameters(), result.module.parameters(), strict=True):  # same seed, same bytes
        assert torch.equal(a, b)
        assert a.requires_grad
    outputs_of_training = model(batches[0]).sum()
    outputs_of_training.backward()  # it can be trained on
    assert all(m.A_log.grad is not None for m in mixers_of(model))


def test_batches_in_all_forms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of("minimal", count=1)

        def forward(self, left, right):
            return self.inner(left + right)

    model, (a, b) = Two(), series(count=2)
    forms = ([(a, b)], [[a, b]], [{"right": b, "left": a}])
    results = [ssmc.compress(model, form).mixers[0].layer for form in forms]
    labelled = ssmc.compress(model, [(a, b, torch.zeros(3))], forward=lambda m, batch: m(*batch[:2]))
    for layer in (*results[1:], labelled.mixers[0].layer):
        assert layer == results[0]


def test_a_mixer_that_never_runs_is_left_with_a_reason():
    model = model_of("minimal", count=1)
    model.spare = copy.deepcopy(model.blocks.stage0[0])
    result = ssmc.compress(model, series())
    assert [(mixer.name, mixer.states) for mixer in result.mixers] == [("blocks.stage0.0", (5, 2)), ("spare", (5, 5))]
    assert result.notes == ("spare: was not called on the first batch",)


def test_mamba2_is_repaired_by_its_c_rows_and_out_proj():
    model, batches = model_of("mamba_ssm-2", count=1), series(count=16, batch=4, length=12)
    result = ssmc.compress(model, batches)
    layer = result.mixers[0].layer
    assert layer.out_proj.error < layer.out_proj.error_unrepaired
    bare = ssmc.compress(model, batches, repair=False)
    dense, repaired, unrepaired = (outputs(m, batches) for m in (model, result.module, bare.module))
    assert (repaired - dense).square().sum() < 0.7 * (unrepaired - dense).square().sum()


def test_refinement_makes_a_mixer_no_worse():
    result = ssmc.compress(model_of("minimal", count=1), series(), refine=20)
    refined = result.mixers[0].layer.refined
    assert refined.best_step > 0
    assert refined.error < refined.error_before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity 1.5 does not work"),
        ({"sparsity": 0.95}, "would leave none"),
        ({"pattern": "layer"}, "The pattern layer is not carried out for a torch module; column, channel, column"),
        ({"score": "best"}, "score 'best' does not work"),
        ({"calib": "c4"}, "calib does not go with a torch module"),
        ({"states": (2, 2, 2)}, "states names 3 mixers, the module has 2"),
        ({"out": "somewhere"}, "out, force, resume, max_memory, command and refuse go with a checkpoint"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        ssmc.compress(model_of("minimal"), series(count=1), **options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (7, "batches is a int, which holds no batches"),
        ([torch.full((2, 5, 2), torch.nan)], "NaN or infinity on the first batch"),
        ([*series(count=1), torch.full((2, 9, 2), torch.nan)], r"stage0.0 reads in batch 1 is not finite"),
        (torch.randn(4, 5, 2), r"batches is a Tensor itself.*give a list, \[Tensor"),
        ({"x": torch.randn(4, 5, 2)}, "batches is a dict itself"),
        ([torch.randn(2, 5, 3)], r"cannot be run on batch 0 \(RuntimeError: mat1 and mat2"),
    ],
)
def test_batches_that_cannot_be_used(batches, message):
    with pytest.raises(CalibrationError, match=message):
        ssmc.compress(model_of("minimal"), batches)


def test_more_refusals():
    with pytest.raises(UsageError, match="give batches"):
        ssmc.compress(model_of("minimal"))
    with pytest.raises(UsageError, match="batches go with a torch module"):
        ssmc.compress("tiny", series())
    with pytest.raises(UsageError, match=r"The pattern channel is not carried out for mamba2 \(blocks.stage0.0\)"):
        ssmc.compress(model_of("mamba_ssm-2"), series(), pattern="channel")
    with pytest.raises(CalibrationError, match="several lengths"):
        ssmc.compress(model_of("minimal"), [series()[0], series(length=8)[0]], score="sparsessm")
    with pytest.raises(CalibrationError, match="Refining needs at least 2 sequences"):
        ssmc.compress(stock(random_model()), series(count=1, batch=1), refine=2)
    with pytest.raises(CheckpointError, match="There is no Mamba or Mamba-2 mixer in this Linear"):
        ssmc.compress(nn.Linear(2, 2), series())
