"""What is written in transformers' layout loads in stock transformers, and what must not be written is not."""

import errno
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from tests.support.checkpoints import (
    DTYPES,
    EMBEDDING,
    HEAD,
    LAYOUTS,
    NORM,
    same,
    stock,
    write,
)
from tests.support.models import (
    PADDED,
    logits,
    random_model,
    save_transformers,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB", 1000])
def test_stock_transformers_loads_what_is_written(tmp_path, model_directory, dtype, layout, max_shard_size):
    checkpoint = load_checkpoint(model_directory(layout, dtype))
    out = write(tmp_path / "out", checkpoint, max_shard_size=max_shard_size)
    model = stock(out)
    assert model.dtype == dtype
    assert same(model.state_dict(), checkpoint.model.state_dict())
    assert torch.equal(logits(model), logits(checkpoint.model))
    shards = sorted(out.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size != "5GB")
    stored = list(itertools.chain(*(safetensors.torch.load_file(shard) for shard in shards)))
    assert sorted(stored) == sorted(set(checkpoint.model.state_dict()) - {HEAD})
    assert same(load_checkpoint(out).tensors(), checkpoint.tensors())


def test_safetensors_say_their_framework(tmp_path, model_directory):
    out = write(tmp_path / "out", load_checkpoint(model_directory()))
    with safetensors.safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_d_inner_that_is_no_multiple_of_d_model(tmp_path):
    model = random_model(intermediate_size=41)
    save_transformers(model, tmp_path / "t")
    checkpoint = load_checkpoint(tmp_path / "t")
    assert checkpoint.dimensions.d_inner == 41
    out = write(tmp_path / "out", checkpoint)
    assert torch.equal(logits(stock(out)), logits(model))


def test_numbers_that_overflow_are_not_written(tmp_path, model_directory):
    checkpoint = load_checkpoint(model_directory("transformers", torch.float16), dtype=torch.float32)
    with torch.no_grad():
        checkpoint.model.backbone.norm_f.weight[3] = 1e6  # fits float32, not float16
    for layout in LAYOUTS:
        with pytest.raises(CheckpointError, match=NORM):
            write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config, format=layout)
    assert list(tmp_path.iterdir()) == []


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    model = random_model()
    tensors = dict(model.state_dict())
    tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], torch.zeros(100_000, 24)])[:PADDED]
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        files = write_checkpoint(tmp_path / layout, tensors | {HEAD: tensors[EMBEDDING]}, model.config, format=layout)
        assert sum(f.stat().st_size for f in files) < 200_000


def test_there_are_two_formats(tmp_path):
    model = random_model()
    with pytest.raises(UsageError, match=r"gguf.*transformers, mamba-ssm"):
        write_checkpoint(tmp_path, model.state_dict(), model.config, format="gguf")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small disk")
def test_a_full_disk(tmp_path):
    """On a real disk of 4 MB: neither library raises OSError by itself."""
    (tmp_path / "disk").mkdir()
    program = """
import sys, pathlib
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint
from ssmc.runtime.errors import OutputError
from ssmc.runtime.files import new_directory
disk, tiny = pathlib.Path(sys.argv[1]), load_checkpoint("tiny")
for layout in ("transformers", "mamba-ssm"):
    try:
        with new_directory(disk / "out") as folder:
            write_checkpoint(folder, tiny.tensors(), tiny.config, format=layout)
    except OutputError as error:
        print(error)
    assert list(disk.iterdir()) == []
"""
    command = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", tmp_path / "disk", sys.executable, program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("this system does not let us mount a small disk")
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 2
    assert all("no space left" in sentence and "--out" in sentence for sentence in sentences)


def test_other_errors_of_the_system_stay_what_they_are(tmp_path, model_directory, monkeypatch):
    checkpoint = load_checkpoint(model_directory())

    def refuse(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("ssmc.runtime.models.checkpoints.writing._write", refuse)
    with pytest.raises(OSError, match="Input/output error") as caught:
        write_checkpoint(tmp_path, checkpoint.tensors(), checkpoint.config)
    assert caught.value.errno == errno.EIO
