"""Families whose B and C pass a norm over the states: what removing states changes, and how far it is undone."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssmc.compressor import compress
from ssmc.compressor.methods.states.normed import fit_scales, remove_states
from ssmc.exporters import export
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import architecture_for
from tests.support.families import (
    FAMILIES,
    NORMED,
    TINY_VOCAB,
    difference,
    falcon_mamba,
    random_ids,
    short,
    with_tokenizer,
)
from tests.support.models import save_transformers


@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_scaled_rows_are_undone_behind_the_norm(name):
    """Whatever the factors, only the root mean squares change; and what they do to B and C is one number a token."""
    model = FAMILIES[name]()
    architecture = architecture_for(name)
    block = architecture.blocks(model)[0]
    mixer = architecture.mixer(block)
    u = torch.randn(1, 30, mixer.x_proj.weight.shape[1], generator=torch.Generator().manual_seed(9))
    r, n = mixer.time_step_rank, mixer.ssm_state_size

    def readers() -> list[torch.Tensor]:
        _, B, C = architecture.after_x_proj(mixer, *mixer.x_proj(u).split([r, n, n], dim=-1))
        return [part[0].double() for part in (B, C)]

    before = readers()
    kept = [1, 2, 5]
    b = torch.tensor([0.5, 1.0, 3.0])
    c = 1 / b if not architecture.has_norm_weights else torch.tensor([2.0, 0.1, 1.0])
    architecture.scale_readers(mixer, kept, b, c, 1.0)
    after, wanted = (B[:, kept] * C[:, kept] for B, C in (readers(), before))  # (T, K)
    ratio = (after * wanted).sum(1) / wanted.square().sum(1)  # (T,), weighted: a product near zero tells nothing
    torch.testing.assert_close(after, ratio[:, None] * wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert float(ratio.std()) > 1e-2


def test_fitted_scales_let_what_is_left_follow_what_there_was():
    g = torch.Generator().manual_seed(0)
    loud = torch.rand(400, 1, generator=g, dtype=torch.float64)
    dense = torch.cat([loud, 0.1 * torch.rand(400, 5, generator=g, dtype=torch.float64)], dim=1)
    left = dense[:, [0, 1, 2]]
    left = left * torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)  # the one that tells most is quiet

    def spread(b: torch.Tensor) -> float:
        ratio = ((left * b.square()).sum(1) / dense.sum(1)).log()
        return float(ratio.std())

    free, other = fit_scales(left, left, dense, dense, tied=False)
    assert spread(free) < 0.4 * spread(torch.ones(3, dtype=torch.float64))
    assert torch.allclose(free, other)
    tied, inverse = fit_scales(left, left, dense, dense, tied=True)
    assert torch.allclose(tied * inverse, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_the_error_said_is_that_of_the_layer(name):
    """Relative squared error of the gated read-out, from the stock mixer: its output less that of its skip alone."""
    model = FAMILIES[name]()
    architecture = architecture_for(name)
    block = architecture.blocks(model)[0]
    mixer, hidden = architecture.mixer(block), torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(1))

    def readout(mixer: torch.nn.Module) -> torch.Tensor:
        """What out_proj would put out if it were dense's: the read-out of the states, with its gate."""
        silent = copy.deepcopy(mixer)
        silent.x_proj.weight[mixer.time_step_rank :] = 0
        heard = []
        for one in (mixer, silent):
            one.out_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
            one(architecture.normed(block, hidden))
        return heard[0] - heard[1]

    wanted, before = readout(copy.deepcopy(mixer)), mixer.D[0].clone()
    fit = remove_states(architecture, block, hidden, [0, 3, 6], None, repair=True)
    factor = float(before / mixer.D[0])  # of Falcon-Mamba, whose out_proj took it
    got = factor * readout(copy.deepcopy(mixer))
    error = float((got - wanted).square().sum() / wanted.square().sum())
    assert fit.error == pytest.approx(error, rel=1e-3)
    assert fit.error < fit.error_unrepaired
    assert fit.spread > 0


@torch.no_grad()
@pytest.mark.parametrize("keep", [4, 6])
def test_half_precision_folds_the_mean_exactly(tmp_path, keep):
    """Two states of eight, or a quarter: the factor is exact in bfloat16 or takes float32; never rounded away."""
    model = falcon_mamba(vocab_size=TINY_VOCAB).bfloat16()
    directory = with_tokenizer(save_transformers(model, tmp_path / "model"))
    result = compress(directory, out=tmp_path / "out", sparsity=1 - keep / 8, **short(directory))
    exported = export(tmp_path / "out")
    stored = load_checkpoint(exported.directory).dtypes["backbone.layers.0.mixer.out_proj.weight"]
    assert stored is (torch.bfloat16 if keep == 4 else torch.float32)
    assert any("not exact in half precision" in note for note in result.notes) == (keep == 6)
    ids = random_ids(2, 40)
    masked, cut = (load_checkpoint(d, dtype=torch.float32).model for d in (tmp_path / "out", exported.directory))
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-4


@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_with_one_state_left_the_epsilon_is_told_and_not_taken_for_a_fault(name, tmp_path):
    """b and c are one number then, which passes zero: there eps counts, and for the cut model an eighth as much."""
    # experts do not compute in double precision, and a second layer makes much of the rounding of the first
    few = {"num_experts": 1} if name == "jamba" else {"num_hidden_layers": 1}
    directory = with_tokenizer(save_transformers(FAMILIES[name](vocab_size=TINY_VOCAB, **few), tmp_path / "model"))
    compress(directory, out=tmp_path / "out", sparsity=0.875, **short(directory))
    exported = export(tmp_path / "out")
    ids, architecture = random_ids(2, 96), architecture_for(name)
    masked, cut = (load_checkpoint(d).model.double() for d in (tmp_path / "out", exported.directory))
    assert exported.comparison.epsilon_difference > 0
    apart = difference(cut(ids).logits, masked(ids).logits)
    for block in architecture.blocks(masked):
        mixer = architecture.mixer(block)
        for norm in () if mixer is None else (mixer.b_layernorm, mixer.c_layernorm):
            norm.forward = lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6 / 8)
            if name == "jamba":
                norm.forward = lambda x, f=norm.forward, w=norm.weight: w * f(x)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-5 < apart


@pytest.mark.parametrize("pattern", ["channel", "layer", "column+channel", "2:4"])
@torch.no_grad()
def test_falcon_mamba_takes_the_other_patterns(tmp_path, pattern):
    directory = with_tokenizer(save_transformers(falcon_mamba(vocab_size=TINY_VOCAB), tmp_path / "model"))
    options = {"scope": "all"} if pattern == "2:4" else {}
    compress(directory, out=tmp_path / "out", pattern=pattern, **short(directory), **options)
    exported = export(tmp_path / "out")
    masked, cut = (AutoModelForCausalLM.from_pretrained(d) for d in (tmp_path / "out", exported.directory))
    ids = random_ids(2, 40)
    assert difference(cut(ids).logits, masked(ids).logits) < 1e-4
    config = cut.config
    sizes = (config.num_hidden_layers, config.intermediate_size, config.state_size)
    smaller = {"channel": (3, 24, 8), "layer": (1, 48, 8), "column+channel": (3, 24, 4)}
    assert sizes == smaller.get(pattern, (3, 48, 8))
