"""Column pruning of a Mamba-2: statistics against loops, masked against cut, exports against stock loaders."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from transformers import Mamba2ForCausalLM

from ssmc.compressor import compress, configure
from ssmc.compressor.calibration.draw import draw_samples
from ssmc.compressor.methods.states.c_rows import (
    CRowsTask,
    ReadoutGrams,
    Sampling,
    fit_c_rows,
    input_windows,
)
from ssmc.compressor.methods.states.collect import collect
from ssmc.compressor.methods.states.contributions import Contributions, loss_of
from ssmc.compressor.methods.states.elimination import SCALED_RIDGE, eliminate_from, eliminate_scaled
from ssmc.exporters import export
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.families import STATE, architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.tokenizers import load_tokenizer
from ssmc.runtime.text import read_texts, tokenize
from ssmc.runtime.tiny import calibration_path, heldout_path
from tests.support.models import LAYERS, VOCAB, random_mamba2, save_mamba_ssm, save_transformers
from tests.support.pruning import job_of, prune_layers

ARCHITECTURE = architecture_for("mamba2")
SAMPLES, LENGTH = 3, 70


def random_tokens(shape=(SAMPLES, LENGTH), seed=3) -> torch.Tensor:
    return torch.randint(1, VOCAB - 1, shape, generator=torch.Generator().manual_seed(seed))


def naive_readouts(block, hidden) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In float64, token after token, from the formula: contributions C_t[n] h_t (B, L, H, P, N), skips' inputs u
    (B, L, H, P), and the gain of every channel (B, L, H, P) by which gate and gated norm multiply the read-out."""
    mixer = block.mixer
    heads, P, groups, N = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    d, per_group = heads * P, heads // groups
    x = block.norm(hidden)
    proj = (x @ mixer.in_proj.weight.t()).double().numpy()  # z, x, B, C, dt
    z, xBC, dt = proj[..., :d], proj[..., d:-heads], proj[..., -heads:]
    weight, bias = mixer.conv1d.weight[:, 0].double().numpy(), mixer.conv1d.bias.double().numpy()
    K = weight.shape[1]
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    conv = np.zeros_like(xBC)
    for t in range(xBC.shape[1]):
        for k in range(K):
            if t - K + 1 + k >= 0:
                conv[:, t] += weight[:, k] * xBC[:, t - K + 1 + k]
    conv = silu(conv + bias)
    dt = np.log1p(np.exp(dt + mixer.dt_bias.double().numpy()))
    u = conv[..., :d].reshape(*conv.shape[:2], heads, P)
    B, C = (part.reshape(*conv.shape[:2], groups, N) for part in np.split(conv[..., d:], 2, axis=-1))
    A, D = -np.exp(mixer.A_log.double().numpy()), mixer.D.double().numpy()
    h = np.zeros((len(hidden), heads, P, N))
    reads = np.zeros((*u.shape, N))
    for t in range(hidden.shape[1]):
        for k in range(heads):
            g = k // per_group
            drive = dt[:, t, k, None, None] * u[:, t, k, :, None] * B[:, t, g, None, :]
            h[:, k] = np.exp(dt[:, t, k] * A[k])[:, None, None] * h[:, k] + drive
            reads[:, t, k] = h[:, k] * C[:, t, g, None, :]
    gate = silu(z).reshape(u.shape)
    gated = (reads.sum(-1) + D[:, None] * u) * gate
    by_group = gated.reshape(*gated.shape[:2], groups, -1)
    scale = 1 / np.sqrt((by_group**2).mean(-1) + mixer.norm.variance_epsilon)  # (B, L, G)
    gain = gate * np.repeat(scale, per_group, axis=2)[..., None] * mixer.norm.weight.double().numpy().reshape(heads, P)
    return reads, u, gain


@pytest.fixture(scope="module")
def layer():
    """A layer of a random model, what it reads, and the sums over it of one group."""
    block = random_mamba2().backbone.layers[1]
    hidden = torch.randn(SAMPLES, LENGTH, 24, generator=torch.Generator().manual_seed(4))
    sums = [Contributions(heads=6) for _ in range(2)]
    with torch.no_grad():
        for group, statistic in enumerate(sums):
            collect(job_of(ARCHITECTURE, block, hidden), [statistic], group)
        return sums, naive_readouts(block, hidden)


@pytest.mark.parametrize("group", [0, 1])
def test_the_error_of_losing_any_set_is_the_one_measured(layer, group):
    sums, (reads, u, gain) = layer
    heads = slice(6 * group, 6 * group + 6)
    reads, u, gain = reads[:, :, heads], u[:, :, heads], gain[:, :, heads]
    energy = ((reads.sum(-1) * gain) ** 2).sum()
    for removed in ([], [3], [0, 2, 5], list(range(7))):
        lost = reads[..., removed].sum(-1) * gain
        loss = loss_of(sums[group], removed, repair=True)
        assert loss.energy == pytest.approx(energy, rel=1e-5)
        assert loss.error_unrepaired == pytest.approx((lost**2).sum(), rel=1e-5, abs=1e-6 * energy)
        skips = (u * gain).reshape(-1, 6, 4)  # least squares, head by head
        losts = lost.reshape(-1, 6, 4)
        change = (losts * skips).sum((0, 2)) / (skips**2).sum((0, 2))
        mended = lost - change[:, None] * u * gain
        assert loss.error == pytest.approx((mended**2).sum(), rel=1e-5, abs=1e-6 * energy)
        for k in range(6):  # least squares: every other change of the skip is worse
            for step in (-1e-2, 1e-2):
                other = change + step * np.eye(6)[k]
                assert ((lost - other[:, None] * u * gain) ** 2).sum() >= (mended**2).sum()
    assert loss_of(sums[group], list(range(7)), repair=True).error < 0.999 * loss.error_unrepaired


def test_elimination_takes_the_cheapest_state_each_time(layer):
    Q = layer[0][0].errors(True)
    for keep in (6, 4, 2):
        removed = []
        while len(removed) < 7 - keep:
            rest = [n for n in range(7) if n not in removed]
            removed.append(min(rest, key=lambda n: float(Q[[*removed, n]][:, [*removed, n]].sum())))
        assert eliminate_from(Q, keep) == sorted(set(range(7)) - set(removed))
    best = min(itertools.combinations(range(7), 1), key=lambda R: float(Q[list(R)][:, list(R)].sum()))
    assert eliminate_from(Q, 6) == sorted(set(range(7)) - set(best))


def test_elimination_with_scales_takes_the_state_whose_loss_scales_mend_best(layer):
    """Against least squares from scratch for every candidate: r' Q r least over r on what stays, r = -1 on the rest."""
    Q = layer[0][0].errors(True).numpy()
    Q = Q + SCALED_RIDGE * Q.diagonal().mean() * np.eye(7)

    def cost(removed):
        stay = [n for n in range(7) if n not in removed]
        r = -np.ones(7)
        r[stay] = np.linalg.solve(Q[np.ix_(stay, stay)], Q[np.ix_(stay, removed)].sum(1))
        return r @ Q @ r

    removed = []
    for keep in (6, 5, 4, 3, 2, 1):
        removed.append(min(set(range(7)) - set(removed), key=lambda n: cost([*removed, n])))
        assert eliminate_scaled(layer[0][0].errors(True), keep) == sorted(set(range(7)) - set(removed))


def test_the_fit_of_the_readers_minimises_the_error_that_is_measured():
    """S_t gives the error of any C, so that of C with rows missing, and the fit only makes it smaller."""
    block = random_mamba2().backbone.layers[1]
    hidden = torch.randn(SAMPLES, LENGTH, 24, generator=torch.Generator().manual_seed(4))
    statistic, kept = ReadoutGrams(6, Sampling()), [0, 2, 3, 6]
    with torch.no_grad():
        job = job_of(ARCHITECTURE, block, hidden)
        reads, _, gain = naive_readouts(block, hidden)
        collect(job, [statistic], 1)
        starts, grams = statistic.stretches()
        assert starts == [0]  # the last stretch is a short one
        readers = ARCHITECTURE.readers(block.mixer, 1)
        task = CRowsTask(input_windows(job, starts, 64, readers), grams, readers, kept)
        rows = torch.arange(SAMPLES)
        before = task.error(rows, [None if t is None else t[kept] for t in vars(readers).values()], torch.zeros(6))
        lost = reads[:, :64, 6:][..., [1, 4, 5]].sum(-1) * gain[:, :64, 6:]
        energy = ((reads[:, :64, 6:].sum(-1) * gain[:, :64, 6:]) ** 2).sum()
        assert before == pytest.approx((lost**2).sum() / energy, rel=1e-4)
        fit = fit_c_rows(job, 1, statistic, kept)
    assert fit.error <= fit.error_before
    changed = random_mamba2().backbone.layers[1].mixer
    moved = (block.mixer.in_proj.weight != changed.in_proj.weight).any(dim=1).nonzero().flatten().tolist()
    first = 48 + 48 + 2 * 7 + 7  # z, x, B of both groups, C of the first
    assert set(moved) <= {first + state for state in kept}


def test_many_short_samples_are_fitted_on_some_of_them(monkeypatch):
    """Of samples of one stretch none could be left out in time: the memory would not do, and nothing was kept."""
    monkeypatch.setattr("ssmc.compressor.methods.states.c_rows.MOST_BYTES", 4 * 13**2 * 20 * 10)  # S_t of 200 tokens
    _, results = pruned(use_fast_scan(random_mamba2()), random_tokens((32, 20)))
    errors = [(result.states.error, result.states.error_unrepaired) for result in results]
    assert all(0 < error <= before for error, before in errors)
    assert any(error < before for error, before in errors)


def pruned(model, tokens=None, **options):
    """The model, pruned on random tokens, and what was kept in each layer."""
    config = configure(model="test", **options)
    dtypes = dict.fromkeys(model.state_dict(), torch.float32)
    results = prune_layers(
        use_fast_scan(model), ARCHITECTURE, random_tokens() if tokens is None else tokens, config, dtypes
    )
    return [result.states_kept for result in results], results


SCORES = ["exact", "ghost", "energy", "sparsessm", "sparsessm-l2", "sparsessm-vote", "random"]


@torch.no_grad()
@pytest.mark.parametrize("score", SCORES)
def test_masked_equals_shrunk(score):
    model = random_mamba2()
    before = model(random_tokens()).logits
    kept, _ = pruned(model, score=score, sparsity=0.6)
    for states in kept:
        assert [sum(7 * g <= n < 7 * g + 7 for n in states) for g in (0, 1)] == [3, 3], "as many in each group"
    masked = model(random_tokens()).logits
    assert (masked - before).abs().max() > 0.01 * before.abs().max()
    tensors, config, cuts = ARCHITECTURE.cut(model.state_dict(), model.config, STATE, kept)
    shrunk = Mamba2ForCausalLM(config)
    shrunk.load_state_dict(tensors)
    assert config.state_size == 3
    assert len(cuts) == 3 * LAYERS
    assert shrunk.backbone.layers[0].mixer.conv1d.weight.shape == (48 + 2 * 2 * 3, 1, 4)
    assert shrunk.backbone.layers[0].mixer.in_proj.weight.shape == (48 + 48 + 12 + 12, 24)
    assert (shrunk.eval()(random_tokens()).logits - masked).abs().max() < 1e-5 * masked.abs().max()


@torch.no_grad()
def test_a_silent_state_has_no_bias_left():
    """silu(bias) is not zero: zero rows of in_proj alone would leave a constant B."""
    mixer = random_mamba2().backbone.layers[0].mixer
    assert not ARCHITECTURE.is_masked(mixer, STATE, range(1, 14))
    ARCHITECTURE.mask_states(mixer, list(range(1, 14)))
    assert ARCHITECTURE.is_masked(mixer, STATE, range(1, 14))
    assert not ARCHITECTURE.is_masked(mixer, STATE, range(2, 14))
    for channel in (48, 48 + 14):  # B and C of state 0
        mixer.conv1d.bias[channel] = 0.1
        assert not ARCHITECTURE.is_masked(mixer, STATE, range(1, 14))
        mixer.conv1d.bias[channel] = 0


@torch.no_grad()
def test_the_default_loses_least_and_repair_mends():
    ids, losses = random_tokens((8, 256)), {}
    dense = random_mamba2()
    hidden = dense(ids, output_hidden_states=True).hidden_states
    for score, repair in (("exact", False), ("exact", True), ("random", False)):
        model = random_mamba2()
        _, results = pruned(model, ids, score=score, repair=repair, sparsity=0.5)
        first = model(ids, output_hidden_states=True).hidden_states[1] - hidden[1]
        losses[score, repair] = float(first.square().sum())
        if score == "exact":
            assert all(r.states.error <= r.states.error_unrepaired for r in results)
            assert results[0].states.repaired is repair
            assert (results[0].out_proj is not None) is repair
    assert losses["exact", True] < 0.8 * losses["exact", False] < 0.8 * losses["random", False]


@pytest.mark.parametrize("layout", ["transformers", "mamba-ssm"])
def test_an_export_loads_in_the_stock_loader_and_generates(tmp_path, layout):
    save = {"transformers": save_transformers, "mamba-ssm": save_mamba_ssm}[layout]
    source = save(random_mamba2(n_groups=1, state_size=16), tmp_path / "model")
    compress(source, out=tmp_path / "out", score="random", repair=False, round_to=8)  # without a text or tokenizer
    masked = load_checkpoint(tmp_path / "out").model
    for format in ("safetensors", "mamba-ssm"):
        result = export(tmp_path / "out", format=format, out=tmp_path / format)
        assert result.comparison.max_difference <= result.comparison.tolerance
    shrunk = Mamba2ForCausalLM.from_pretrained(tmp_path / "safetensors").eval()
    assert shrunk.config.state_size == 8
    again = load_checkpoint(tmp_path / "mamba-ssm")
    assert again.dimensions.d_state == 8
    assert json.loads((tmp_path / "mamba-ssm" / "config.json").read_text())["ssm_cfg"]["d_state"] == 8
    ids = random_tokens((2, 9))
    with torch.no_grad():
        wanted = masked(ids).logits
        for model in (shrunk, again.model):
            assert (model(ids).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    written = [m.generate(ids, max_new_tokens=8, do_sample=False) for m in (masked, shrunk)]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"score": "magnitude"}, "one A_log for all"),
    ],
)
def test_what_is_not_carried_out_is_refused(tmp_path, options, named):
    source = save_transformers(random_mamba2(), tmp_path / "model")
    with pytest.raises(UsageError, match=named):
        compress(source, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_trained_model_is_there_and_loses_little():
    """`tiny-mamba2` with half of its states gone, on text it has not seen."""
    checkpoint = load_checkpoint("tiny-mamba2", dtype=torch.float32)
    tokenizer = load_tokenizer(checkpoint)
    heldout = tokenize(read_texts(heldout_path()), tokenizer)[:1024].view(4, 256)
    model = use_fast_scan(checkpoint.model)
    dense = float(model(heldout, labels=heldout).loss)
    assert dense < 3.4
    tokens = draw_samples(calibration_path(), tokenizer, 1, 256, seed=0).tokens
    prune_layers(model, ARCHITECTURE, tokens, configure(model="test", repair=False), checkpoint.dtypes)
    assert dense < float(model(heldout, labels=heldout).loss) < dense + 0.05
