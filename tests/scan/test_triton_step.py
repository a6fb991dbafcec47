"""The small kernels around the scan, against torch: on a GPU, or through Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn

from ssmc.runtime.models.fast import use_fast_scan, use_stock_scan
from tests.support.families import FAMILIES
from tests.support.gpu import HAS_CUDA
from tests.support.models import random_mamba2, random_model, random_tokens

pytest.importorskip("triton", reason="Triton is not installed; it comes with PyTorch for CUDA on Linux")
step = pytest.importorskip("ssmc.runtime.scan.gpu.step")

DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 24, 130])
def test_a_norm_is_its_formula(dtype, weight_dtype, width):
    x, weight = (3 * normal(2, 5, width)).to(dtype), normal(width, seed=1).to(weight_dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = exact * weight.double()
    got = step.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-3).cpu()
    assert got.dtype == torch.promote_types(dtype, weight_dtype)
    rounding = max(torch.finfo(dtype).eps, torch.finfo(got.dtype).eps)  # of the norm, then of the product
    torch.testing.assert_close(got.double(), wanted, rtol=2 * rounding, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_rates_are_minus_the_exponential(dtype):
    a_log = normal(37, 9).to(dtype)
    got = step.decay_rates(a_log.to(DEVICE)).cpu()
    torch.testing.assert_close(got.double(), -a_log.double().exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "sum_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
@pytest.mark.parametrize("as_weight", [True, False])
def test_a_sum_and_its_norm_are_what_one_after_the_other_gives(dtype, sum_dtype, as_weight):
    x, added, weight = normal(2, 3, 24).to(sum_dtype), normal(2, 3, 24, seed=1).to(dtype), normal(24, seed=2).to(dtype)
    wanted = x + added
    read = wanted.to(dtype) if as_weight else wanted
    total, normed = step.add_and_norm(*(t.to(DEVICE) for t in (x, added, weight)), 1e-3, sum_dtype, as_weight)
    assert torch.equal(total.cpu(), wanted)
    after = step.rms_norm(read.to(DEVICE), weight.to(DEVICE), 1e-3)
    torch.testing.assert_close(normed, after, rtol=2 * torch.finfo(dtype).eps, atol=0)  # the interpreter cuts bits off


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("batch", "channels", "width"), [(1, 5, 2), (3, 300, 4)])
def test_one_more_input_is_convolved_and_its_window_moves_on(batch, channels, width, biased):
    window, wide = normal(batch, channels, width), normal(batch, 1, 2 * channels, seed=1)
    taps, bias = normal(channels, 1, width, seed=2), normal(channels, seed=3) if biased else None
    x = wide[..., channels:]  # as in_proj puts it out
    moved = torch.cat([window[..., 1:], x.transpose(1, 2)], dim=-1)
    exact = (moved.double() * taps.squeeze(1).double()).sum(-1, keepdim=True) + (0 if bias is None else bias[:, None])
    given, weights = window.to(DEVICE), (taps.to(DEVICE), None if bias is None else bias.to(DEVICE))
    got = step.conv_token(wide.to(DEVICE)[..., channels:], given, *weights).cpu()
    torch.testing.assert_close(got.double(), nn.functional.silu(exact).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(given.cpu(), moved)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "mamba2", *FAMILIES])
def test_every_family_computes_the_same_with_them(family):
    model = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}[family]()
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and hasattr(m, "variance_epsilon")]
    tokens, fast = random_tokens((2, 7)), use_fast_scan(copy.deepcopy(model).to(DEVICE), "triton")
    ran = []
    for norm in fast.modules():
        if "_ssmc_norm" in vars(norm):
            norm.register_forward_hook(lambda module, given, got: ran.append(module))
    wanted = model(tokens).logits  # on the CPU: mamba_ssm's kernels multiply float32 with 10 bits
    got = fast(tokens.to(DEVICE)).logits.cpu()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert len(set(map(id, ran))) == len(norms) > 0
    use_stock_scan(fast)
    assert not any("forward" in vars(module) for module in fast.modules())


def test_a_norm_that_needs_gradients_has_them():
    model = use_fast_scan(random_model().to(DEVICE), "triton")
    norm = model.backbone.norm_f
    x = normal(2, 3, 24).to(DEVICE).requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert isinstance(norm.weight.grad, torch.Tensor)
    assert isinstance(norm, nn.Module)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_a_token_more_takes_one_kernel_for_a_sum_and_its_norm(family, monkeypatch):
    """Every block ends in it, so that of all norms the first alone is computed by itself."""
    model = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}[family]()
    tokens, fast = random_tokens((2, 7)), use_fast_scan(copy.deepcopy(model).to(DEVICE), "triton")
    ran = []
    for name in ("add_and_norm", "rms_norm", "conv_token"):
        own = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *given, name=name, own=own: ran.append(name) or own(*given))
    wanted = model(tokens).logits
    read = fast(tokens[:, :6].to(DEVICE), use_cache=True)
    assert (ran.count("add_and_norm"), ran.count("rms_norm")) == (model.config.num_hidden_layers, 1)
    got = fast(tokens[:, 6:].to(DEVICE), use_cache=True, cache_params=read.cache_params)
    torch.testing.assert_close(got.logits.cpu(), wanted[:, 6:], rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert (ran.count("add_and_norm"), ran.count("rms_norm")) == (2 * model.config.num_hidden_layers, 2)
    assert ran.count("conv_token") == model.config.num_hidden_layers
