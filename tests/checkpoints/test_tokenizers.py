"""Tokenizers are read as tokenizer.json says, found where they lie, and copied so that stock transformers agrees."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, BertTokenizer

from ssmc.runtime.errors import CheckpointError
from ssmc.runtime.models.checkpoints import load_checkpoint
from ssmc.runtime.models.tokenizers import copy_tokenizer, has_tokenizer, load_tokenizer, tokenizer_directory
from ssmc.runtime.tiny import TINY_DIRECTORY, heldout_path

TEXT = "Once upon  a time,\n\nÄpfel — it's 1234 <|endoftext|>!"


def exact_ids(path, text=TEXT):
    """What the tokenizers library itself makes of the file."""
    return Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids


def ids(tokenizer, text=TEXT):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer that splits at spaces: nothing like the one transformers builds for model_type mamba by itself."""
    vocabulary = {"[UNK]": 0, "Once": 1, "upon": 2, "a": 3, "time": 4, "far": 90}  # with a gap
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    directory = tmp_path_factory.mktemp("words")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_tiny(tiny):
    tokenizer = load_tokenizer(tiny)
    text = TEXT + json.loads(heldout_path().read_text(encoding="utf-8").splitlines()[0])["text"]
    assert ids(tokenizer, text) == exact_ids(TINY_DIRECTORY / "tokenizer.json", text)
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer_directory(tiny) == TINY_DIRECTORY


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "GPTNeoXTokenizer"}])
@pytest.mark.parametrize("with_model", [True, False])
def test_tokenizer_json_is_read_as_it_is(tmp_path, words, config, with_model):
    """AutoTokenizer would rebuild GPT-NeoX's tokenizer around the vocabulary here."""
    shutil.copy(words / "tokenizer.json", tmp_path)
    if with_model:
        shutil.copy(TINY_DIRECTORY / "config.json", tmp_path)
    if config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(load_tokenizer(tmp_path), "Once upon a far time") == [1, 2, 3, 90, 4]
    if with_model:
        assert ids(AutoTokenizer.from_pretrained(tmp_path), "Once upon a far time") != [1, 2, 3, 90, 4]


@pytest.mark.parametrize("as_file", [True, False])
def test_another_tokenizer(tiny, words, as_file):
    override = str(words / "tokenizer.json" if as_file else words)
    assert ids(load_tokenizer(tiny, override), "Once upon") == [1, 2]
    assert tokenizer_directory(tiny, override) == Path(override)


def test_the_embedded_tokenizer_for_another_model(model_directory):
    assert tokenizer_directory(load_checkpoint(model_directory()), "tiny") == TINY_DIRECTORY


def test_tokenizers_without_tokenizer_json(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "once", "time"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": BertTokenizer.__name__}))
    assert has_tokenizer(tmp_path)
    assert ids(load_tokenizer(tmp_path), "once time") == [5, 6]


@pytest.mark.parametrize("as_file", [True, False])
def test_a_copy_is_read_by_stock_transformers(tmp_path, words, as_file):
    """In a folder with a model in it, where AutoTokenizer looks at the model's family."""
    shutil.copy(TINY_DIRECTORY / "config.json", tmp_path)
    files = copy_tokenizer(words / "tokenizer.json" if as_file else words, tmp_path)
    assert sorted(f.name for f in files) == ["tokenizer.json", "tokenizer_config.json"]
    assert all(f.parent == tmp_path for f in files)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert ids(tokenizer, "Once upon a far time") == [1, 2, 3, 90, 4]
        assert ids(tokenizer, "elsewhere Once") == [0, 1]


def test_a_copy_takes_the_tokenizer_and_nothing_else(tmp_path, tiny):
    files = copy_tokenizer(TINY_DIRECTORY, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(f.name for f in files)
    assert {f.name: f.read_bytes() for f in files} == {
        name: (TINY_DIRECTORY / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")
    }
    assert ids(AutoTokenizer.from_pretrained(tmp_path)) == ids(load_tokenizer(tiny))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_no_tokenizer(model_directory):
    checkpoint = load_checkpoint(model_directory("mamba-ssm"))
    assert not has_tokenizer(checkpoint.directory)
    assert tokenizer_directory(checkpoint) is None
    with pytest.raises(CheckpointError, match=r"without a tokenizer.*--tokenizer"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_for_a_larger_vocabulary(model_directory, words):
    checkpoint = load_checkpoint(model_directory())  # 64 rows
    with pytest.raises(CheckpointError, match=r"ids up to 4095.*64 rows"):
        load_tokenizer(checkpoint, "tiny")
    with pytest.raises(CheckpointError, match="ids up to 90"):  # six tokens only
        load_tokenizer(checkpoint, str(words))


def test_nothing_where_the_tokenizer_was_said_to_be(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for override in ("./nowhere", "nowhere", "~nobody-here/x", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"no tokenizer at '{override}'"):
            load_tokenizer(tiny, override)
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*tokenizer\.json"):
        load_tokenizer(tiny, str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}'])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_damaged_tokenizer(tiny, tmp_path, content, as_file):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tiny, str(path if as_file else tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("with_json", [True, False])
def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path, words, with_json):
    directory, proof = tmp_path / "t", tmp_path / "the-code-ran"
    directory.mkdir()
    if with_json:
        shutil.copy(words / "tokenizer.json", directory)
    else:
        (directory / "vocab.txt").write_text("[UNK]\nonce")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Evil: pass\n")
    if with_json:
        assert ids(load_tokenizer(directory), "Once") == [1]
    else:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_tokenizer(directory)
    assert not proof.exists()
