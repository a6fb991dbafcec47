"""What a consumer that was run by hand told of an export, beside the masked model: a row for `make consumers`.

python -m consumers.by_hand.compare told.npz MASKED --model tiny-mamba2 --cut "32 of 64 states" --export EXPORT
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consumers.artefacts import DENSE, reference
from consumers.results import FAILED, RAN, RESULTS, Row, merged, read_rows, write_rows
from consumers.run import judge

MOST = 300  # letters of a reason


def differences(told: Mapping[str, Any], logits: torch.Tensor) -> tuple[float, float]:
    """Largest difference of a log probability within the prompt, and of those behind it.

    Args:
        told: what `run_vllm.py` wrote.
        logits: (L, V) of the same tokens.
    """
    wanted = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(told["ids"])).numpy()  # (L - 1, TOP)
    off = np.abs(told["told"] - wanted).max(axis=1)
    first = int(told["prompt"]) - 1  # what follows the last token of the prompt was computed with it
    return float(off[: first + 1].max()), float(off[first + 1 :].max())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the row, and put it into the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("told", help="what the consumer told")
    parser.add_argument("masked", help="what `ssmc compress` wrote, or a dense model")
    parser.add_argument("--model", required=True, help="its name in the table")
    parser.add_argument("--cut", default=DENSE, help="how it was pruned, in the words of the table")
    parser.add_argument("--export", type=Path, help="of a pruned model, which the consumer read")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    with np.load(args.told) as file:
        told = dict(file)
    row = Row(f"vLLM, {told['device']}", "vllm", args.model, args.cut, "safetensors", RAN, date.today().isoformat())
    row = replace(row, version=str(told["version"]))
    if "error" in told:
        row = replace(row, outcome=FAILED, reason=" ".join(str(told["error"]).split())[:MOST])
    else:
        row = replace(row, values="log probabilities")
        wanted = reference(args.masked, told["tokens"].tolist(), int(told["prompt"]), args.export)
        row = judge(row, {name: differences(told, logits) for name, logits in wanted.items()})
    write_rows(merged(read_rows(args.json), [row]), args.json)
    print(row)


if __name__ == "__main__":
    main()
