"""--state-dtype: text from states in fewer bits, what it costs, and what it takes."""

import json

from tests.support.commandline import run


def test_text_comes_from_states_in_int8(capsys):
    plain = run(capsys, "generate", "tiny-mamba2", "Once upon a time", "--max-new-tokens", 30)
    same = run(capsys, "generate", "tiny-mamba2", "Once upon a time", "--max-new-tokens", 30, "--state-dtype", "int8")
    again = run(capsys, "generate", "tiny-mamba2", "Once upon a time", "--max-new-tokens", 30, "--state-dtype", "int8")
    assert plain.code == same.code == 0
    assert same.out == again.out
    assert same.out.startswith("Once upon a time")


def test_evaluation_says_what_rounding_costs(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little dog. He liked to play in the park with his ball. " * 4)
    options = ("--text", text, "--window", 48, "--max-windows", 2, "--out", tmp_path / "eval.json", "--recall")
    done = run(capsys, "eval", "tiny-mamba2", "tiny-mamba2", *options, "--state-dtype", "int8")
    assert done.code == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["settings"]["state_dtype"] == "int8"
    excess = found["models"][1]["excess"]["nats"]
    assert 0 < abs(excess) < 0.02


def test_what_an_export_or_ssmc_has_not_is_refused(capsys):
    wrong = run(capsys, "generate", "tiny", "Once", "--state-dtype", "int4")
    assert wrong.code != 0
