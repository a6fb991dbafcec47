"""Any torch module: mixers are found by structure, pruned on the module's own forward, and really get smaller."""

import copy

import pytest
import torch
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
from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.mixers import find_mixers
from tests.support.layouts import (
    INNER,
    RANK,
    STATES,
    WIDTH,
    Bidirectional,
    HardCoded,
    model_of,
    randomised,
    series,
)
from tests.support.models import random_mamba2, random_model
from tests.support.modules import mixers_of, outputs, silence, stock

LAYOUTS = ("mamba_ssm", "minimal", "mamba_ssm-2")


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
