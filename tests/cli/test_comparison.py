"""Tables of models: whatever their number and their names, no line is longer than 80 characters and nothing is lost."""

import pytest
from rich.console import Console

from ssmc.cli.comparison import WIDTH, Column, Figure, show_long, show_models
from ssmc.cli.terminal import Terminal

METRICS = ("Parameters", "Prefill, 2048 tokens, batch 1", "Decode, batch 8", "Perplexity", "How it was made")


def printed(capsys, show, models, width, **more):
    names = [f"a-folder-with-a-long-name/of-a-model-{number}/safetensors" for number in range(models)]
    columns = [
        Column(metric, [Figure(f"{metric[:2]}{n}.25 ms", "" if n == 0 else "1.08× (1.05–1.10)") for n in range(models)])  # noqa: RUF001
        for metric in METRICS
    ]
    terminal = Terminal(out=Console(width=width, highlight=False))
    show(terminal, "Title", **more, names=names, columns=columns)
    return capsys.readouterr().out, names, columns


@pytest.mark.parametrize("models", [1, 2, 12])
@pytest.mark.parametrize(("show", "more"), [(show_models, {}), (show_long, {"what": "phase"})])
def test_tables_fit_and_show_everything(capsys, show, more, models):
    shown, names, columns = printed(capsys, show, models, 80, **more)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for column in columns:
        assert all(figure.value in shown for figure in column.figures)
        assert all(word in shown for word in column.heading.split())
    letters = "".join(cell.strip() for line in lines for cell in line.split("│"))
    assert all(f"of-a-model-{number}" in letters for number in range(len(names)))


def test_a_wide_terminal_gets_the_same_table(capsys):
    narrow, _, _ = printed(capsys, show_models, 3, 80)
    wide, _, _ = printed(capsys, show_models, 3, 200)
    assert wide == narrow


def test_models_are_lines(capsys):
    columns = [Column(metric, [Figure(f"{metric} of {n}") for n in range(12)]) for metric in ("size", "time")]
    terminal = Terminal(out=Console(width=80, highlight=False))
    show_models(terminal, "Title", [f"model-{n}" for n in range(12)], columns)
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    for n in range(12):
        assert f"size of {n}" in lines[f"model-{n}"]
        assert f"time of {n}" in lines[f"model-{n}"]
