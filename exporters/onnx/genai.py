"""genai_config.json: how onnxruntime-genai finds its way in a graph of target genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssmc.exporters.format import Job
from ssmc.exporters.onnx.files import GRAPH

FILE = "genai_config.json"
CONTEXT = 2**20  # tokens; the states have one size, however many were read


def write_genai_config(folder: Path, job: Job) -> Path:
    """Write genai_config.json for the graph in a folder; the file.

    The type is "decoder", the only one whose states are found by name: "conv_state" and "recurrent_state" where others
    have "key" and "value". Their shapes are read from the graph.
    """
    shrunk, generation = job.shrunk, job.source.checkpoint.model.generation_config
    ends = _first_known(generation.eos_token_id, shrunk.config.eos_token_id)
    pad = _first_known(generation.pad_token_id, shrunk.config.pad_token_id, ends[0] if isinstance(ends, list) else ends)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": 1,
        "hidden_size": shrunk.config.hidden_size,
        "num_attention_heads": 1,
        "num_hidden_layers": shrunk.config.num_hidden_layers,
        "num_key_value_heads": 1,
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


def _first_known(*values: Any) -> Any:
    return next((value for value in values if value is not None), 0)
