"""Tensors that are read when they are wanted are those that are read at once, whatever is done to them on the way."""

import os
import shutil

import pytest
import safetensors.torch
import torch

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.checkpoints.deferred import Deferred, deferred, real
from ssmc.runtime.models.checkpoints.weight_files import OpenSafetensors
from ssmc.runtime.models.checkpoints.writing import Shards
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.checkpoints import LAYOUTS
from tests.support.families import FAMILIES, random_ids
from tests.support.models import save_transformers

ROWS = torch.tensor([2, 0])
WORK = {
    "cast": lambda t: t.to(torch.float16),
    "cut": lambda t: t.index_select(0, ROWS).contiguous(),
    "picked": lambda t: t[ROWS],
    "views": lambda t: t.view(2, 6).t().flatten(),
    "scaled": lambda t: -torch.exp(t.float())[:, None] * 2,
    "joined": lambda t: torch.stack([torch.cat([t, t]), torch.cat([t, 2 * t])]),
    "split": lambda t: t.chunk(2)[1],
    "one by one": lambda t: list(torch.stack([t, t]))[1].split([1, 3])[1],
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_work_is_put_off_until_numbers_are_wanted(work):
    numbers, read = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), []

    def make():
        read.append(1)
        return numbers

    later = work(deferred(numbers.to("meta"), make))
    wanted = work(numbers)
    assert isinstance(later, Deferred)
    assert not read
    assert (later.shape, later.dtype, later.device, later.nbytes) == (
        wanted.shape,
        wanted.dtype,
        wanted.device,
        wanted.nbytes,
    )
    assert torch.equal(real(later), wanted)
    assert read


def test_questions_about_numbers_read_and_writing_is_refused():
    numbers = torch.tensor([[1.0, 2.0]])
    later = deferred(numbers.to("meta"), lambda: numbers)
    assert later.sum().item() == 3
    assert (later == numbers).all()
    assert later.numpy().tolist() == later.tolist() == [[1.0, 2.0]]
    for write in (lambda: later.mul_(2), lambda: later.__setitem__(0, 1), lambda: later[0].mul_(2)):
        with pytest.raises(TypeError, match="writes to"):
            write()


def test_copies_may_be_written_to():
    numbers = torch.tensor([1.0, 2.0])
    later = deferred(numbers.to("meta"), lambda: numbers)
    copy = later.clone()
    before = copy * 10
    assert copy.mul_(later) is copy
    copy[0] = 5
    assert [real(t).tolist() for t in (later, before, copy, copy)] == [[1, 2], [10, 20], [5, 4], [5, 4]]


@pytest.mark.parametrize("most", ["5GB", 300])
def test_files_are_those_of_safetensors(tmp_path, most):
    """Byte for byte, whatever types are mixed, in whatever order the tensors come."""
    g = torch.Generator().manual_seed(0)
    types = [torch.bfloat16, torch.float32, torch.float16]
    tensors = {f"{'zyx'[i % 3]}.{i}é": torch.randn(i + 1, 3, generator=g).to(types[i % 3]) for i in range(9)}
    tensors["scalar"] = torch.tensor(1.5)
    shards = Shards(tmp_path, tensors, most)
    for name in reversed(tensors):
        shards.put({name: tensors[name]})
    files = shards.close()
    assert len(files) == (1 if most == "5GB" else len(shards.files) + 1)
    for path in shards.files:
        held = safetensors.torch.load_file(path)
        safetensors.torch.save_file(held, tmp_path / "own", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "own").read_bytes()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in held.items())
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["mamba", *(name for name in FAMILIES if name != "zamba2")])
def test_a_model_in_its_files_computes_what_one_in_memory_does(tmp_path, name, model_directory):
    if name == "mamba":
        folder = model_directory()
    else:
        folder = tmp_path / "model"
        save_transformers(FAMILIES[name](), folder)
    whole, streamed = (load_checkpoint(folder, dtype=torch.float32, lazy=lazy) for lazy in (False, True))
    streamed.streamed.kept = 0  # small as it is, it would be read once and stay
    ids = random_ids(2, 12)
    with torch.no_grad():
        wanted, got = (use_fast_scan(model.model)(ids).logits for model in (whole, streamed))
        assert torch.equal(got, wanted)
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
        assert all(torch.equal(real(t), whole.tensors()[n]) for n, t in streamed.tensors().items())
        streamed.read()
        assert torch.equal(streamed.model(ids).logits, wanted)
    names = [[name for name, _ in model.model.named_parameters()] for model in (whole, streamed)]
    assert names[0] == names[1]  # what is tied is one parameter again
    assert streamed.streamed is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_change_or_vanish_while_they_are_read(tmp_path, layout, model_directory):
    (path,) = shutil.copytree(model_directory(layout), tmp_path / "m").glob("*model.*")
    checkpoint = load_checkpoint(path.parent, lazy=True)
    tensor = next(iter(checkpoint.tensors().values()))
    real(tensor)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match=r"changed while it was read. Run again"):
        real(tensor)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        real(tensor)


def test_a_file_that_gets_shorter_while_it_is_read(tmp_path, model_directory, monkeypatch):
    """Between the look at it and the reading, that is: no death, as mapped memory would mean."""
    path = shutil.copytree(model_directory(), tmp_path / "m") / "model.safetensors"
    monkeypatch.setattr(OpenSafetensors, "check", lambda self: None)
    checkpoint = load_checkpoint(path.parent, lazy=True)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        [real(tensor) for tensor in checkpoint.tensors().values()]
