"""Experts, which files store one by one and transformers' models hold as one tensor."""

from __future__ import annotations

import re

from ssmc.runtime.later import torch


def join_experts(tensors: dict[str, torch.Tensor], stored: str, joined: str) -> dict[str, torch.Tensor]:
    """The weights of single experts, as files hold them, as the one tensor of all that the model has.

    Args:
        tensors: by name.
        stored: what follows the prefix in the names of single experts: "experts.*.up_proj.weight"; several of them with
            | between, which are joined along the outputs.
        joined: what follows the prefix in the name of all: "experts.up_proj".
    """
    out, found = {}, {}
    names = stored.split("|")
    patterns = [re.compile(r"(.*\.)" + re.escape(name).replace(r"\*", r"(\d+)")) for name in names]
    for key, tensor in tensors.items():
        for part, pattern in enumerate(patterns):
            if match := pattern.fullmatch(key):
                found.setdefault(match[1], {})[int(match[2]), part] = tensor
                break
        else:
            out[key] = tensor
    for prefix, weights in found.items():
        experts = range(1 + max(number for number, _ in weights))
        try:
            single = [torch.cat([weights[e, part] for part in range(len(names))]) for e in experts]
            out[prefix + joined] = torch.stack(single)
        except (KeyError, RuntimeError):  # incomplete or misshapen: whoever checks the tensors says so
            continue
    return out


def split_experts(tensors: dict[str, torch.Tensor], stored: str, joined: str) -> dict[str, torch.Tensor]:
    """The opposite of `join_experts`, with the same arguments."""
    out, names = {}, stored.split("|")
    for key, tensor in tensors.items():
        prefix, found, rest = key.rpartition(joined)
        if not found or rest or not prefix.endswith("."):
            out[key] = tensor
            continue
        for number, expert in enumerate(tensor):
            for name, part in zip(names, expert.chunk(len(names)), strict=True):
                out[prefix + name.replace("*", str(number))] = part
    return out
