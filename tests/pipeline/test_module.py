"""Any torch module: mixers are found by structure, pruned on the module's own forward, and really get smaller."""

import copy
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BambaConfig,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    Mamba2Model,
    MambaModel,
    NemotronHConfig,
    Qwen3NextConfig,
    Zamba2Config,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

import ssmc
from ssmc.compressor import MixerResult
from ssmc.runtime.errors import CalibrationError, CheckpointError, UsageError
from ssmc.runtime.models.mixers import find_mixers
from ssmc.runtime.scan import ScanInputs
from tests.support.layouts import (
    INNER,
    RANK,
    STATES,
    WIDTH,
    Bidirectional,
    HardCoded,
    convolve,
    model_of,
    randomised,
    series,
)
from tests.support.models import random_mamba2, random_model
from tests.support.naive import hidden_states, scan_output

LAYOUTS = ("mamba_ssm", "minimal", "mamba_ssm-2")


class Stock(nn.Module):
    """A mixer of transformers where no language model is: it reads the frames of a sound."""

    def __init__(self, lm):
        super().__init__()
        self.listen, self.tower = nn.Linear(2, 24), nn.Sequential(*(block.mixer for block in lm.backbone.layers))

    def forward(self, frames):
        return self.tower(self.listen(frames)).mean(1)


def stock(lm):
    torch.manual_seed(0)
    return Stock(lm).eval()


def mixers_of(model):
    return [module for module in model.modules() if hasattr(module, "A_log")]


@torch.no_grad()
def outputs(model, batches):
    return torch.cat([model(batch) for batch in batches])


def silence(mixer, kept):
    """What the cut mixer should compute, in the dense shape: B and C of all other states are zero."""
    mamba2, d_inner = mixer.A_log.dim() == 1, mixer.out_proj.in_features
    total = (len(mixer.conv1d.weight) - d_inner) // 2 if mamba2 else mixer.A_log.shape[1]  # states, all groups together
    gone = torch.tensor(sorted(set(range(total)) - set(kept)))
    with torch.no_grad():
        if not mamba2:
            rank = mixer.dt_proj.in_features
            mixer.x_proj.weight[torch.cat([rank + gone, rank + total + gone])] = 0
            return
        channels = torch.cat([d_inner + gone, d_inner + total + gone])
        mixer.in_proj.weight[d_inner + channels] = 0
        mixer.conv1d.weight[channels] = 0
        mixer.conv1d.bias[channels] = 0


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUTS)
def test_mixers_of_other_libraries_are_found_wherever_they_sit(kind):
    found = find_mixers(model_of(kind))
    assert [mixer.name for mixer in found] == ["blocks.stage0.0", "blocks.stage1.0"]
    sizes = found[0].dimensions
    assert found[0].family == ("mamba2" if kind.endswith("2") else "mamba")
    assert (sizes.d_model, sizes.d_inner, sizes.d_state, sizes.d_conv) == (WIDTH, INNER, STATES, 4)
    assert (sizes.groups, sizes.heads) == ((2, 4) if kind.endswith("2") else (1, None))


def test_mixers_of_transformers_are_found_outside_of_its_models():
    found = find_mixers(nn.ModuleList([random_mamba2().backbone.layers[1].mixer, stock(random_model())]))
    assert [mixer.family for mixer in found] == ["mamba2", "mamba", "mamba", "mamba"]
    assert (found[0].dimensions.d_state, found[0].dimensions.groups) == (7, 2)
    assert (found[1].name, found[1].dimensions.d_state) == ("1.tower.0", 6)


def test_a_gated_delta_net_is_no_mamba():
    config = Qwen3NextConfig(hidden_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8)
    net = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    assert net.A_log.shape == net.dt_bias.shape == (2,)
    with pytest.raises(CheckpointError, match=r"in_proj, conv1d, x_proj.*Qwen3NextGatedDeltaNet without in_proj, D"):
        ssmc.compress(net, [torch.randn(1, 4, 16)])
    model = nn.Sequential(net, model_of("minimal"))
    assert [mixer.name for mixer in find_mixers(model)] == ["1.blocks.stage0.0", "1.blocks.stage1.0"]


def test_shapes_that_do_not_belong_together_are_no_mixer():
    model = model_of("minimal", count=1)
    model.blocks.stage0[0].x_proj = nn.Linear(INNER, RANK + 2 * STATES + 1)
    with pytest.raises(CheckpointError, match=r"Minimal with x_proj of shape \(14, 16\), not \(13, 16\)"):
        find_mixers(model)


def test_a_mixer_whose_forward_computes_something_else_is_left_alone():
    """Falcon-Mamba has a Mamba's parameters, and norms without weights on B, C and dt."""
    config = FalconMambaConfig(hidden_size=WIDTH, state_size=4, num_hidden_layers=1, intermediate_size=INNER)
    falcon = randomised(FalconMambaMixer(config, 0, initialize_mixer_weights=False))
    with pytest.raises(CheckpointError, match="has the parameters of a Mamba, but its forward computes something else"):
        ssmc.compress(Bidirectional([falcon]), series())
    mixed = Bidirectional([falcon, *mixers_of(model_of("minimal", count=1))])
    result = ssmc.compress(mixed, series())
    assert [mixer.states for mixer in result.mixers] == [(4, 4), (5, 2)]
    assert "something else" in result.mixers[0].note
    for name, tensor in falcon.state_dict().items():
        assert torch.equal(tensor, result.module.blocks.stage0[0].state_dict()[name])


# --- smaller, and the same as masked ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*LAYOUTS, "transformers", "transformers-2"])
def test_the_smaller_module_computes_what_the_masked_one_does(kind):
    lm = {"transformers": random_model, "transformers-2": random_mamba2}.get(kind)
    model = stock(lm()) if lm else model_of(kind)
    batches = series()
    result = ssmc.compress(model, batches, sparsity=0.5, repair=False)
    masked = copy.deepcopy(model)
    for mixer, done in zip(mixers_of(masked), result.mixers, strict=True):
        assert isinstance(done, MixerResult)
        assert done.note is None
        assert done.states[1] == len(done.layer.states_kept) // (2 if kind.endswith("2") else 1) < done.states[0]
        silence(mixer, done.layer.states_kept)
    wanted = outputs(masked, batches)
    assert torch.allclose(outputs(result.module, batches), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert not torch.allclose(outputs(model, batches), wanted, rtol=1e-2)
    before, after = result.parameters
    assert after == sum(p.numel() for p in result.module.parameters()) < before


HYBRIDS = {
    "bamba": (BambaMixer, BambaConfig, {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 2}),
    "zamba2": (Zamba2MambaMixer, Zamba2Config, {"n_mamba_heads": 4, "mamba_headdim": 12, "mamba_ngroups": 2}),
    "nemotron_h": (NemotronHMamba2Mixer, NemotronHConfig, {"mamba_num_heads": 4, "mamba_head_dim": 12, "n_groups": 2}),
    "granite": (GraniteMoeHybridMambaLayer, GraniteMoeHybridConfig, {"mamba_n_heads": 4, "mamba_d_head": 12}),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_mixers_of_hybrids_are_those_of_a_mamba2(name):
    cls, configuration, sizes = HYBRIDS[name]
    field = "ssm_state_size" if name == "nemotron_h" else "mamba_d_state"
    config = configuration(hidden_size=24, **sizes, **{field: 8})
    model, batches = Bidirectional([randomised(cls(config, layer_idx=0)).eval()], width=24), series()
    result = ssmc.compress(model, batches, score="ghost", repair=False)
    assert [mixer.states for mixer in result.mixers] == [(8, 4)]
    masked = copy.deepcopy(model)
    silence(mixers_of(masked)[0], result.mixers[0].layer.states_kept)
    wanted = outputs(masked, batches)
    assert torch.allclose(outputs(result.module, batches), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert not torch.allclose(outputs(model, batches), wanted, rtol=1e-2)


def test_sizes_are_told_by_the_names_the_mixer_knows():
    small = ssmc.compress(model_of("mamba_ssm"), series()).module
    assert {(m.d_state, m.d_inner, m.x_proj.out_features) for m in mixers_of(small)} == {(2, INNER, RANK + 4)}
    small = ssmc.compress(model_of("mamba_ssm-2"), series(), score="ghost", repair=False).module
    assert {(m.d_state, m.conv1d.groups, m.in_proj.out_features) for m in mixers_of(small)} == {(2, 24, 44)}
    model = model_of("minimal")
    small = ssmc.compress(model, series(), states=(3, 2)).module
    assert [m.args.d_state for m in mixers_of(small)] == [3, 2]
    assert {m.args.d_state for m in mixers_of(model)} == {STATES}  # all blocks of the dense model share it


@pytest.mark.parametrize("kind", ["mamba_ssm", "minimal", "transformers"])
def test_channels_and_states_together(kind):
    model = stock(random_model()) if kind == "transformers" else model_of(kind)
    batches = series()
    result = ssmc.compress(model, batches, pattern="column+channel", repair=False, round_channels=4)
    masked = copy.deepcopy(model)
    for mixer, done in zip(mixers_of(masked), result.mixers, strict=True):
        gone = sorted(set(range(done.channels[0])) - set(done.layer.channels_kept))
        assert done.channels == (len(mixer.D), len(mixer.D) // 2)
        silence(mixer, done.layer.states_kept)
        with torch.no_grad():
            mixer.x_proj.weight[:, gone] = 0
            mixer.out_proj.weight[:, gone] = 0
    wanted = outputs(masked, batches)
    assert torch.allclose(outputs(result.module, batches), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert {cut.name for cut in result.mixers[0].cuts} >= {"A_log", "x_proj.weight", "in_proj.weight", "D"}
    (a_log,) = (cut for cut in result.mixers[0].cuts if cut.name == "A_log")
    assert (a_log.before, a_log.after) == (tuple(mixer.A_log.shape), tuple(mixers_of(result.module)[0].A_log.shape))


@pytest.mark.parametrize("make", [random_model, random_mamba2])
def test_a_whole_transformers_model_is_saved_and_loaded_by_transformers(make, tmp_path):
    model = make().backbone
    batches = [{"inputs_embeds": torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    small = ssmc.compress(model, batches, score="ghost", repair=False).module
    small.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path)
    assert isinstance(read, MambaModel | Mamba2Model)
    assert read.config.state_size == 3 < model.config.state_size
    with torch.no_grad():
        assert torch.equal(read(**batches[0]).last_hidden_state, small(**batches[0]).last_hidden_state)


def test_a_forward_that_knows_one_number_of_states_only_is_masked():
    model, batches = randomised(Bidirectional([HardCoded()])), series()
    result = ssmc.compress(model, batches, repair=False)
    assert result.mixers[0].states == (STATES, STATES)
    assert result.mixers[0].cuts == ()
    assert "split_with_sizes" in result.notes[0]
    assert "with 2 states, so what was removed is silent and still there" in result.notes[0]
    silence(model.blocks.stage0[0], result.mixers[0].layer.states_kept)
    assert torch.allclose(outputs(result.module, batches), outputs(model, batches), atol=1e-6)


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
        ({"out": "somewhere"}, "out, force and command go with a checkpoint"),
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
