"""Models and texts that several test files read; nobody may change them."""

import pytest
import torch

import tests.support.gpu  # noqa: F401 (float32 is float32 on a GPU)
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.text import read_texts
from ssmc.runtime.tiny import heldout_path
from tests.support.models import random_model, save_mamba_ssm, save_transformers


@pytest.fixture(scope="session")
def tiny():
    """The embedded trained model, in float32."""
    return load_checkpoint("tiny", dtype=torch.float32)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A function that makes directories of one and the same random model: layout, dtype, in shards or not."""
    made = {}

    def make(layout="transformers", dtype=torch.float32, sharded=False):
        key = (layout, dtype, sharded)
        if key not in made:
            directory = tmp_path_factory.mktemp("model") / f"{layout}-{str(dtype).removeprefix('torch.')}-{sharded}"
            if layout == "transformers":
                save_transformers(random_model(dtype), directory, **({"max_shard_size": "8KB"} if sharded else {}))
            else:
                save_mamba_ssm(random_model(dtype), directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Two windows of held-out text and a little."""
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(read_texts(heldout_path()).joined()[:5000])
    return str(path)


def pytest_collection_modifyitems(items):
    """Files named test_triton* run kernels; see `tests/support/gpu.py`."""
    for item in items:
        if item.path.name.startswith("test_triton"):
            item.add_marker(pytest.mark.gpu)
