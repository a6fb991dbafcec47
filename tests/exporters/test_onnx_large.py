"""A graph above protobuf's limit of 2 GB. Needs minutes, 12 GB of memory and 6 GB of disk: SSMC_LARGE=1 runs it."""

import os
import shutil

import numpy as np
import psutil
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from ssmc.exporters import export
from ssmc.exporters.onnx.running import fresh_states, open_written, run

LIMIT = 2**31

pytestmark = pytest.mark.skipif(os.environ.get("SSMC_LARGE") != "1", reason="large: set SSMC_LARGE=1 to run it")


@torch.no_grad()
def test_a_model_above_two_gigabytes(tmp_path):
    if psutil.virtual_memory().available < 12 * 2**30 or shutil.disk_usage(tmp_path).free < 6 * 2**30:
        pytest.skip("too little memory or disk")
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=8000, hidden_size=2560, num_hidden_layers=14, state_size=16)
    model = MambaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "large")
    result = export(tmp_path / "large", format="onnx", out=tmp_path / "onnx")
    assert result.weight_bytes[1] > LIMIT
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size > LIMIT
    tokens = torch.arange(5)[None]
    session = open_written(tmp_path / "onnx")
    logits, states = run(session, tokens[:, :4].numpy(), fresh_states(session, 1))
    more, _ = run(session, tokens[:, 4:].numpy(), states)
    wanted = model(tokens).logits[:, 3:].numpy()
    difference = np.abs(np.concatenate([logits, more], axis=1) - wanted).max()
    assert difference < 1e-3 * np.abs(wanted).max()  # random weights amplify rounding
