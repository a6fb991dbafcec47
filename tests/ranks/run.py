"""Runs of one process beside the same of several: what they keep, and how far their numbers are apart.

    python -m tests.ranks.run            all cases with two processes
    python -m tests.ranks.run norms -n 3

Prints JSON: by case, where the manifests differ in more than the digits of a number, and how far numbers and weights
are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM

import ssmc
from ssmc.compressor.distillation.run import Lesson, distil_artefact
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.models.checkpoints import load_checkpoint
from tests.support.families import FAMILIES, TINY_VOCAB, roughen, with_tokenizer
from tests.support.models import random_mamba2
from tests.support.ranks import child, in_ranks
from tests.support.tasks import HERE, write_lines

SHORT = {"nsamples": 5, "seqlen": 40, "sparsity": 0.5}  # five samples: one process has more of them than the other


def mamba() -> torch.nn.Module:
    sizes = {"vocab_size": TINY_VOCAB, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 3, "time_step_rank": 2}
    return roughen(MambaForCausalLM(MambaConfig(**sizes)))


def family(name: str, **changes: Any) -> Callable[[], torch.nn.Module]:
    return lambda: FAMILIES[name](vocab_size=TINY_VOCAB, **changes)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "mamba": mamba,
    "mamba2": lambda: random_mamba2(vocab_size=TINY_VOCAB),
    "falcon_mamba": family("falcon_mamba"),
    "granite": family("granitemoehybrid"),
    "nemotron_h": family("nemotron_h"),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "refined": ("mamba", {"pattern": "column+channel", "round_channels": 8, "refine": 6}),
    "half precision": ("mamba", {"pattern": "column+channel", "round_channels": 8, "hidden_dtype": "bfloat16"}),
    "C rows": ("mamba2", {"pattern": "column"}),
    "norms": ("falcon_mamba", {"pattern": "column"}),
    "a hybrid": ("granite", {"pattern": "column+mlp+attention"}),
    "heads of a hybrid": ("nemotron_h", {"pattern": "head+mlp"}),
    "experts": ("granite", {"pattern": "expert", "sparsity": 0.34}),
    "neurons of experts": ("granite", {"pattern": "expert-width"}),
    "few bits": ("mamba", {"quantize": "w8", "group_size": 16, "pattern": "column"}),
    "single weights": ("mamba", {"pattern": "unstructured", "scope": "all"}),
    "distilled": ("mamba", {"pattern": "column", "distill": 3}),
}


def differences(one: Any, other: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Places where two manifests differ, and by how much relative to the larger: 1 where it is no number."""
    if isinstance(one, float) and isinstance(other, float):
        yield where, abs(one - other) / max(abs(one), abs(other), 1e-30)
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from differences(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif one != other:
        yield where, 1.0


def compared(alone: Path, shared: Path) -> dict[str, Any]:
    """What two artefacts have in common."""
    manifests = [json.loads((folder / "ssmc.json").read_text()) for folder in (alone, shared)]
    pairs = [[m["layers"], m.get("distilled")] for m in manifests]
    found = list(differences(*pairs))
    weights = [load_file(folder / "model.safetensors") for folder in (alone, shared)]
    apart = [float((weights[1][n].double() - w.double()).norm() / w.double().norm()) for n, w in weights[0].items()]
    other = [place for place, by in found if by == 1.0]
    return {"other": other, "errors": max((by for _, by in found if by < 1.0), default=0.0), "weights": max(apart)}


def compress(root: Path, case: str, out: Path) -> None:
    name, options = CASES[case]
    ssmc.compress(root / name, calib=root / "text.jsonl", out=out, command="-", **SHORT | options)


def carried_out(root: Path, case: str, count: int) -> dict[str, Any]:
    """A case alone, then shared, twice."""
    outs = [root / f"{case} {way}" for way in ("alone", "shared", "again")]
    code, said = child(partial(compress, root, case, outs[0]))
    if code:
        return {"other": [said]}
    for out in outs[1:]:
        if not in_ranks(count, partial(compress, root, case, out)):
            return {"other": ["a process failed"]}
    same = all(
        (outs[1] / file).read_bytes() == (outs[2] / file).read_bytes() for file in ("ssmc.json", "model.safetensors")
    )
    return compared(*outs[:2]) | {"same bytes": same}


def taught(root: Path, count: int) -> dict[str, Any]:
    """`ssmc distill` of what the first case left."""
    outs = [root / f"taught {way}" for way in ("alone", "shared")]
    lesson = Lesson(3, str(root / "text.jsonl"), 40)

    def teach(out: Path) -> None:
        distil_artefact(root / "refined alone", lesson, out=out, command="-")

    code, said = child(partial(teach, outs[0]))
    assert code == 0, said
    return compared(*outs) if in_ranks(count, partial(teach, outs[1])) else {"other": ["a process failed"]}


def scored(root: Path, count: int) -> dict[str, Any]:
    """Whether an evaluation, of text, constructed questions and tasks, says the same to the last bit."""

    for task, documents in HERE.items():
        write_lines(root / "tasks" / f"{task}.jsonl", documents)

    def score(name: str) -> None:
        asked = {"tasks": list(HERE), "data": root / "tasks", "batch_size": 2}
        report = evaluate_models([root / "mamba"], text=root / "text.jsonl", window=64, recall=True, **asked)
        (root / f"{name}-{os.getpid()}.json").write_text(json.dumps(report.to_json()["models"]))

    code, said = child(partial(score, "eval-alone"))
    assert code == 0, said
    if not in_ranks(count, partial(score, "eval-shared")):
        return {"other": ["a process failed"]}
    found = [path.read_text() for path in root.glob("eval-*.json")]
    return {"other": [] if len(found) == count + 1 and len(set(found)) == 1 else found}


def main() -> None:
    """Run cases, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="by default all")
    parser.add_argument("-n", type=int, default=2, help="processes")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # children of a process with threads that computed would wait for those threads
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load_checkpoint("tiny", lazy=True)  # imports what children need
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, make in MODELS.items():
            make().save_pretrained(root / name)
            with_tokenizer(root / name)
        found = {case: carried_out(root, case, asked.n) for case in asked.cases or CASES}
        if not asked.cases:
            found |= {"taught": taught(root, asked.n), "scored": scored(root, asked.n)}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
