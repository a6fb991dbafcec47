"""Memory of sequences: counted from sizes, against the caches that stock transformers allocates."""

import json

import pytest
import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.inspection import footprint
from ssmc.runtime.models.memory import Footprint, Room, SequenceMemory, parse_bytes, rooms
from ssmc.runtime.models.outline import outline, read_outline
from tests.support.commandline import run
from tests.support.families import FAMILIES, random_ids
from tests.support.models import random_mamba2, random_model, save_transformers

EVERY = {"mamba": random_model, "mamba2": random_mamba2, **FAMILIES}
BATCH, LENGTH = 3, 11


def allocated(cache, *names):
    """Bytes of the tensors that a cache of transformers holds, wherever they hang."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in names]
    found = [list(value.values()) if isinstance(value, dict) else [value] for value in held]
    return sum(tensor.nbytes for tensors in found for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_counts_are_what_stock_transformers_allocates(family, dtype, tmp_path):
    model = EVERY[family]().to(dtype)
    whole = outline(load_checkpoint(save_transformers(model, tmp_path / family)))
    try:
        output = model(random_ids(BATCH, LENGTH), use_cache=True)
    except RuntimeError as error:  # torch's grouped products want wider experts in half precision
        pytest.skip(str(error))
    cache = getattr(output, "past_key_values", None) or output.cache_params
    found = footprint(whole, LENGTH).sequence
    assert BATCH * found.states == allocated(cache, "recurrent_states") > 0
    assert BATCH * found.windows == allocated(cache, "conv_states") > 0
    assert BATCH * found.attention == allocated(cache, "keys", "values")
    assert bool(found.attention) == (family not in ("mamba", "mamba2", "falcon_mamba"))
    stored = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}  # a tied head once
    assert footprint(whole, LENGTH).weights == sum(stored.values())


def test_how_many_fit():
    model = Footprint(1000, SequenceMemory(8, 60, 30, 10))
    assert model.total(3) == 1300
    assert model.fitting(Room("all", 1299)) == 2
    assert model.fitting(Room("beside", 1299, with_weights=False)) == 12
    assert model.fitting(Room("less than the weights", 999)) is None
    assert [room.bytes for room in rooms(5)] == [2**30, 5, 16 * 10**9, 24 * 10**9, 80 * 10**9]


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 2**33), ("512 MiB", 2**29), ("16GB", 16 * 10**9), ("1.5g", 15 * 10**8), (4096, 4096), ("100B", 100)],
)
def test_amounts_of_memory_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "8 gigs", "0", "8iB", "nan"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match=r"is no amount of memory\. Write a number"):
        parse_bytes(text)


def test_inspect_says_first_what_is_left_of_a_compressed_model(tmp_path, capsys):
    """Heads and layers gone from a Mamba-2, beside what its export really is."""
    out = tmp_path / "out"
    options = ("--pattern", "layer+column", "--sparsity", "layer=0.2,column=0.75")
    done = run(
        capsys, "compress", "tiny-mamba2", *options, "--no-repair", "--out", out, "--nsamples", 1, "--seqlen", 16
    )
    assert done.code == 0
    assert run(capsys, "export", out).code == 0
    found = {}
    for name, model in (("compressed", out), ("this export", out / "safetensors")):
        file = tmp_path / f"{name}.json"
        done = run(capsys, "inspect", model, "--json", file, "--length", 100)
        assert done.code == 0
        assert done.out.startswith("Sequences in memory, 100 tokens each")
        found[name] = json.loads(file.read_text())["memory"]
        assert list(found[name]) == ["dense", name, "with int8 states"]
    assert found["compressed"]["dense"] == found["this export"]["dense"]
    smaller = found["this export"]["this export"]
    assert found["compressed"]["compressed"]["sequence"] == smaller["sequence"]
    assert found["compressed"]["compressed"]["weights"] == pytest.approx(smaller["weights"], rel=1e-3)
    assert smaller["weights"] == read_outline(out / "safetensors").weight_bytes
    dense, gib = found["compressed"]["dense"], "1 GiB beside the weights"
    assert smaller["sequence"]["states"] * 5 == dense["sequence"]["states"]  # 4 of 5 layers, a quarter of the states
    assert smaller["sequences"][gib] == 2**30 // smaller["bytes_per_sequence"] > 4 * dense["sequences"][gib]
