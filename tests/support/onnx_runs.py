"""Graphs of random models, and how they are run and compared with stock transformers."""

import numpy as np
import torch

from ssmc.exporters.onnx import Settings, build
from ssmc.exporters.onnx.files import write_graph
from ssmc.exporters.onnx.running import fresh_states, open_written, run

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]],
    "mixed": [[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1]],
}


def tensors_of(model):
    tied = model.lm_head.weight is model.backbone.embeddings.weight
    return {k: v for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def graph(model, folder, tensors=None, **settings):
    """A session of the graph of a model, from files."""
    folder.mkdir(exist_ok=True)
    write_graph(folder, build(model.config, tensors or tensors_of(model), Settings(**settings)).model)
    return open_written(folder)


@torch.no_grad()
def stock(model, tokens):
    """Logits of all tokens by transformers' own loop."""
    return model(tokens, use_cache=False).logits.numpy()


def read(session, tokens, states=None, mask=None):
    states = fresh_states(session, len(tokens)) if states is None else states
    return run(session, tokens.numpy(), states, None if mask is None else np.array(mask))


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
