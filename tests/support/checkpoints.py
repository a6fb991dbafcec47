"""Reading and writing model directories in tests: what both layouts hold, and errors that name what is wrong."""

import json

import pytest
import torch
from transformers import MambaForCausalLM

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint, write_checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["transformers", "mamba-ssm"]
A_LOG, NORM = "backbone.layers.1.mixer.A_log", "backbone.norm_f.weight"
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def stock(directory, **options):
    """transformers' own loading, which must find nothing missing, unexpected or misshapen."""
    model, info = MambaForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


def written(directory):
    """Content of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def write(directory, checkpoint, **options):
    directory.mkdir()
    files = write_checkpoint(directory, checkpoint.tensors(), checkpoint.config, **options)
    assert sorted(files) == sorted(directory.iterdir())
    return directory


def same(one, other):
    return (
        one.keys() == other.keys()
        and all(one[k].dtype == other[k].dtype for k in one)
        and all(torch.equal(one[k], other[k]) for k in one)
    )


def change_json(path, **values):
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def refused(source, *named):
    """Reading must fail with one or two sentences that hold all of `named`."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    message = str(caught.value)
    assert all(str(word) in message for word in named), message
    assert "\n" not in message
    assert len(message) < 500
    assert message.rstrip()[-1] == "."
    return message
