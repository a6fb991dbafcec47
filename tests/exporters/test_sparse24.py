"""2:4: packing against a loop and against torch, the export as stock transformers sees it, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass
from transformers import MambaForCausalLM

import ssmc
from ssmc.compressor import compress
from ssmc.exporters import export
from ssmc.runtime.errors import CheckpointError, OutputError, UsageError, VerificationError
from ssmc.runtime.measure.sources import find_sources, weight_bytes
from ssmc.runtime.models.checkpoints import load_checkpoint, tensor_bytes, write_checkpoint
from ssmc.runtime.models.checkpoints.packed_format import FILE, pack_tensors
from ssmc.runtime.sparse24 import HALF, TILES, Packed24, backends_for, is_24, obstacle, pack24, unpack24
from tests.support.commandline import run
from tests.support.models import logits, random_model, random_tokens, save_transformers

IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


def matrix_24(rows, columns, dtype=torch.float32, seed=0, kept=(0, 1, 2)):
    """A random matrix whose groups keep a random number of entries out of `kept`, at random places."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows * columns // 4, 4, generator=g)
    order = torch.rand(groups.shape, generator=g).argsort(1).argsort(1)
    most = torch.tensor(kept)[torch.randint(len(kept), (len(groups), 1), generator=g)]
    return torch.where(order < most, groups, 0).view(rows, columns).to(dtype)


def pack_by_hand(weight):
    """The layout, written down from its description."""
    values, indices = [], []
    for row in weight.tolist():
        nibbles, kept = [], []
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            places = [i for i, x in enumerate(group) if x != 0]
            places += [i for i in range(4) if i not in places][: 2 - len(places)]
            low, high = sorted(places)
            kept += [group[low], group[high]]
            nibbles.append(low + 4 * high)
        nibbles += [0] * (len(nibbles) % 2)
        values.append(kept)
        indices.append([a + 16 * b for a, b in zip(nibbles[::2], nibbles[1::2], strict=True)])
    return values, indices


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8), (5, 12), (2, 4), (7, 68)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packing_is_what_its_description_says_and_gives_everything_back(shape, dtype):
    weight = matrix_24(*shape, dtype)
    packed = pack24(weight)
    values, indices = pack_by_hand(weight)
    assert packed.values.tolist() == values
    assert packed.indices.tolist() == indices
    assert packed.values.dtype == dtype
    back = unpack24(packed)
    assert back.dtype == dtype
    assert torch.equal(back, weight)
    assert torch.equal(back.signbit(), weight.signbit())


def test_the_values_are_those_that_torch_gives_to_tensor_cores():
    """torch's own packing for CUTLASS runs on a CPU; where every group is full there is one order to keep."""
    weight = matrix_24(64, 128, torch.float16, kept=(2,))
    values, _ = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(pack24(weight).values, values)


def test_half_precision_takes_nine_sixteenths():
    weight = matrix_24(64, 128, torch.bfloat16)
    packed = pack24(weight)
    assert packed.values.nbytes + packed.indices.nbytes == 0.5625 * weight.nbytes


def test_what_is_not_24_is_not_packed():
    weight = matrix_24(4, 16)
    assert is_24(weight)
    weight[2, 4:8] = torch.tensor([1.0, 0, float("nan"), 3])
    assert not is_24(weight)
    with pytest.raises(ValueError, match="not 2:4"):
        pack24(weight)
    assert not is_24(torch.zeros(3, 6))  # no whole groups
    assert not is_24(torch.zeros(3, 1, 4))
    assert not is_24(matrix_24(4, 16).t().contiguous().view(16, 4) + 1)


@pytest.mark.parametrize(
    ("values", "indices", "message"),
    [
        (torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.uint8), "no pairs"),
        (torch.ones(2, 4), torch.full((2, 2), 0x44, dtype=torch.uint8), "do not go with"),
        (torch.ones(2, 4), torch.full((2, 1), 0x44), "do not go with"),
        (torch.ones(2, 4), torch.full((2, 1), 0x54, dtype=torch.uint8), "do not rise"),  # 1 and 1
        (torch.ones(2, 4), torch.full((2, 1), 0x41, dtype=torch.uint8), "do not rise"),  # 1, then 0
    ],
)
def test_damaged_packing_is_noticed(values, indices, message):
    with pytest.raises(ValueError, match=message):
        unpack24(Packed24(values, indices))


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_tiles_are_those_of_torch():
    for name, backend in (
        ("cusparselt", SparseSemiStructuredTensorCUSPARSELT),
        ("cutlass", SparseSemiStructuredTensorCUTLASS),
    ):
        assert name == backend.BACKEND
        for dtype in HALF:
            constraint = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert TILES[name] == (constraint.sparse_min_rows, constraint.sparse_min_cols)


def test_which_backend_takes_the_modules_of_mamba_130m():
    assert backends_for(3072, 768) == ("cusparselt", "cutlass")  # in_proj
    assert backends_for(768, 1536) == ("cusparselt", "cutlass")  # out_proj
    assert backends_for(80, 1536) == ("cusparselt",)  # x_proj, 16 states
    assert backends_for(64, 1536) == ("cusparselt", "cutlass")  # x_proj, 8 states
    assert backends_for(1536, 48) == ("cusparselt",)  # dt_proj, whose weight is never given to a product of its own
    assert "directly" in obstacle("dt_proj", (1536, 48))
    assert "depthwise" in obstacle("conv1d", (1536, 4))
    assert obstacle("x_proj", (80, 1536)) is None
    assert backends_for(72, 1536) == backends_for(80, 24) == ()
    assert "no backend takes 72 x 1536" in obstacle("x_proj", (72, 1536))


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse24") / "out"
    compress("tiny", out=out, pattern="2:4", ffn_score="magnitude")
    export(out, format="sparse24")
    export(out, format="sparse24", packed=True)
    return out


@pytest.fixture
def copy(artefact, tmp_path):
    """An artefact that a test may damage."""
    shutil.copytree(artefact, tmp_path / "copy", ignore=shutil.ignore_patterns("sparse24*"))
    return tmp_path / "copy"


def test_stock_transformers_loads_it_with_the_logits_of_the_masked_model(artefact):
    tokens = torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))
    exported, info = MambaForCausalLM.from_pretrained(artefact / "sparse24", dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert exported.dtype == torch.float16  # as tiny is stored
    masked = MambaForCausalLM.from_pretrained(artefact, dtype=torch.float16)
    assert torch.equal(logits(exported, tokens), logits(masked, tokens))
    torch.testing.assert_close(logits(exported.float(), tokens), logits(masked.float(), tokens), rtol=1e-4, atol=1e-4)
    config = json.loads((artefact / "sparse24" / "config.json").read_text())
    assert not config.keys() & {"sparsity_config", "compression_config", "quantization_config"}


def test_the_manifest_names_the_modules_and_they_are_24(artefact):
    about = json.loads((artefact / "sparse24" / "ssmc.json").read_text())["sparse24"]
    stored = load_file(artefact / "sparse24" / "model.safetensors")
    assert len(about["modules"]) == 6 * 5
    by_name = {module["name"]: module for module in about["modules"]}
    for name, module in by_name.items():
        weight = stored[f"{name}.weight"].squeeze(1)
        assert list(weight.shape) == module["shape"]
        zeros = (weight.view(-1, 4) == 0).sum(1)
        assert zeros.min() >= 2
        assert not weight[weight == 0].signbit().any()
    assert by_name["backbone.layers.0.mixer.in_proj"]["backends"] == ["cusparselt", "cutlass"]
    assert by_name["backbone.layers.0.mixer.x_proj"]["backends"] == ["cusparselt"]  # 48 rows
    assert by_name["backbone.layers.0.mixer.dt_proj"]["backends"] == []
    assert about["dtype"] == "float16"
    assert about["rounding"]["max_difference"] <= about["rounding"]["tolerance"]


def test_half_precision_is_chosen_by_the_model_or_the_user(tmp_path):
    model = random_model(hidden_size=32, time_step_rank=4)
    save_transformers(model, tmp_path / "model")
    compress(tmp_path / "model", out=tmp_path / "out", pattern="2:4", ffn_score="magnitude")
    masked = load_checkpoint(tmp_path / "out").tensors()
    for dtype, wanted in ((None, torch.bfloat16), ("float16", torch.float16)):
        result = export(tmp_path / "out", format="sparse24", dtype=dtype, force=True)
        stored = load_file(result.directory / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {wanted}
        for name, tensor in masked.items():
            assert torch.equal(stored[name], tensor.to(wanted)), name
        assert 0 < result.details.rounding.max_difference <= result.details.rounding.tolerance
        stock = MambaForCausalLM.from_pretrained(result.directory, dtype=torch.float32)
        reference = model.float()
        reference.load_state_dict({k: v.to(wanted).float() for k, v in masked.items()}, strict=False)
        torch.testing.assert_close(logits(stock), logits(reference), rtol=1e-4, atol=1e-4)


def test_the_packed_file_holds_the_same_numbers_and_only_ssmc_reads_it(artefact):
    packed = artefact / "sparse24-packed"
    dense, ours = load_checkpoint(artefact / "sparse24"), load_checkpoint(packed)
    assert ours.format == "sparse24-packed"
    for name, tensor in dense.tensors().items():
        assert torch.equal(tensor.view(torch.int16), ours.tensors()[name].view(torch.int16)), name
    assert torch.equal(logits(dense.model, random_tokens()), logits(ours.model, random_tokens()))
    model, tokenizer = ssmc.load(packed, dtype=torch.float32)
    assert model(**tokenizer("Once upon a time", return_tensors="pt")).logits.isfinite().all()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        MambaForCausalLM.from_pretrained(packed)
    manifest = json.loads((packed / "ssmc.json").read_text())
    assert "only ssmc" in manifest["sparse24"]["storage"]
    assert "Only ssmc reads" in (packed / "README.md").read_text()
    assert {FILE, "README.md", "config.json"} <= manifest["files"].keys()


def test_sizes_of_the_packed_file(artefact):
    stored = load_file(artefact / "sparse24-packed" / FILE)
    tensors = load_checkpoint(artefact / "sparse24").tensors()
    halves = [name for name in stored if name.endswith(".sparse24_values")]
    assert len(halves) == 6 * 4  # conv1d is no matrix
    saved = sum(tensors[name.removesuffix(".sparse24_values")].nbytes for name in halves)
    assert tensor_bytes(stored) == tensor_bytes(tensors) - round(0.4375 * saved)
    packed = load_checkpoint(artefact / "sparse24-packed")
    assert weight_bytes(packed) == (artefact / "sparse24-packed" / FILE).stat().st_size


def test_a_packed_model_is_a_model_like_any_other(artefact, tmp_path):
    """Written again it is an ordinary checkpoint, and bench finds the export."""
    packed = load_checkpoint(artefact / "sparse24-packed")
    write_checkpoint(tmp_path, packed.tensors(), packed.config)
    assert load_checkpoint(tmp_path).format == "transformers"
    MambaForCausalLM.from_pretrained(tmp_path)
    assert [s.name.rpartition("/")[2] for s in find_sources(artefact)] == ["tiny", "sparse24"]


@pytest.mark.parametrize("damage", ["half", "twice", "positions", "gone"])
def test_a_damaged_packed_file_is_noticed(artefact, tmp_path, damage):
    folder = tmp_path / "packed"
    shutil.copytree(artefact / "sparse24-packed", folder)
    stored = load_file(folder / FILE)
    if damage == "half":
        del stored[f"{IN_PROJ}.sparse24_indices"]
    elif damage == "twice":
        stored[IN_PROJ] = torch.zeros(1024, 256, dtype=torch.float16)
    elif damage == "positions":
        stored[f"{IN_PROJ}.sparse24_indices"][3, 3] = 0xFF
    save_file(stored, folder / FILE)
    if damage == "gone":
        (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"other half|twice|do not rise|holds no weights"):
        load_checkpoint(folder)


def test_what_is_not_24_is_refused_and_nothing_is_left(copy, tmp_path):
    compress("tiny", out=tmp_path / "column", score="magnitude", repair=False)
    compress("tiny", out=tmp_path / "states", pattern="2:4", scope="ssm", score="magnitude")
    for other in ("column", "states"):
        with pytest.raises(UsageError, match=r"no 2:4 modules.*ssmc compress MODEL --pattern 2:4 --scope ffn"):
            export(tmp_path / other, format="sparse24")
        assert not (tmp_path / other / "sparse24").exists()
    stored = load_file(copy / "model.safetensors")
    stored[IN_PROJ][0, :4] = 1
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mixer\.in_proj .* is not 2:4"):
        export(copy, format="sparse24")
    assert not list(copy.glob("*sparse24*"))


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    model = random_model(hidden_size=32, time_step_rank=4)
    with torch.no_grad():
        model.backbone.layers[0].mixer.D[0] = 1e6
    save_transformers(model, tmp_path / "model")
    compress(tmp_path / "model", out=tmp_path / "out", pattern="2:4", ffn_score="magnitude")
    with pytest.raises(UsageError, match=r"layers\.0\.mixer\.D .* too large for float16. Use --dtype bfloat16"):
        export(tmp_path / "out", format="sparse24", dtype="float16")


def test_weights_that_vanish_in_float16_are_noticed(tmp_path):
    """A finite model, but another one: in_proj is below float16's smallest number, what is around makes up for it."""
    model = random_model(hidden_size=32, time_step_rank=4)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.norm.weight.mul_(1e4)
            block.mixer.in_proj.weight.mul_(1e-8)
            block.mixer.conv1d.weight.mul_(1e4)
            block.mixer.out_proj.weight.mul_(1e4)
    save_transformers(model, tmp_path / "model")
    compress(tmp_path / "model", out=tmp_path / "out", pattern="2:4", ffn_score="magnitude")
    with pytest.raises(VerificationError, match="range does not hold"):
        export(tmp_path / "out", format="sparse24", dtype="float16")
    assert not (tmp_path / "out" / "sparse24").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "safetensors", "packed": True}, "option of the format sparse24"),
        ({"format": "mamba-ssm", "dtype": "float16"}, "option of the format sparse24"),
        ({"format": "sparse24", "dtype": "float32"}, "do not take float32"),
    ],
)
def test_options_that_make_no_sense_are_refused(artefact, options, message):
    with pytest.raises(UsageError, match=message):
        export(artefact, **options)


def test_nothing_is_overwritten_unasked(artefact):
    with pytest.raises(OutputError, match="exists already"):
        export(artefact, format="sparse24")


def test_the_command_line_says_what_takes_the_modules(capsys, copy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run(capsys, "export", copy, "--format", "sparse24", "--dtype", "bfloat16")
    assert outcome.code == 0
    assert "in_proj 6 1024 x 256 cusparselt, cutlass" in outcome.words
    assert "dt_proj 6 512 x 16 none" in outcome.words
    assert load_checkpoint(copy / "sparse24").dtypes[IN_PROJ] == torch.bfloat16
    packed = run(capsys, "export", copy, "--format", "sparse24", "--packed")
    assert "vLLM sparse24 no" in packed.words
    assert (copy / "sparse24-packed" / FILE).is_file()
    refused = run(capsys, "export", copy, "--packed", "--force")
    assert "option of the format sparse24" in refused.sentence(2)


def test_packing_a_model_without_24_changes_nothing():
    tensors = load_checkpoint("tiny").tensors()
    assert pack_tensors(tensors).keys() == tensors.keys()
