"""ONNX graphs: onnxruntime computes what stock transformers computes, however the tokens come."""

import numpy as np
import pytest
import torch

from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.running import fresh_states, open_written, run
from ssmc.exporters.onnx.write import write_graph

from .models import random_model, random_tokens

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "time_step_rank": 5}


def graph(model, folder, **settings):
    """A session of the graph of a model, from files."""
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not tied(model)}
    folder.mkdir(exist_ok=True)
    write_graph(folder, build(model.config, tensors, Settings(**settings)).model)
    return open_written(folder)


def tied(model):
    return model.lm_head.weight is model.backbone.embeddings.weight


@torch.no_grad()
def stock(model, tokens):
    """Logits of all tokens by transformers' own loop."""
    return model(tokens, use_cache=False).logits.numpy()


def read(session, tokens, states=None, mask=None):
    states = fresh_states(session, len(tokens)) if states is None else states
    return run(session, tokens.numpy(), states, None if mask is None else mask.numpy())


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(scope="module", params=[16, 8, 5, 1])
def pair(request, tmp_path_factory):
    """A random model with N states and its graph, which gives all logits."""
    model = random_model(state_size=request.param)
    return model, graph(model, tmp_path_factory.mktemp("graph"), logits="all")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 64])
def test_logits_are_those_of_stock_transformers(pair, batch, length):
    model, session = pair
    tokens = random_tokens((batch, length))
    logits, _ = read(session, tokens)
    assert_close(logits, stock(model, tokens))
