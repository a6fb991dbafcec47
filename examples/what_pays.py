"""The last screen of `make demo`: what each kind of removal gains and what it costs, from the report of `ssmc bench`.

python examples/what_pays.py ssmc-demo/bench.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

WIDTH = 20  # characters of a bar that stands for the whole dense model

NEXT = """
With your own model (a folder, or a hub id such as state-spaces/mamba-130m):

    ssmc inspect MODEL                                   what can be removed, and which runtimes take the result
    ssmc compress MODEL --sparsity 0.5 --calib TEXT      half of the states; TEXT: a file of what it will read
    ssmc compress MODEL --target-latency 0.7             as much as it takes to run in 0.7 of the time
    ssmc export --format onnx --quantize int8            a third of the size, for CPUs

docs/choose.md has the table: your model, your runtime, your aim -> the command.
Plots of this demo: ssmc-demo/bench.html"""


def main() -> None:
    """Print the screen."""
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dense, *others = report["models"]
    print("What pays where: what is left of the dense model, and the loss that comes with it\n")
    for model in others:
        loss = model["excess"]["nats"]
        print(f"{how(model['recipe'])}: loss {loss:+.4f} nats per token (perplexity {math.expm1(loss):+.1%})")
        for name, share in shares(report, dense, model).items():
            print(f"    {name:<22}{bar(share)} {share:.2f}")
    print(NEXT)


def shares(report: dict[str, Any], dense: dict[str, Any], model: dict[str, Any]) -> dict[str, float]:
    """What is left of the dense model, by subject."""
    found = {
        "recurrent state": model["state_bytes"] / dense["state_bytes"],
        "parameters": model["parameters"] / dense["parameters"],
    }
    for kind, name in (("prefill", "time of a prefill"), ("decode", "time of a token")):
        measured = [m for m in report["measurements"] if m["kind"] == kind and model["name"] in m["ratios"]]
        longest = max(measured, key=lambda m: (-m["batch"], m["length"]))
        found[name] = 1 / longest["ratios"][model["name"]]["median"]
    return found


def how(recipe: dict[str, Any]) -> str:
    """ "0.75 of the states, 0.25 of the channels removed"."""
    names = {"column": "states", "channel": "channels", "layer": "layers"}
    parts, sparsity = recipe["pattern"].split("+"), recipe["sparsity"]
    gone = [f"{sparsity[part] if isinstance(sparsity, dict) else sparsity:g} of the {names[part]}" for part in parts]
    return f"{' and '.join(gone)} removed"


def bar(share: float) -> str:
    """A bar of what is left, against a dotted line for the whole."""
    filled = min(WIDTH, round(share * WIDTH))
    return "#" * filled + "." * (WIDTH - filled)


if __name__ == "__main__":
    main()
