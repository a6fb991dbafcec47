"""Mutations of files, drawn by hypothesis: of what stands in JSON, and of bytes whatever they mean."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

from hypothesis import strategies as st

DEEP = "\N{SNOWMAN}deep"  # stands for nesting that json.dumps cannot write
SPECIAL = (None, True, False, 0, -1, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30)
SPECIAL += (1e308, -0.0, 5e-324, float("nan"), float("inf"), -float("inf"), 0.5)
SPECIAL += ("", " ", "\0", "\ud800", "\x1b[31mred", "two\nlines", "../outside", "/etc/passwd", "A" * 3000, "%s%n{0}")
SPECIAL += ("__class__", "mamba", "mamba2", "nemotron_h", "jamba", "auto", "Infinity", "os.system", DEEP)
SPECIAL += ([], {}, [[]], [None], {"": None}, [0] * 50, {"__float__": "Infinity"}, {"__float__": []})
VALUES = st.one_of(
    st.sampled_from(SPECIAL),
    st.integers(),
    st.integers(-3, 70),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.integers(-2, 9), max_size=5),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=3),
)
CHUNKS = st.one_of(
    st.binary(max_size=9),
    st.sampled_from(
        (b"\xff" * 8, b"\0" * 8, b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"{", b"}", b"]", b",", b"\n", b"&a ", b"*a")
    ),
    st.sampled_from((b"[" * 100_000, b'{"a":' * 50_000, b"!!python/object/apply:os.system [id]\n", b"\xed\xa0\x80")),
)
_NUMBER = re.compile(rb"\d+")


@st.composite
def json_documents(draw: Any, content: bytes) -> bytes:
    """A JSON document with up to four values replaced, removed, doubled, swapped or renamed."""
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 4))):
        places = _places(document)
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        _change(draw, holder, key, places)
    text = json.dumps(document).encode("utf-8", "surrogatepass")
    return text.replace(json.dumps(DEEP).encode(), b"[" * 100_000 + b"]" * 100_000)


@st.composite
def byte_strings(draw: Any, content: bytes) -> bytes:
    """Bytes with up to four pieces replaced, removed, inserted, doubled, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        reach = len(content) if draw(st.booleans()) else min(len(content), 400)  # headers stand at the start
        at = draw(st.integers(0, reach))
        size = draw(st.sampled_from((1, 1, 2, 4, 8, 30)))
        kind = draw(st.sampled_from(("flip", "insert", "remove", "double", "truncate", "number")))
        if kind == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
        elif kind == "insert":
            content = content[:at] + draw(CHUNKS) + content[at:]
        elif kind == "remove":
            content = content[:at] + content[at + size :]
        elif kind == "double":
            content = content[: at + size] + content[at:]
        elif kind == "truncate":
            content = content[:at]
        elif found := _NUMBER.search(content, at):
            content = content[: found.start()] + str(draw(st.integers(-1, 2**66))).encode() + content[found.end() :]
    return content


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every value of a document: what holds it, and its key there."""
    found, left = [], [document]
    while left:
        holder = left.pop()
        entries = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in entries:
            found.append((holder, key))
            if isinstance(value, (dict, list)):
                left.append(value)
    return found


def _change(draw: Any, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    kind = draw(st.sampled_from(("replace", "replace", "replace", "number", "remove", "copy", "rename")))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8) | st.sampled_from(("", "__proto__", "../x")))] = holder.pop(key)
    elif kind == "copy":
        other, name = draw(st.sampled_from(places))
        try:
            holder[key] = json.loads(json.dumps(other[name]))  # of its own, not shared
        except (KeyError, IndexError):  # an earlier change took it away
            holder[key] = None
    elif kind == "number" and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = draw(st.sampled_from((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2)))
    else:
        holder[key] = copy.deepcopy(draw(VALUES))  # later changes must not change what is drawn
