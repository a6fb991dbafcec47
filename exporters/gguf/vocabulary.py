"""A byte-level BPE tokenizer as llama.cpp reads it: tokens, their kinds, merges, and how text is split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.models.checkpoints.reading import read_json
from ssmc.runtime.models.tokenizers import TOKENIZER_JSON

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in llama.cpp
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|\p{{N}}|{_REST}": "qwen2",
}
"""Regular expression of tokenizer.json -> llama.cpp's name for it."""

_KNOWN = "those of GPT-2, GPT-NeoX, Llama 3 and Qwen2"


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer; keys as in the file.

    Attributes:
        tokens: as the tokenizer stores them, one for every row of the embedding.
        kinds: of the tokens.
        merges: "a b" each.
        pre: llama.cpp's name for how text is split.
        numbers: ids of special tokens by key, and whether the first is put before a text.
        chat_template: None where there is none.
    """

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    numbers: Mapping[str, int | bool]
    chat_template: str | None


def read_vocabulary(source: Path, tokenizer: Any, rows: int, stops: tuple[int, ...]) -> Vocabulary:
    """Read a tokenizer for a file of llama.cpp's.

    Args:
        source: its folder, or its tokenizer.json.
        tokenizer: the same, as transformers loads it.
        rows: of the embedding; where there are more than tokens, unused ones fill up.
        stops: tokens that end a text.

    Raises:
        UsageError: it is of a kind that is not written, named in the message.
        CheckpointError: tokenizer.json is damaged.
    """
    path = source if source.is_file() else source / TOKENIZER_JSON
    if not path.is_file():
        raise UsageError(
            f"{source} has no {TOKENIZER_JSON}, and GGUF files are written with byte-level BPE tokenizers only. "
            "Save the tokenizer with transformers' fast class, or export to another format."
        )
    content = read_json(path)
    pre = _pre_tokenizer(content, path)
    try:
        tokens, kinds = _tokens(content, rows)
        merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"])
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}). Copy it again.") from error
    template = tokenizer.chat_template
    return Vocabulary(
        tokens, kinds, merges, pre, _numbers(tokenizer, stops), template if isinstance(template, str) else None
    )


def _pre_tokenizer(content: Mapping[str, Any], path: Path) -> str:
    """llama.cpp's name for how the tokenizer splits text."""
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = "a BPE with byte fallback (sentencepiece)" if model.get("byte_fallback") else model.get("type")
        raise UsageError(
            f"{path} is {kind}, and GGUF files are written with byte-level BPE tokenizers only, {_KNOWN}. Export to "
            "another format."
        )
    splits = content.get("pre_tokenizer") or {}
    parts = splits.get("pretokenizers", [splits]) if splits.get("type") == "Sequence" else [splits]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    others = [part for part in parts if part.get("type") != "ByteLevel"]
    normalizer = (content.get("normalizer") or {}).get("type", "NFC")  # which llama.cpp leaves out: rare in text
    if len(levels) == 1 and not levels[0].get("add_prefix_space") and normalizer == "NFC":
        if not others and levels[0].get("use_regex", True):
            return "gpt-2"
        if len(others) == 1 and others[0].get("type") == "Split" and not levels[0].get("use_regex", True):
            name = _SPLITS.get((others[0].get("pattern") or {}).get("Regex") or "")
            if name is not None and others[0].get("behavior") == "Isolated":
                return name
    named = json.dumps(splits, ensure_ascii=False)
    raise UsageError(
        f"The pre-tokenizer of {path}, {named[:160]}{'...' if len(named) > 160 else ''}, is none that GGUF files are "
        f"written with: {_KNOWN}. Export to another format."
    )


def _tokens(content: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every row's token and its kind."""
    tokens, kinds = [f"[PAD{row}]" for row in range(rows)], [UNUSED] * rows
    for token, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for added in content.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tuple(tokens), tuple(kinds)


def _numbers(tokenizer: Any, stops: tuple[int, ...]) -> dict[str, int | bool]:
    """Ids of special tokens; a second and a third end of text are its ends of turn and of message."""
    ends = tuple(dict.fromkeys([*stops, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]))
    named = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if ends else None,
        "eot_token_id": ends[1] if len(ends) > 1 else None,
        "eom_token_id": ends[2] if len(ends) > 2 else None,
        "padding_token_id": tokenizer.pad_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
    }
    ids = tokenizer("a")["input_ids"]
    adds = {
        "add_bos_token": bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos_token": bool(ids) and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    return {key: value for key, value in named.items() if value is not None} | adds
