"""Heads of a Mamba-2: the choice against least squares, masked against cut, exports against stock loaders."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.methods.channels.heads import channels_of, eliminate_heads
from ssmc.compressor.methods.channels.score import ScoredChannels
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.ridge import RIDGE
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import CHANNEL, STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.support.models import VOCAB, random_mamba2, save_mamba_ssm, save_transformers
from tests.support.pruning import prune_layers

ARCHITECTURE = architecture_for("mamba2")


def random_tokens(shape=(4, 64), seed=3) -> torch.Tensor:
    return torch.randint(1, VOCAB - 1, shape, generator=torch.Generator().manual_seed(seed))


def pruned(model, tokens=None, **options):
    """The model pruned in place, and what became of its layers."""
    config = configure(model="test", **{"pattern": "channel", **options})
    dtypes = dict.fromkeys(model.state_dict(), torch.float32)
    tokens = random_tokens() if tokens is None else tokens
    return prune_layers(use_fast_scan(model), ARCHITECTURE, tokens, config, dtypes)


@pytest.mark.parametrize("groups", [1, 2])
def test_each_time_the_head_goes_that_the_others_can_best_make_up_for(groups):
    """Against plain least squares from scratch for every candidate."""
    rng = np.random.default_rng(0)
    P, heads = 3, 6
    y = rng.normal(size=(200, 4)) @ rng.normal(size=(4, P * heads)) + 0.3 * rng.normal(size=(200, P * heads))
    W = rng.normal(size=(5, P * heads))
    moment = y.T @ y
    ridged = moment + RIDGE * moment.diagonal().mean() * np.eye(P * heads)

    def cost(kept):  # of the best W' on the kept channels, by the quadratic form of the ridged moment
        index = channels_of(kept, P)
        best = np.linalg.solve(ridged[np.ix_(index, index)], ridged[index] @ W.T).T
        wrong = W.copy()
        wrong[:, index] -= best
        return np.trace(wrong @ ridged @ wrong.T)

    left = list(range(heads))
    while len(left) > 2:
        per_group = [[h for h in left if h // (heads // groups) == g] for g in range(groups)]
        able = [h for members in per_group if len(members) > 2 // groups for h in members]
        left.remove(min(able, key=lambda h: cost([k for k in left if k != h])))
        if len(left) in (2, 4):
            assert eliminate_heads(torch.tensor(W), torch.tensor(moment), len(left), heads, groups) == left or (
                groups == 2 and len(left) == 4  # there the quota of each group is another one
            )


def test_other_scores_judge_a_head_by_all_of_its_columns():
    g = torch.Generator().manual_seed(0)
    W, y = torch.randn(5, 12, generator=g), torch.randn(50, 12, generator=g)
    moment = (y.t() @ y).double()
    norms = W.double().square().sum(0)
    for score, importance in (("magnitude", norms), ("activation", norms * moment.diagonal())):
        heads = importance.view(4, 3).sum(1)
        wanted = [2 * group + int(heads[2 * group : 2 * group + 2].argmax()) for group in (0, 1)]
        layer = ScoredChannels(W, moment, heads=4, groups=2)
        assert registered("channel", score).choose(layer, 6) == channels_of(wanted, 3)
    assert len(registered("channel", "random").choose(ScoredChannels(W, heads=4, groups=2), 6)) == 6


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"repair": False}, {"pattern": "column+channel", "sparsity": 0.5}])
def test_masked_equals_cut(options):
    model, dense = random_mamba2(), random_mamba2()
    results = pruned(model, **{"sparsity": 0.5, **options})
    masked = use_stock_scan(model)(random_tokens()).logits
    assert (masked - dense(random_tokens()).logits).abs().max() > 0.01 * masked.abs().max()
    tensors, config = model.state_dict(), model.config
    if "column" in options.get("pattern", ""):
        tensors, config, _ = ARCHITECTURE.cut(tensors, config, STATE, [r.states_kept for r in results])
    for block, result in zip(model.backbone.layers, results, strict=True):
        assert [sum(24 * g <= c < 24 * g + 24 for c in result.channels_kept) for g in (0, 1)] == [12, 12]
        assert ARCHITECTURE.is_masked(block.mixer, CHANNEL, result.channels_kept)
        assert not ARCHITECTURE.is_masked(block.mixer, CHANNEL, result.channels_kept[4:])
    tensors, config, _ = ARCHITECTURE.cut(tensors, config, CHANNEL, [r.channels_kept for r in results])
    cut = Mamba2ForCausalLM(config).eval()
    cut.load_state_dict(tensors)
    assert (config.expand, config.num_heads) == (1, 6)
    assert cut.backbone.layers[0].mixer.out_proj.weight.shape == (24, 24)
    result = cut(random_tokens()).logits
    assert (result - masked).abs().mean() < 1e-2 * masked.abs().mean()  # the epsilon of the gated norm
    ARCHITECTURE.with_epsilons_of(model, config)
    assert (result - model(random_tokens()).logits).abs().max() < 1e-5 * masked.abs().max()


@torch.no_grad()
def test_a_narrowed_block_computes_what_the_cut_one_will_and_widening_gives_it_back():
    block = random_mamba2().backbone.layers[1]
    kept = channels_of([0, 2, 5, 6, 9, 10], 4)
    hidden = torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(5))
    narrow, masked, wide = ARCHITECTURE.narrow(block, CHANNEL, kept), copy.deepcopy(block), copy.deepcopy(block)
    ARCHITECTURE.mask(masked.mixer, CHANNEL, kept)
    masked.mixer.norm.variance_epsilon /= 2
    torch.testing.assert_close(narrow(hidden), masked(hidden))
    ARCHITECTURE.widen(wide, narrow, CHANNEL, kept)
    for (name, tensor), (_, wanted) in zip(wide.named_parameters(), masked.named_parameters(), strict=True):
        torch.testing.assert_close(tensor, wanted, msg=name)


@torch.no_grad()
def test_obs_and_the_refit_lose_least():
    tokens, losses = random_tokens((16, 128)), {}
    embedded = random_mamba2().backbone.embeddings(tokens)
    added = random_mamba2().backbone.layers[0](embedded) - embedded
    for score, repair in (("obs", True), ("obs", False), ("random", False)):
        model = random_mamba2()
        results = pruned(model, tokens, score=score, repair=repair)
        wrong = model.backbone.layers[0](embedded) - embedded - added
        losses[score, repair] = float(wrong.square().sum() / added.square().sum())
        if repair:
            assert results[0].out_proj.error == pytest.approx(losses[score, repair], rel=1e-2)
            assert all(r.out_proj.error < r.out_proj.error_unrepaired for r in results)
    assert losses["obs", True] < 0.9 * losses["obs", False]
    assert losses["obs", False] < 0.9 * losses["random", False]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["transformers", "mamba-ssm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_loads_in_the_stock_loader_and_generates(tmp_path, layout, dtype):
    save = {"transformers": save_transformers, "mamba-ssm": save_mamba_ssm}[layout]
    source = save(random_mamba2(dtype), tmp_path / "model")
    compress(source, out=tmp_path / "out", pattern="channel", score="random", repair=False)
    masked = load_checkpoint(tmp_path / "out", dtype=torch.float32).model
    for format in ("safetensors", "mamba-ssm"):
        result = export(tmp_path / "out", format=format, out=tmp_path / format)
        assert result.comparison.max_difference <= result.comparison.tolerance
        assert 0 < result.comparison.epsilon_difference < 1e-2 * result.comparison.scale
    again = load_checkpoint(tmp_path / "mamba-ssm", dtype=torch.float32)
    assert (again.dimensions.d_inner, again.dimensions.heads) == (24, 6)
    assert json.loads((tmp_path / "mamba-ssm" / "config.json").read_text())["ssm_cfg"]["expand"] == 1
    stock = Mamba2ForCausalLM.from_pretrained(tmp_path / "safetensors", dtype=torch.float32).eval()
    ids = random_tokens((2, 9))
    ARCHITECTURE.with_epsilons_of(masked, again.config)
    wanted = masked(ids).logits
    for model in (stock, again.model):
        assert (model(ids).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert stock.generate(ids, max_new_tokens=8, do_sample=False).shape == (2, 17)


def test_an_onnx_graph_has_as_few_heads(tmp_path):
    pytest.importorskip("onnxruntime", reason="graphs need the extra `onnx`")
    source = save_transformers(random_mamba2(), tmp_path / "model")
    compress(source, out=tmp_path / "out", pattern="channel", score="random", repair=False)
    result = export(tmp_path / "out", format="onnx", out=tmp_path / "onnx")
    assert result.comparison.max_difference <= result.comparison.tolerance
    assert result.parameters[1] < 0.7 * result.parameters[0]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sparsity": 0.25}, r"sparsity 0.25 of 48 channels \(12 heads\).* What can be: 24 \(6 heads, sparsity 0.5\)"),
        ({"sparsity": 0.75}, "cannot be exported"),
        ({"widths": "24,24,32"}, "The widths of 48 channels"),
        ({"round_channels": 8}, "round_channels does not go with the heads"),
        ({"sparsity": None, "target_params": 0.8}, "among the heads of a Mamba-2"),
    ],
)
def test_widths_that_no_stock_loader_takes_are_refused(tmp_path, options, named):
    source = save_transformers(random_mamba2(), tmp_path / "model")
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(UsageError, match=named):
        compress(source, out=tmp_path / "out", pattern="channel", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_room_for_it_is_refused(tmp_path):
    source = save_transformers(random_mamba2(expand=1, num_heads=6), tmp_path / "model")
    with pytest.raises(UsageError, match="No heads can be removed from this model of 24 channels"):
        compress(source, out=tmp_path / "out", pattern="channel")


def test_stock_transformers_takes_no_other_width():
    """The reason for refusing: three quarters of the heads, with and without a fractional expand."""
    sizes = {"hidden_size": 24, "num_heads": 9, "head_dim": 4, "state_size": 7, "n_groups": 1}
    for expand in (1, 2, 1.5):
        with pytest.raises(Exception, match=r"must equal num_heads \* head_dim|expand"):
            Mamba2Config(**sizes, expand=expand)
