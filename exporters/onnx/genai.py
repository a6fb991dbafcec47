"""genai_config.json: how onnxruntime-genai finds its way in a graph of target genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssmc.exporters.format import Job
from ssmc.exporters.onnx.files import GRAPH
from ssmc.exporters.onnx.graph import require_family
from ssmc.runtime.errors import UsageError

FILE = "genai_config.json"
CONTEXT = 2**20  # tokens; the states have one size, however many were read


def write_genai_config(folder: Path, job: Job) -> Path:
    """Write genai_config.json for the graph in a folder; the file.

    The type is "decoder", the only one whose states are found by name: "conv_state" and "recurrent_state" where others
    have "key" and "value". Their shapes are read from the graph.
    """
    shrunk, generation = job.shrunk, job.source.checkpoint.model.generation_config
    heads, width = _attention(job)
    ends = _first_known(generation.eos_token_id, shrunk.config.eos_token_id)
    pad = _first_known(generation.pad_token_id, shrunk.config.pad_token_id, ends[0] if isinstance(ends, list) else ends)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": width,
        "hidden_size": shrunk.config.hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": shrunk.config.num_hidden_layers,
        "num_key_value_heads": heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "decoder",
        "bos_token_id": _first_known(generation.bos_token_id, shrunk.config.bos_token_id, 0),
        "eos_token_id": ends,
        "pad_token_id": pad,
        "context_length": CONTEXT,
        "vocab_size": shrunk.config.vocab_size,
        "decoder": decoder,
    }
    search = {"max_length": 4096, "past_present_share_buffer": False, "do_sample": bool(generation.do_sample)}
    path = folder / FILE
    path.write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n", encoding="utf-8", newline="\n")
    return path


def _attention(job: Job) -> tuple[int, int]:
    """Heads of keys and values, and how wide they are; 1 where there is no attention.

    Raises:
        UsageError: layers differ in it.
    """
    config, tensors = job.shrunk.config, job.shrunk.tensors
    family = require_family(config, job.options.target)
    layers = [family.sizes(config, tensors, layer) for layer in range(config.num_hidden_layers)]
    found = {(sizes["kv_heads"], sizes["attention_head_dim"]) for sizes in layers if "kv_heads" in sizes}
    if len(found) > 1:
        raise UsageError(
            "onnxruntime-genai has one number of heads of keys and values for all layers, here they differ. Use the "
            "target portable."
        )
    return found.pop() if found else (1, 1)


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), 0)
