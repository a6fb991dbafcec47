"""Of a large text only what is drawn is read; a small one is cut into windows as a whole."""

import gzip
import itertools
import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import torch

from ssmc.runtime.text import draw_windows, read_texts, tokenize


class Tokenizer:
    """A token for every word, its number; a sum would do, but places can be read off."""

    def __init__(self):
        self.seen = 0

    def __call__(self, text, **_):
        self.seen += len(text)
        return {"input_ids": [int(word[1:]) if word[1:].isdigit() else 9999 for word in text.split()]}


def documents(count):
    """No word comes twice, so that a window shows where it was cut."""
    draw, start = random.Random(0), 0
    for _ in range(count):
        end = start + draw.randrange(100, 900)
        yield " ".join(f"w{number}" for number in range(start, end))
        start = end


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """More than is taken whole, as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "large.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(900)))
    assert path.stat().st_size > 3 << 20
    return path


def as_parquet(path, out):
    pyarrow.parquet.write_table(pyarrow.table({"text": list(read_texts(path).documents)}), out, row_group_size=100)
    return out


def test_a_small_text_is_cut_as_a_whole(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(20)))
    tokens = tokenize(read_texts(tmp_path / "a.jsonl"), Tokenizer())
    every = {tuple(window) for window in tokens[: len(tokens) // 64 * 64].view(-1, 64).tolist()}
    drawn = draw_windows(tmp_path / "a.jsonl", Tokenizer(), 10_000, 64, seed=1)
    assert {tuple(window) for window in drawn.tokens.tolist()} == every
    assert drawn.sha256 == read_texts(tmp_path / "a.jsonl").sha256


@pytest.mark.parametrize("kind", ["lines", "prose", "parquet", "folder"])
def test_windows_of_a_large_text_stand_in_it_and_do_not_overlap(large, tmp_path, kind):
    source, whole = large, tokenize(read_texts(large), Tokenizer()).tolist()
    if kind == "prose":
        (tmp_path / "a.txt").write_text(read_texts(large).joined())
        source = tmp_path / "a.txt"
    elif kind == "parquet":
        source = as_parquet(large, tmp_path / "a.parquet")
    elif kind == "folder":
        lines = large.read_text().splitlines(keepends=True)
        for number in range(3):
            (tmp_path / f"{number}.jsonl").write_text("".join(lines[number::3]))
        source, whole = tmp_path, tokenize(read_texts(tmp_path), Tokenizer()).tolist()
    tokenizer = Tokenizer()
    drawn = draw_windows(source, tokenizer, 12, 128, seed=0).tokens
    assert drawn.shape == (12, 128)
    assert tokenizer.seen < 12 * 128 * 12 * 3  # not all of it
    place = {token: i for i, token in enumerate(whole)}
    starts = sorted(place[int(window[0])] for window in drawn)
    assert {tuple(whole[start : start + 128]) for start in starts} == {tuple(window) for window in drawn.tolist()}
    assert all(b - a >= 128 for a, b in itertools.pairwise(starts))
    assert starts[0] < len(whole) / 2 < starts[-1]  # from all over


def test_the_seed_decides(large):
    first, again, other = (draw_windows(large, Tokenizer(), 8, 64, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert not torch.equal(first.tokens, other.tokens)


def test_compressed_text_is_read_as_far_as_leaves_a_choice(large, tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(large.read_bytes()))
    tokenizer = Tokenizer()
    drawn = draw_windows(tmp_path / "a.gz", tokenizer, 8, 64, seed=0)
    assert drawn.tokens.shape == (8, 64)
    assert tokenizer.seen < 3 << 20


def test_long_tokens_are_found_all_the_same(tmp_path):
    """Every token of 40 bytes: three times what is expected of one."""
    (tmp_path / "a.txt").write_text(" ".join(f"w{number % 7:038d}" for number in range(100_000)))
    assert draw_windows(tmp_path / "a.txt", Tokenizer(), 6, 128, seed=0).tokens.shape == (6, 128)


def test_too_little_text_gives_no_window(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2 w3 w4")
    drawn = draw_windows(tmp_path / "a.txt", Tokenizer(), 4, 8, seed=0)
    assert drawn.tokens.shape == (0, 8)
    assert drawn.available == 4
