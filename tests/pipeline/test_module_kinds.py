"""Modules as other people build them: frozen configurations, shared parameters, biases, compiled, odd, failing."""

import copy
from dataclasses import FrozenInstanceError, dataclass
from typing import NamedTuple

import pytest
import torch
from pydantic import BaseModel
from torch import nn

import ssmc
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from tests.support.layouts import (
    INNER,
    RANK,
    STATES,
    WIDTH,
    Bidirectional,
    MambaSsm,
    MambaSsm2,
    Minimal,
    model_of,
    randomised,
    series,
)
from tests.support.modules import mixers_of, outputs, silence


@dataclass(frozen=True)
class Frozen:
    d_inner: int = INNER
    dt_rank: int = RANK
    d_state: int = STATES


class Named(NamedTuple):
    d_inner: int = INNER
    dt_rank: int = RANK
    d_state: int = STATES


class Pydantic(BaseModel, frozen=True):
    d_inner: int = INNER
    dt_rank: int = RANK
    d_state: int = STATES


class Settings:
    """Says no to every change, with an error of its own."""

    def __init__(self):
        vars(self).update(vars(Frozen()))

    def __setattr__(self, name, value):
        raise PermissionError(f"{name} is read-only")


class ReadsArgs(Minimal):
    """Splits by the number in its configuration, which therefore has to change."""

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        return self.compute(x, z, [self.args.dt_rank, self.args.d_state, self.args.d_state])


class ReadOnly(MambaSsm):
    """d_state follows from A_log."""

    def __init__(self):
        super().__init__()

    def __setattr__(self, name, value):
        if name != "d_state":
            super().__setattr__(name, value)

    @property
    def d_state(self):
        return self.A_log.shape[1]


class WithConfig(Bidirectional):
    """A model whose own configuration, shared with nobody, says the size too."""

    def __init__(self, mixers, config):
        super().__init__(mixers)
        self.config = config


@pytest.mark.parametrize("args", [Frozen(), Named(), Pydantic(), Settings()])
def test_a_configuration_that_cannot_be_changed_is_replaced(args):
    model, batches = randomised(WithConfig([ReadsArgs(args), ReadsArgs(args)], args)), series()
    result = ssmc.compress(model, batches, repair=False)
    small = result.module
    assert result.notes == ()
    assert [mixer.states for mixer in result.mixers] == [(STATES, 2)] * 2
    assert {m.args.d_state for m in mixers_of(small)} == {2} == {small.config.d_state}
    assert {m.args.d_state for m in mixers_of(model)} == {STATES} == {args.d_state}
    assert small.parameters is not None
    assert outputs(small, batches).isfinite().all()


def test_a_read_only_size_is_left_to_itself():
    model = randomised(Bidirectional([ReadOnly()]))
    small = ssmc.compress(model, series(), repair=False)
    assert small.notes == ()
    assert mixers_of(small.module)[0].d_state == 2


class Refuses(MambaSsm2):
    """Says no to any change once it is made."""

    ready = False

    def __init__(self):
        super().__init__()
        self.ready = True

    def __setattr__(self, name, value):
        if self.ready and name == "d_state":
            raise FrozenInstanceError("sizes are final")
        super().__setattr__(name, value)


def test_a_mixer_that_refuses_another_size_is_masked():
    model, batches = randomised(Bidirectional([Refuses()])), series()
    result = ssmc.compress(model, batches, score="ghost", repair=False)
    assert result.mixers[0].states == (STATES, STATES)
    assert result.notes[0].startswith("blocks.stage0.0: cannot be told that it has 2 states (sizes are final)")
    silence(mixers_of(model)[0], result.mixers[0].layer.states_kept)
    assert torch.allclose(outputs(result.module, batches), outputs(model, batches), atol=1e-6)


class Breaks(MambaSsm):
    """Runs a number of times only."""

    left = 2

    def forward(self, hidden_states, inference_params=None):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the device went away")
        return super().forward(hidden_states)


def test_an_in_place_run_that_fails_leaves_the_module_as_it_was():
    mixers = [MambaSsm(), MambaSsm(), Breaks()]
    model = randomised(WithConfig(mixers, Frozen()))
    before, batches = {name: tensor.clone() for name, tensor in model.state_dict().items()}, series()
    with pytest.raises(CalibrationError, match="the device went away"):
        ssmc.compress(model, batches, score="ghost", in_place=True)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.d_state for m in mixers] == [STATES] * 3
    assert model.config == Frozen()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    mixers[2].left = 1000
    wanted = ssmc.compress(model, batches, score="ghost").module
    ssmc.compress(model, batches, score="ghost", in_place=True)
    assert torch.equal(outputs(model, batches), outputs(wanted, batches))


def tied(make, names):
    """Two mixers, one for each direction, that have some parameters in common."""
    model = randomised(Bidirectional([make(), make()]))
    one, other = mixers_of(model)
    for name in names:
        setattr(other, name, getattr(one, name))
    return model


def test_parameters_that_are_shared_and_not_touched_stay_shared():
    """As Caduceus ties in_proj and out_proj of its directions; states are in neither."""
    model, batches = tied(MambaSsm, ("in_proj", "out_proj")), series()
    result = ssmc.compress(model, batches)
    one, other = mixers_of(result.module)
    assert result.notes == ()
    assert one.in_proj.weight is other.in_proj.weight
    assert one.out_proj.weight is other.out_proj.weight
    assert result.parameters[1] < result.parameters[0] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "options"),
    [(MambaSsm, {"pattern": "channel", "round_channels": 4}), (MambaSsm, {"refine": 2}), (MambaSsm2, {})],
)
def test_mixers_that_share_what_would_change_are_left_with_one_note(make, options):
    model = tied(make, ("in_proj", "out_proj"))
    model.blocks["stage2"] = nn.ModuleList([randomised(make(), 3)])
    result = ssmc.compress(model, series(), score="magnitude" if make is MambaSsm else "energy", **options)
    assert [mixer.layer is None for mixer in result.mixers] == [True, True, False]
    one, other, _ = mixers_of(result.module)
    assert one.in_proj.weight is other.in_proj.weight
    assert torch.equal(one.in_proj.weight, mixers_of(model)[0].in_proj.weight)
    assert result.parameters[1] < result.parameters[0]
    assert all("shares in_proj.weight with blocks.stage" in mixer.note for mixer in result.mixers[:2])
    with pytest.raises(CheckpointError, match=r"shares in_proj\.weight with"):
        ssmc.compress(tied(make, ("in_proj", "out_proj")), series(), score="random", **options)


class Biased(MambaSsm):
    """x_proj has a bias, so B and C have a constant part."""

    def __init__(self):
        super().__init__()
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATES)


@pytest.mark.parametrize("repair", [True, False])
def test_a_bias_of_x_proj_is_cut_with_channels_and_states_together(repair):
    """It has no axis of channels: what states did to it in the narrow mixer was lost, and nothing got smaller."""
    result = ssmc.compress(
        randomised(Bidirectional([Biased()])), series(), pattern="column+channel", sparsity=0.5, repair=repair
    )
    assert result.notes == ()
    (mixer,) = mixers_of(result.module)
    assert (mixer.A_log.shape, mixer.x_proj.bias.shape) == ((INNER // 2, 2), (RANK + 2 * 2,))


@pytest.mark.parametrize("repair", [True, False])
def test_a_bias_of_x_proj_is_cut_and_mixed(repair):
    model, batches = randomised(Bidirectional([Biased()])), series()
    result = ssmc.compress(model, batches, repair=repair)
    assert result.notes == ()
    assert {cut.name for cut in result.mixers[0].cuts} == {"A_log", "x_proj.weight", "x_proj.bias"}
    dense, small = mixers_of(model)[0], mixers_of(result.module)[0]
    seen: dict[str, list[torch.Tensor]] = {}

    def watched(name, mixer):
        def listen(_, args):
            seen.setdefault(name, []).append(args[0].detach())

        handle = mixer.out_proj.register_forward_pre_hook(listen)
        outputs(model if name == "dense" else replaced(model, small), batches)
        handle.remove()

    def replaced(model, mixer):
        other = copy.deepcopy(model)
        other.blocks.stage0[0] = mixer
        return other

    watched("dense", dense)
    watched("small", small)
    skip = []  # what D u adds is in both; the error is that of the read-out without it
    for mixer in (dense,):
        silent = copy.deepcopy(mixer)
        with torch.no_grad():
            silent.x_proj.weight[RANK:], silent.x_proj.bias[RANK:] = 0, 0
        silent.out_proj.register_forward_pre_hook(lambda _, args: skip.append(args[0].detach()))
        outputs(replaced(model, silent), batches)
    whole = torch.cat([a - b for a, b in zip(seen["dense"], skip, strict=True)])
    lost = torch.cat([a - b for a, b in zip(seen["dense"], seen["small"], strict=True)])
    measured = float(lost.square().sum() / whole.square().sum())
    assert result.mixers[0].layer.states.error == pytest.approx(measured, rel=1e-3)


def test_a_compiled_module_is_taken_as_what_it_was_compiled_from():
    model, batches = model_of("mamba_ssm"), series()
    wanted = ssmc.compress(model, batches, score="energy")
    result = ssmc.compress(torch.compile(model), batches, score="energy")
    assert type(result.module) is type(model)
    assert "was compiled" in result.notes[0]
    assert torch.equal(outputs(result.module, batches), outputs(wanted.module, batches))


def test_a_part_that_is_compiled_runs_as_it_is():
    model, batches = model_of("mamba_ssm"), series()
    wanted = ssmc.compress(model, batches, score="energy")
    inner = copy.deepcopy(model)
    for stage in inner.blocks.values():
        stage[0].compile()
    result = ssmc.compress(inner, batches, score="energy")
    assert [m.states for m in result.mixers] == [m.states for m in wanted.mixers]


class OneState(MambaSsm):
    def __init__(self):
        super().__init__()
        self.d_state = 1
        self.x_proj = nn.Linear(INNER, RANK + 2, bias=False)
        self.A_log = nn.Parameter(torch.empty(INNER, 1))


def test_a_traced_module_is_refused_by_name():
    traced = torch.jit.trace(model_of("mamba_ssm"), series()[0])
    with pytest.raises(CheckpointError, match=r"torch\.jit.*Give the module that it was made from"):
        ssmc.compress(traced, series())


def test_an_odd_mixer_is_left_with_a_note_that_names_it():
    model, batches = randomised(Bidirectional([MambaSsm(), OneState(), MambaSsm()])), series()
    result = ssmc.compress(model, batches)
    assert [mixer.states for mixer in result.mixers] == [(STATES, 2), (1, 1), (STATES, 2)]
    (note,) = result.notes
    assert note.startswith("blocks.stage1.0: is left as it is: There is only one state")
    with pytest.raises(UsageError, match=r"only one state.*pattern channel"):
        ssmc.compress(randomised(Bidirectional([OneState()])), batches)


def test_a_note_on_several_mixers_stands_once():
    model = randomised(Bidirectional([OneState(), OneState(), MambaSsm()]))
    (note,) = ssmc.compress(model, series()).notes
    assert note.startswith("blocks.stage0.0, blocks.stage1.0: ")


def test_messages_say_what_works_in_python():
    lengths = [torch.randn(2, n, 2) for n in (7, 9)]
    with pytest.raises(CalibrationError) as refused:
        ssmc.compress(model_of("mamba_ssm-2"), lengths)
    assert str(refused.value).endswith("or use repair=False.")
    assert ssmc.compress(model_of("mamba_ssm-2"), lengths, repair=False).mixers[0].states == (STATES, 2)
    with pytest.raises(CalibrationError, match='pattern="column" and one of the scores exact'):
        ssmc.compress(model_of("mamba_ssm"), lengths, pattern="column+channel", score="column=sparsessm,channel=obs")
    with pytest.raises(UsageError) as refused:
        ssmc.compress(model_of("mamba_ssm"), series(), pattern="channel", sparsity=0.01)
    assert "--" not in str(refused.value)
    assert "a smaller round_channels" in str(refused.value)
    for options, told in (({"target_latency": 0.5}, "Give a sparsity"), ({"distill": 10}, "Use refine")):
        with pytest.raises(UsageError, match=told):
            ssmc.compress(model_of("mamba_ssm"), series(), **options)


class Stacked(nn.Module):
    """SS2D of VMamba has the parameters of its four directions in one tensor each."""

    def __init__(self):
        super().__init__()
        self.A_logs, self.Ds = nn.Parameter(torch.zeros(64, STATES)), nn.Parameter(torch.zeros(64))
        self.x_proj_weight = nn.Parameter(torch.zeros(4, RANK + 2 * STATES, INNER))


def test_layouts_that_are_not_read_are_called_what_they_are():
    with pytest.raises(CheckpointError, match=r"Stacked with A_logs: scans of several directions.*SS2D of VMamba"):
        ssmc.compress(nn.Sequential(Stacked()), [torch.randn(1, 4, WIDTH)])


@pytest.mark.parametrize("in_place", [True, False])
def test_parameters_keep_their_attributes(in_place):
    model, batches = model_of("mamba_ssm"), series()
    for mixer in mixers_of(model):
        mixer.A_log._no_weight_decay = mixer.D._no_weight_decay = True
        mixer.dt_proj.bias._no_reinit = True
    small = ssmc.compress(model, batches, in_place=in_place).module
    assert (small is model) is in_place
    for mixer in mixers_of(small):
        assert mixer.A_log.shape == (INNER, 2)
        assert mixer.A_log._no_weight_decay
        assert mixer.D._no_weight_decay
        assert mixer.dt_proj.bias._no_reinit
