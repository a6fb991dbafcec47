"""Channel pruning: the choice against brute force, the fits against direct least squares, the pipeline too."""

import copy

import numpy as np
import pytest
import torch

from ssmc.compressor import configure
from ssmc.compressor.methods.channels import prune as widths
from ssmc.compressor.methods.channels.obs import eliminate_channels
from ssmc.compressor.methods.channels.score import ScoredChannels
from ssmc.compressor.methods.registry import score as registered
from ssmc.compressor.methods.ridge import RIDGE, fit, refit
from ssmc.runtime.models.families import CHANNEL, STATE
from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.pipeline.test_pipeline import ARCHITECTURE, dtypes, random_model
from tests.support.pruning import job_of, prune_layers


def tokens_of(d, count=200, seed=0):
    """Correlated inputs of very different sizes, as channels are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(count, d, generator=generator, dtype=torch.float64) @ mix * torch.logspace(-1, 1, d).double()


def lstsq(inputs, targets, ridge):
    """argmin |inputs W' - targets|^2 + ridge |W|^2, by a direct solver on the stacked problem, (out, in)."""
    d = inputs.shape[1]
    inputs = np.vstack([inputs, ridge**0.5 * np.eye(d)])
    targets = np.vstack([targets, np.zeros((d, targets.shape[1]))])
    return np.linalg.lstsq(inputs, targets, rcond=None)[0].T


def ridge_of(x):
    return RIDGE * float(x.square().sum(0).mean())


@pytest.mark.parametrize("keep", [3, 6, 8])
def test_refit_is_least_squares(keep):
    x = tokens_of(9)
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    kept = sorted(torch.randperm(9, generator=torch.Generator().manual_seed(2))[:keep].tolist())
    ours = refit(weight, x.t() @ x, kept)
    direct = lstsq(x[:, kept].numpy(), (x @ weight.double().t()).numpy(), ridge_of(x[:, kept]))
    np.testing.assert_allclose(ours, direct, rtol=1e-6, atol=1e-9)


def test_fit_is_least_squares_to_any_target():
    x, targets = tokens_of(7), tokens_of(3, seed=5)
    direct = lstsq(x.numpy(), targets.numpy(), ridge_of(x))
    np.testing.assert_allclose(fit(targets.t() @ x, x.t() @ x), direct, rtol=1e-6, atol=1e-9)


def test_inputs_that_are_always_zero_do_no_harm():
    x = tokens_of(5)
    x[:, 2] = 0
    fitted = fit(x[:, :2].t() @ x, x.t() @ x)
    assert fitted.isfinite().all()
    assert not fitted[:, 2].any()
    assert not fit(torch.zeros(2, 3), torch.zeros(3, 3)).any()


def brute_force(weight, x, keep):
    """Greedy removal, each step by solving the whole ridged least-squares problem for every candidate."""
    ridge, left = ridge_of(x), list(range(x.shape[1]))
    targets = np.vstack([x.numpy() @ weight.double().numpy().T, ridge**0.5 * weight.double().numpy().T])
    whole = np.vstack([x.numpy(), ridge**0.5 * np.eye(x.shape[1])])  # the ridge as tokens of its own

    def error(kept):
        solution = np.linalg.lstsq(whole[:, kept], targets, rcond=None)[0]
        return ((whole[:, kept] @ solution - targets) ** 2).sum()

    while len(left) > keep:
        costs = {j: error([k for k in left if k != j]) for j in left}
        left.remove(min(costs, key=costs.get))
    return left


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("keep", [1, 4, 11])
def test_elimination_is_that_of_brute_force(keep, block):
    x = tokens_of(12)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    assert eliminate_channels(weight, x.t() @ x, keep, block) == brute_force(weight, x, keep)


def test_channels_by_activation_and_magnitude():
    x = tokens_of(12)
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
    norms = weight.double().numpy() ** 2
    for score, importance in (
        ("magnitude", norms.sum(0)),
        ("activation", norms.sum(0) * (x.numpy() ** 2).sum(0)),
    ):
        kept = registered("channel", score).choose(ScoredChannels(weight, x.t() @ x), 4)
        assert kept == sorted(np.argsort(-importance)[:4].tolist())
    draw = registered("channel", "random").choose
    draws = {tuple(draw(ScoredChannels(weight, seed=seed), 4)) for seed in (0, 0, 1, 2)}
    assert 1 < len(draws) <= 3


# --- in a model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return random_model(layers=3)


@pytest.fixture
def tokens():
    return torch.randint(61, (4, 50), generator=torch.Generator().manual_seed(1))


def prune(model, tokens, removed=(), **options):
    pruned = use_fast_scan(copy.deepcopy(model))
    config = configure(model="test", **{"pattern": "channel", "sparsity": 0.25, "round_channels": 1, **options})
    results = prune_layers(pruned, ARCHITECTURE, tokens, config, dtypes(model), removed=removed)
    return pruned, results


@torch.no_grad()
def watched(model, tokens, layer):
    """What x_proj and out_proj of a layer read, what out_proj and the block put out, in stock transformers."""
    seen, hooks = {}, []
    model = use_stock_scan(copy.deepcopy(model))
    block = model.backbone.layers[layer]
    places = {"block": block, "x_proj": block.mixer.x_proj, "out_proj": block.mixer.out_proj}
    for name, module in places.items():
        hooks.append(
            module.register_forward_hook(
                lambda m, arguments, output, name=name: seen.update({name: (arguments[0], output)})
            )
        )
    model(tokens, use_cache=False)
    return seen


def test_the_first_layer_by_hand_from_transformers_own_activations(model, tokens):
    """Choice, both fits and the reported error of layer 0, from hooks on the stock model."""
    pruned, results = prune(model, tokens)
    dense, after = watched(model, tokens, 0), watched(pruned, tokens, 0)
    kept = list(results[0].channels_kept)
    y = dense["out_proj"][0].flatten(0, 1).double()
    weight = model.backbone.layers[0].mixer.out_proj.weight.detach()
    assert kept == brute_force(weight, y, 18)
    u = dense["x_proj"][0].flatten(0, 1).double()
    x_proj = model.backbone.layers[0].mixer.x_proj.weight.detach().double()
    direct = lstsq(u[:, kept].numpy(), (u @ x_proj.t()).numpy(), ridge_of(u[:, kept]))
    np.testing.assert_allclose(
        pruned.backbone.layers[0].mixer.x_proj.weight[:, kept].detach(), direct, rtol=1e-2, atol=1e-4
    )
    read = after["out_proj"][0].flatten(0, 1).double()[:, kept]
    bias = model.backbone.layers[0].mixer.out_proj.bias.detach()
    target = (dense["block"][1] - after["block"][0] - bias).flatten(0, 1).double()
    old = weight[:, kept].double()
    direct = lstsq(read.numpy(), (target - read @ old.t()).numpy(), ridge_of(read)) + old.numpy()
    fitted = pruned.backbone.layers[0].mixer.out_proj.weight[:, kept].detach()
    np.testing.assert_allclose(fitted, direct, rtol=1e-2, atol=1e-4)
    error = ((target - read @ fitted.double().t()) ** 2).sum() / (target**2).sum()
    assert results[0].out_proj.error == pytest.approx(float(error), rel=1e-3)
    assert results[0].out_proj.error < results[0].out_proj.error_unrepaired


@pytest.mark.parametrize("removed", [(), (1,)])
def test_later_layers_are_fitted_to_the_dense_models_stream(model, tokens, removed):
    """The target of layer 2 is the dense model's stream less what the pruned layers before it make of it."""
    pruned, results = prune(model, tokens, removed=removed)
    dense, after = watched(model, tokens, 2), watched(pruned, tokens, 2)
    kept = list(results[2].channels_kept)
    read = after["out_proj"][0].flatten(0, 1).double()[:, kept]
    bias = model.backbone.layers[2].mixer.out_proj.bias.detach()
    target = (dense["block"][1] - after["block"][0] - bias).flatten(0, 1).double()
    old = model.backbone.layers[2].mixer.out_proj.weight.detach()[:, kept].double()
    direct = lstsq(read.numpy(), (target - read @ old.t()).numpy(), ridge_of(read)) + old.numpy()
    fitted = pruned.backbone.layers[2].mixer.out_proj.weight[:, kept].detach()
    np.testing.assert_allclose(fitted, direct, rtol=1e-2, atol=1e-4)
    for layer in removed:
        assert ARCHITECTURE.is_removed(pruned.backbone.layers[layer])


def test_dropped_channels_are_zero_everywhere_and_the_rest_is_untouched(model, tokens):
    pruned, results = prune(model, tokens)
    before, after = model.state_dict(), pruned.state_dict()
    for i, result in enumerate(results):
        kept = list(result.channels_kept)
        assert len(kept) == 18
        dropped = [d for d in range(24) if d not in kept]
        prefix = f"backbone.layers.{i}.mixer."
        for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "D"):
            assert not after[prefix + name][dropped].any(), name
            assert torch.equal(after[prefix + name][kept], before[prefix + name][kept]), name
        for half in (0, 24):
            for name in ("in_proj.weight", "in_proj.bias"):
                assert not after[prefix + name][[half + d for d in dropped]].any()
                rows = [half + d for d in kept]
                assert torch.equal(after[prefix + name][rows], before[prefix + name][rows])
        assert not after[prefix + "x_proj.weight"][:, dropped].any()
        assert not after[prefix + "out_proj.weight"][:, dropped].any()
        assert torch.equal(after[prefix + "A_log"], before[prefix + "A_log"])


@torch.no_grad()
def test_channels_that_say_nothing_new_go_without_loss(model, tokens):
    """Half of the channels are copies of the others, in another order: with the repair nothing may be lost."""
    for block in model.backbone.layers:
        mixer, copies = block.mixer, 23 - torch.arange(12)
        for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
            parameter = mixer.get_parameter(name)
            parameter[copies] = parameter[:12].clone()
        for half in (0, 24):
            for parameter in mixer.in_proj.parameters():
                parameter[half + copies] = parameter[half : half + 12].clone()
    dense = model(tokens, use_cache=False).logits
    distance = {}
    for repair in (True, False):
        pruned, results = prune(model, tokens, sparsity=0.5, repair=repair)
        distance[repair] = (pruned(tokens, use_cache=False).logits - dense).square().mean()
        assert all(len({min(d, 23 - d) for d in result.channels_kept}) == 12 for result in results)
        assert not repair or max(result.out_proj.error for result in results) < 1e-3
    assert distance[True] < distance[False] / 100


def test_without_repair_the_kept_weights_stay(model, tokens):
    pruned, results = prune(model, None, score="magnitude", repair=False)
    for block, dense, result in zip(pruned.backbone.layers, model.backbone.layers, results, strict=True):
        norms = dense.mixer.out_proj.weight.double().square().sum(0)
        assert list(result.channels_kept) == sorted(norms.argsort(descending=True)[:18].tolist())
        kept = list(result.channels_kept)
        assert torch.equal(block.mixer.out_proj.weight[:, kept], dense.mixer.out_proj.weight[:, kept])
        assert torch.equal(block.mixer.x_proj.weight[:, kept], dense.mixer.x_proj.weight[:, kept])
        assert result.out_proj is None


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["channel", "column+channel"])
def test_cut_tensors_compute_what_the_masked_ones_do(model, tokens, pattern):
    """Biases included (this model has them), in transformers' own forward."""
    pruned, results = prune(model, tokens, pattern=pattern, sparsity=0.5)
    tensors, config = pruned.state_dict(), pruned.config
    if pattern != "channel":
        tensors, config, _ = ARCHITECTURE.cut(tensors, config, STATE, [r.states_kept for r in results])
    tensors, config, _ = ARCHITECTURE.cut(tensors, config, CHANNEL, [r.channels_kept for r in results])
    assert (config.intermediate_size, config.state_size) == (12, 6 if pattern == "channel" else 3)
    small = type(model)(config).eval()
    small.load_state_dict(tensors)
    masked = use_stock_scan(pruned)(tokens, use_cache=False).logits
    torch.testing.assert_close(small(tokens, use_cache=False).logits, masked, rtol=1e-4, atol=1e-4)


def test_widths_and_states_of_their_own_for_each_layer(model, tokens):
    _, results = prune(model, tokens, pattern="column+channel", widths=[24, 10, 5], states="6,3,1")
    assert results[0].channels_kept is None  # all of them stay
    assert [len(r.channels_kept) for r in results[1:]] == [10, 5]
    assert [len(r.states_kept) for r in results] == [6, 3, 1]


def test_the_same_run_gives_the_same_bits(model, tokens):
    first, second = (prune(model, tokens, pattern="column+channel")[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_more_text_than_tells_the_moments_is_left_out(monkeypatch):
    """The choice looks at the first samples that hold enough tokens, and at no others."""
    model = use_fast_scan(random_model())
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 16, model.config.hidden_size, generator=generator)
    hidden[2:] *= torch.logspace(0, 1, 16)[:, None]  # other text, which would decide otherwise
    d_inner = model.config.intermediate_size
    monkeypatch.setattr(widths, "TOKENS_PER_CHANNEL", 0)
    config = configure(model="test", pattern="channel")

    def pruned(samples, tokens):
        monkeypatch.setattr(widths, "TOKENS", tokens)
        block = copy.deepcopy(model.backbone.layers[0])
        with torch.no_grad():
            job = job_of(ARCHITECTURE, block, samples, config=config, keep=(16, d_inner // 2))
            widths.prune_channels(job)
        return job.channels_kept, block.mixer.x_proj.weight

    kept, x_proj = pruned(hidden, tokens=2 * 16)
    first, refitted = pruned(hidden[:2], tokens=10**6)
    everything, _ = pruned(hidden, tokens=10**6)
    assert kept == first != everything
    assert torch.equal(x_proj, refitted)


def test_the_metric_of_fisher_foretells_what_errors_in_the_stream_cost():
    """Small errors behind each layer, against the divergence that they really make; tokens alone, as it takes them."""
    from ssmc.compressor.calibration.placement import HOST
    from ssmc.compressor.methods.channels.fisher import stream_roots
    from ssmc.compressor.methods.method import Survey
    from ssmc.compressor.options.config import configure
    from ssmc.compressor.plan import plan_without_counts
    from ssmc.runtime.models.families import architecture_for
    from ssmc.runtime.models.fast import use_fast_scan
    from ssmc.runtime.progress import NO_PROGRESS
    from tests.support.models import random_model, random_tokens

    model, architecture = use_fast_scan(random_model()), architecture_for("mamba")
    tokens = random_tokens((8000, 1), seed=3)
    plan = plan_without_counts(
        configure(model="m", pattern="channel"), architecture, architecture.dimensions(model.config)
    )
    roots = stream_roots(Survey(plan, model, tokens, None, HOST, NO_PROGRESS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        dense = model(tokens).logits.log_softmax(-1)
        for root, block in zip(roots, architecture.blocks(model), strict=True):
            error = 0.02 * torch.randn(24, generator=generator)
            hook = block.register_forward_hook(lambda _, __, out, error=error: out + error)
            moved = model(tokens).logits.log_softmax(-1)
            hook.remove()
            divergence = float((dense.exp() * (dense - moved)).sum(-1).mean())
            foretold = float((root @ error.double()).square().sum()) / 2
            assert foretold == pytest.approx(divergence, rel=0.15)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_fisher_chooses_other_heads_than_obs(tmp_path):
    import ssmc

    short = {"pattern": "channel", "sparsity": 0.5, "nsamples": 4, "seqlen": 128}
    kept = [
        [
            layer.channels_kept
            for layer in ssmc.compress("tiny-mamba2", out=tmp_path / score, score=score, **short).layers
        ]
        for score in ("obs", "fisher")
    ]
    assert kept[0] != kept[1]
    assert [len(channels) for channels in kept[0]] == [len(channels) for channels in kept[1]]
