"""Models that are not what they should be."""

import shutil

import pytest
import safetensors.torch
import torch


@pytest.fixture
def damage(tmp_path, model_directory):
    """A function that copies a model, lets its caller damage the tensors, and returns the directory."""

    def change(layout, edit):
        directory = shutil.copytree(model_directory(layout), tmp_path / "damaged")
        if layout == "transformers":
            tensors = safetensors.torch.load_file(directory / "model.safetensors")
            edit(tensors)
            safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        else:
            tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
            edit(tensors)
            torch.save(tensors, directory / "pytorch_model.bin")
        return directory

    return change


@pytest.fixture
def sharded(tmp_path, model_directory):
    return shutil.copytree(model_directory(sharded=True), tmp_path / "m")
