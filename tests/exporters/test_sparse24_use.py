"""Running 2:4 modules on sparse tensor cores: what happens without them, how a way is chosen, and that it is the same.

Conversion itself needs a GPU; the tests that do say so and are skipped without one.
"""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import gpu, gpu_common, gpu_sparse24
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.measure.timing import Timing
from ssmc.runtime.sparse24 import Sparse24Linear, cuda, is_24, use_sparse24
from ssmc.runtime.sparse24.use import choose, compare, modules_24
from tests.exporters.test_sparse24 import matrix_24
from tests.support.families import jamba
from tests.support.gpu import HAS_CUDA
from tests.support.models import logits, random_model, random_tokens

SPARSE_CORES = HAS_CUDA and cuda.why_dense(torch.device("cuda"), torch.float16) is None


def needs_sparse_cores(test):
    skip = pytest.mark.skipif(not SPARSE_CORES, reason="needs a CUDA GPU with sparse tensor cores")
    return pytest.mark.gpu(skip(test))


def model_24(dtype=torch.float32, **sizes):
    """A random model whose projections are 2:4."""
    model = random_model(hidden_size=64, intermediate_size=128, state_size=8, time_step_rank=16, **sizes)
    with torch.no_grad():
        for block in model.backbone.layers:
            for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
                weight = getattr(block.mixer, name).weight
                weight.mul_(matrix_24(*weight.shape, kept=(2,)) != 0)
    return model.to(dtype)


# --- without sparse tensor cores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_model_stays_as_it_is_and_one_sentence_says_why(dtype):
    model = model_24(dtype)
    before = copy.deepcopy(model)
    report = use_sparse24(model, batch=2, length=16)
    assert report.reason.startswith("2:4 modules run dense: sparse tensor cores are parts of NVIDIA GPUs")
    assert "\n" not in report.reason
    assert report.kept == 0
    assert [m.name for m in report.modules[:4]] == [
        f"backbone.layers.0.mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
    ]
    assert len(report.modules) == 3 * 4
    assert report.modules[1].shape == (32, 128)
    assert not any(m.kept or m.dense for m in report.modules)
    assert torch.equal(logits(model, random_tokens()), logits(before, random_tokens()))


def test_only_24_modules_are_found():
    assert not list(modules_24(random_model()))
    model = model_24()
    with torch.no_grad():
        model.backbone.layers[1].mixer.in_proj.weight[0, :3] = 1
    names = [name for name, _, _ in modules_24(model)]
    assert len(names) == 3 * 4 - 1
    assert "backbone.layers.1.mixer.in_proj" not in names


def test_blocks_without_a_mixer_are_passed_over():
    model = jamba(hidden_size=32, mamba_dt_rank=16)  # mixers in blocks 0, 1 and 3, attention in block 2
    weight = model.model.layers[3].mamba.in_proj.weight
    with torch.no_grad():
        weight.mul_(matrix_24(*weight.shape, kept=(2,)) != 0)
    assert [name for name, _, _ in modules_24(model)] == ["model.layers.3.mamba.in_proj"]
    assert use_sparse24(model).reason.startswith("2:4 modules run dense")


def test_the_reasons_why_a_gpu_runs_dense():
    assert "Tesla T4 (sm_75) has no sparse tensor cores" in cuda.why_dense_on("Tesla T4", (7, 5), torch.float16)
    assert "the model is float32" in cuda.why_dense_on("NVIDIA A100", (8, 0), torch.float32)
    assert cuda.why_dense_on("NVIDIA A100", (8, 0), torch.float16) is None
    assert cuda.why_dense_on("NVIDIA H100", (9, 0), torch.bfloat16) is None


def test_a_backend_that_refuses_is_a_reason_and_no_error():
    """torch converts CUDA tensors only, so on a CPU both backends refuse; its global choice is as before."""
    made, refused = cuda.to_sparse(matrix_24(64, 64, torch.float16))
    assert not made
    assert refused.keys() == {"cusparselt", "cutlass"}
    assert all("cpu" in why and "\n" not in why for why in refused.values())
    assert cuda.to_sparse(matrix_24(48, 16, torch.float16))[1].keys() == {"cusparselt"}
    assert cuda.to_sparse(matrix_24(24, 16, torch.float16)) == ({}, {})
    assert torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS is False


def test_wrong_inputs():
    with pytest.raises(UsageError, match="at least 1, not 0 and 8"):
        use_sparse24(model_24(), batch=0, length=8)
    with pytest.raises(CheckpointError, match="not a model ssmc can compress"):
        use_sparse24(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=16)))


# --- choosing ---------------------------------------------------------------------------------------------------------


def linear(dtype=torch.float32):
    module = nn.Linear(64, 96, dtype=dtype)
    with torch.no_grad():
        module.weight.copy_(matrix_24(96, 64, kept=(2,)))
    return module


@pytest.mark.parametrize(
    ("seconds", "backend", "kept", "reason"),
    [
        ({"dense": [2.0] * 8, "a": [1.5] * 8, "b": [1.0] * 8}, "b", True, ""),
        ({"dense": [2.0] * 8, "a": [1.0] * 8, "b": [1.5] * 8}, "a", True, ""),
        ({"dense": [1.0] * 8, "a": [2.0] * 8}, "a", False, "sparse is slower"),
        ({"dense": [1.0] * 8, "a": [0.9] * 4 + [1.1] * 4}, "a", False, "sparse is no faster beyond noise"),
        ({"dense": [2.0] * 3, "a": [1.0] * 3}, "a", False, "sparse is no faster beyond noise"),  # too few rounds
    ],
)
def test_sparse_is_kept_only_where_it_is_faster_beyond_noise(seconds, backend, kept, reason):
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    row = choose("layer.in_proj", (96, 64), timings)
    assert (row.backend, row.kept, row.reason) == (backend, kept, reason)
    assert (row.dense, row.sparse) == (timings["dense"], timings[backend])
    assert row.ratio.median == pytest.approx(row.dense.median / row.sparse.median, rel=0.2)


def test_every_way_is_timed_and_must_compute_the_same_map():
    """Ways that a CPU really has: torch's sparse rows, one that fails and one that is another map."""
    module, x = linear(), torch.randn(2, 8, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sparse rows are new to torch
        csr = module.weight.detach().to_sparse_csr()

    def by_rows(x):
        return (csr @ x.flatten(0, 1).t()).t().view(2, 8, 96) + module.bias

    def failing(x):
        raise RuntimeError("no kernel image is available\nC++ stack")

    row = compare("layer.in_proj", module, {"rows": by_rows}, x, rounds=3)
    assert row.backend == "rows"
    assert len(row.dense.seconds) == len(row.sparse.seconds) == 3
    ways = {"failing": failing, "other": lambda x: 1.05 * module(x), "nan": lambda x: module(x) * float("nan")}
    row = compare("layer.in_proj", module, ways, x, refused={"first": "it said no"})
    assert not row.kept
    assert row.dense is None
    assert row.reason == (
        "first: it said no; failing: no kernel image is available; other: it computes something else (relative error "
        "0.05); nan: it computes something else (relative error nan)"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_tensor_of_torch_gets_as_far_as_its_kernel(bias):
    """torch's conversion for CUTLASS is plain torch, so everything but the product itself runs on a CPU."""
    module = nn.Linear(64, 96, bias=bias, dtype=torch.float16)
    with torch.no_grad():
        module.weight.copy_(matrix_24(96, 64))
    packed, meta = sparse_semi_structured_from_dense_cutlass(module.weight.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the interface is a prototype
        tensor = SparseSemiStructuredTensorCUTLASS(module.weight.shape, packed, meta, None, None, None)
    candidate = Sparse24Linear(tensor, module.bias)
    assert isinstance(candidate.weight, SparseSemiStructuredTensorCUTLASS)
    row = compare("layer.in_proj", module, {"cutlass": candidate}, torch.randn(2, 8, 64, dtype=torch.float16))
    assert not row.kept
    kernel = "_sparse_semi_structured_addmm" if bias else "_sparse_semi_structured_mm"
    assert row.reason == f"cutlass: Could not run 'aten::{kernel}' with arguments from the 'CPU' backend"


def test_calls_of_few_tokens_use_the_dense_weight():
    weight, dense, bias = torch.ones(4, 8), torch.full((4, 8), 2.0), torch.zeros(4)
    module = Sparse24Linear(weight, bias, dense, few=6)
    assert module(torch.ones(1, 5, 8)).unique().tolist() == [16]
    assert module(torch.ones(2, 3, 8)).unique().tolist() == [8]
    assert Sparse24Linear(weight, bias)(torch.ones(1, 1, 8)).unique().tolist() == [8]
    transposed = torch.ones(2, 8, 3).transpose(1, 2)  # as transformers' own scan puts it out
    assert module(transposed).shape == (2, 3, 4)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match=r"no CUDA device here.*or with --dry-run"):
        gpu.main()


def test_the_benchmark_makes_24_matrices_of_the_largest_weights():
    linear = nn.Linear(64, 96)
    before = linear.weight.detach().clone()
    after = gpu_common.make_24(linear).weight
    assert is_24(after)
    groups = before.view(-1, 4)
    second = groups.abs().sort(dim=1).values[:, 2:3]
    assert torch.equal(after.view(-1, 4), groups.where(groups.abs() >= second, torch.zeros(())))
    rows = gpu_sparse24.sparse_modules(gpu_common.TOY, torch.device("cpu"))
    assert [(row.what, row.note[:8]) for row in rows] == [
        (f"{name}, {backend}", "refused:") for name in ("in_proj", "out_proj") for backend in ("cusparselt", "cutlass")
    ]


# --- with them --------------------------------------------------------------------------------------------------------


@needs_sparse_cores
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_every_module_is_measured_and_the_model_computes_the_same(dtype):
    model = model_24(dtype).cuda()
    tokens = random_tokens((4, 64)).cuda()
    before = logits(model, tokens)
    report = use_sparse24(model, batch=4, length=64)
    assert report.reason is None
    for row in report.modules:
        if row.name.endswith("dt_proj"):
            assert "directly" in row.reason
        else:
            assert row.dense.median > 0
            assert row.sparse.median > 0
            assert bool(row.reason) != row.kept
    torch.testing.assert_close(logits(model, tokens), before, rtol=0.05, atol=0.05 * float(before.abs().max()))


@needs_sparse_cores
def test_on_a_gpu_conversion_gives_the_same_matrix():
    weight = matrix_24(64, 128, torch.float16).cuda()
    made, refused = cuda.to_sparse(weight)
    assert made, refused
    for sparse in made.values():
        assert torch.equal(sparse.to_dense(), weight)
