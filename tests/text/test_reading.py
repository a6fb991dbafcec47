"""What a file of text holds is read from its content; what is not text is refused by what it is."""

import bz2
import gzip
import json
import lzma
import os
import threading

import pyarrow
import pyarrow.parquet
import pytest

from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.text import read_texts

STORIES = ("Once upon a time.", "There was a fox.\n\nIt slept.", "Zwölf Bären")
LINES = "".join(json.dumps({"text": story, "url": "x"}) + "\n" for story in STORIES).encode()
TABLE = "id,text\n" + "".join(f'{number},"{story}"\n' for number, story in enumerate(STORIES))
PACKED = gzip.compress(LINES, mtime=0)  # the same bytes, and names of tests, in every process


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("c4-train.00000-of-01024.json", LINES),  # as C4 is published
        ("lines.txt", LINES),
        ("no-suffix", LINES),
        ("a.json.gz", PACKED),
        ("a.jsonl.zst", pyarrow.compress(LINES, "zstd", asbytes=True)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.xz", lzma.compress(LINES)),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES),
        ("wide.jsonl", LINES.decode().encode("utf-16")),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("array.json", json.dumps([{"text": story} for story in STORIES], indent=2).encode()),
        ("array.jsonl", json.dumps([{"text": story} for story in STORIES]).encode()),
        ("strings.json", json.dumps(STORIES).encode()),
        ("strings.jsonl", "".join(json.dumps(story) + "\n" for story in STORIES).encode()),
        ("wider.jsonl", LINES.decode().encode("utf-32")),
        ("twice.json.gz.gz", gzip.compress(PACKED, mtime=0)),
        ("table.csv", TABLE.encode()),
        ("table.txt", TABLE.replace(",", "\t").encode()),
    ],
)
def test_the_same_documents_come_out_of_every_layout(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name).documents == STORIES


@pytest.mark.parametrize("packed", [False, True])
def test_prose_is_one_document(tmp_path, packed):
    for start in ("{not JSON} but prose", '["Not JSON," he said] but prose', "A list: text, pictures"):
        content = f"{start}.\r\nSecond line.\n".encode()
        (tmp_path / "a.txt").write_bytes(gzip.compress(content) if packed else content)
        assert read_texts(tmp_path / "a.txt").documents == (f"{start}.\nSecond line.\n",)


def test_a_single_object_over_several_lines(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"text": STORIES[0]}, indent=2))
    assert read_texts(tmp_path / "one.json").documents == STORIES[:1]


def test_parquet_under_any_name(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [*STORIES, None]}), tmp_path / "data.bin")
    assert read_texts(tmp_path / "data.bin").documents == STORIES


def test_a_pipe_is_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(PACKED))
    writer.start()
    assert read_texts(pipe).documents == STORIES
    writer.join()


def test_a_folder_reads_text_of_all_kinds_and_leaves_settings_alone(tmp_path):
    (tmp_path / "1.jsonl.gz").write_bytes(PACKED)
    (tmp_path / "2.txt").write_text("prose")
    (tmp_path / "dataset_info.json").write_text('{\n  "version": "1.0"\n}')
    assert read_texts(tmp_path).documents == (*STORIES, "prose")


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud835 b \ud83d\ude00"}' + "\n")
    texts = read_texts(tmp_path / "a.jsonl")
    assert texts.documents == ("a � b 😀",)
    assert len(texts.sha256) == 64


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"%PDF-1.7 ...", "is not text but a PDF"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"abc\0def", "zero bytes"),
        ("no mark".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar\0"), "a tar archive"),
        (b"\x04\x22\x4d\x18....", "compressed by lz4"),
        (b'{"text": null}\n', 'no string "text": it is null'),
        (b'{"text": "a"}\n3\n', 'line 2, has no string "text". It is a number'),
        (b'["a"]\n["b"]\n', 'line 1, has no string "text". It is a list'),
        ("Zwölf".encode("latin-1"), r"not UTF-8 text \(byte 2\)"),
        (PACKED[:-20], "breaks off or is damaged"),
        (lzma.compress(LINES)[:-20], "breaks off or is damaged"),
        (b'{"text": "a"}\n{"text": \n', "line 2, is not JSON"),
        (b'{"content": "a"}\n', "line 1, has no string \"text\". It has 'content'"),
        (b'{"text": 3}\n', 'no string "text"'),
        (b"[" * 100_000 + b"\n", "is not JSON"),
        (b" \n\n", "holds no text"),
        (b"PAR1 and no more", "not a readable parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CalibrationError, match=said):
        read_texts(tmp_path / "a.jsonl")
