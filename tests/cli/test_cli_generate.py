"""`ssmc generate`: what it prints, and what it refuses."""

from __future__ import annotations

import io
import sys

import pytest

import ssmc
from ssmc.cli.commands import generate as generate_command
from ssmc.runtime.errors import UsageError
from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import (
    Generation,
    TorchSession,
    generate,
    open_session,
    stream_tokens,
)
from tests.support.commandline import PROMPTS, run
from tests.support.models import VOCAB, random_model


def test_the_command_writes_prompt_text_and_figures(capsys, loaded):
    wanted = "".join(generate(loaded, PROMPTS[0], max_new_tokens=8))
    outcome = run(capsys, "generate", "tiny", PROMPTS[0], "--max-new-tokens", 8)
    assert (outcome.code, outcome.out) == (0, PROMPTS[0] + wanted + "\n")
    assert "read 4 tokens" in outcome.err
    assert "wrote 8 (" in outcome.err
    outcome = run(capsys, "generate", "tiny", PROMPTS[0], "--max-new-tokens", 8, "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, wanted + "\n", "")


def test_the_prompt_may_come_from_a_file_or_standard_input(capsys, loaded, tmp_path, monkeypatch):
    wanted = "".join(generate(loaded, PROMPTS[0], max_new_tokens=4)) + "\n"
    (tmp_path / "prompt.txt").write_bytes(PROMPTS[0].encode() + b"\r\n")
    options = ("--max-new-tokens", 4, "--quiet", "--greedy")
    assert run(capsys, "generate", "tiny", "--prompt-file", tmp_path / "prompt.txt", *options).out == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPTS[0].encode() + b"\n")))
    assert run(capsys, "generate", "tiny", "-", *options).out == wanted


def test_the_command_draws_and_stops_as_asked(capsys, loaded):
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 4}
    text = "".join(generate(loaded, "The dog", max_new_tokens=30, **options))
    stop = text[20:24]
    typed = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    outcome = run(capsys, "generate", "tiny", "The dog", "-q", *typed, "--max-new-tokens", 30, "--stop", stop)
    assert outcome.out == text[: text.index(stop)] + "\n"


def test_ctrl_c_keeps_what_was_printed(capsys, monkeypatch):
    class Interrupted(Generation):
        def _next(self):
            if len(self.tokens) == 3:
                raise KeyboardInterrupt
            return super()._next()

    monkeypatch.setattr("ssmc.runtime.models.generation.Generation", Interrupted)
    outcome = run(capsys, "generate", "tiny", PROMPTS[0])
    assert outcome.code == 130
    assert outcome.out.startswith(PROMPTS[0] + ", in")
    assert outcome.out.endswith("\n")
    assert outcome.err.splitlines()[-1] == "Error: interrupted; the text ends here."
    assert "wrote 3" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["tiny", ""], 2, "prompt is empty"),
        (["tiny"], 2, "PROMPT"),
        (["tiny", "x", "--prompt-file", "y"], 2, "--prompt-file"),
        (["tiny", "--prompt-file", "./nowhere"], 2, "nowhere"),
        (["tiny", "x", "--greedy", "--top-k", "3"], 2, "--greedy"),
        (["tiny", "x", "--temperature", "-1"], 2, "temperature"),
        (["tiny", "x", "--top-p", "1.5"], 2, "top_p"),
        (["tiny", "x", "--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["tiny", "\udcff"], 2, "UTF-8"),
        (["./nowhere", "x"], 3, "./nowhere"),
    ],
)
def test_what_the_command_refuses(capsys, arguments, code, named):
    outcome = run(capsys, "generate", *arguments)
    assert named in outcome.sentence(code)
    assert outcome.out == ""


def test_a_file_that_is_no_text_and_a_model_without_a_tokenizer(capsys, tmp_path, model_directory):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    assert "byte 2" in run(capsys, "generate", "tiny", "--prompt-file", tmp_path / "bad.txt").sentence(2)
    assert "--tokenizer" in run(capsys, "generate", model_directory(), "x").sentence(3)


def test_a_token_of_another_vocabulary_is_refused_before_anything_is_computed():
    session = TorchSession(use_fast_scan(random_model()))
    session.prefill = None
    with pytest.raises(UsageError, match="token id 64"):
        stream_tokens(session, [[VOCAB, 64]])
    with pytest.raises(UsageError, match="empty"):
        stream_tokens(session, [[1], []])


def test_the_python_interface_is_the_same_function():
    assert ssmc.generate is generate
    assert ssmc.open_session is open_session


def test_the_defaults_of_the_command_are_the_librarys():
    import inspect

    typed = inspect.signature(generate_command.generate).parameters
    library = inspect.signature(generate).parameters
    for name in typed.keys() & library.keys() - {"model", "prompt", "stop"}:
        assert typed[name].default == library[name].default, name
