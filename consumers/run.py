"""`make consumers`: other people's software loads and runs what ssmc exports, and gives the masked model's logits.

    python -m consumers.run
    python -m consumers.run --consumer mlx-lm --consumer openvino --model tiny --keep
    python -m consumers.run --consumer mamba-ssm --model tiny --model tiny-mamba2 --json mamba_ssm.json
    python -m consumers.run --take mamba_ssm.json

Every consumer has an environment of its own in .consumers and runs in a process of its own. What it computes, for whole
prompts and token by token, is compared with stock transformers on the masked model. The result goes to
benchmarks/results/consumers.json, of which the documentation makes its table; rows that were not run again stay.
What fails is a row with the reason. mamba_ssm, which takes a GPU and CUDA's compiler to build, is asked by hand, by the
Python that has it, from a checkout as it is; --take puts what was found elsewhere into the table.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from transformers.utils import logging

from consumers.artefacts import (
    DENSE,
    LIMITED,
    LIMITED_AT_FIRST,
    UNLIMITED,
    exported,
    models,
    prune,
    read_tokens,
    reference,
)
from consumers.asking import Consumer, ConsumerError
from consumers.environments import KINDS, ROOT, Kind, pinned, python_of
from consumers.results import (
    DIFFERS,
    FAILED,
    RAN,
    REFUSED,
    RESULTS,
    TOLERANCE,
    WRONG,
    Row,
    markdown,
    merged,
    read_rows,
    write_rows,
)
from ssmc.runtime.errors import SsmcError
from ssmc.runtime.models.checkpoints import read_description
from ssmc.runtime.models.checkpoints.sources import find_directory
from ssmc.runtime.models.consumers import computes_otherwise, refuses

FOLDER = ROOT / "build" / "consumers"
Logits = Mapping[str, torch.Tensor]
"""(L, V) each, see `reference`."""
WAYS = ("whole prompts", "token by token")
OTHERWISE = {
    UNLIMITED: "does not limit time steps as the model asks for",
    LIMITED_AT_FIRST: "limits time steps as the model asks for in the prompt only",
}
LENGTHS, FIRST = (1, 3, 16, 48), 16


def differences(found: Sequence[torch.Tensor], wanted: torch.Tensor, values: str) -> tuple[float, float]:
    """Largest difference over whole prompts and token by token.

    Args:
        found: behind every prompt of LENGTHS (len(LENGTHS), V), and behind every token after the first FIRST.
        wanted: (L, V) logits.
        values: "logits", or "log probabilities" that `found` holds.
    """
    if values != "logits":
        wanted = wanted.double().log_softmax(-1)
    whole, stepped = found
    pairs = (whole, wanted[[length - 1 for length in LENGTHS]]), (stepped, wanted[FIRST:])
    worst = [float((got[:, : right.shape[-1]].double() - right).abs().max()) for got, right in pairs]
    return tuple(value if math.isfinite(value) else math.inf for value in worst)


def ask(row: Row, kind: Kind, python: Path, export: Path, tokens: list[int], wanted: Logits) -> Row:
    """Have a consumer run an export."""
    try:
        with Consumer(python, kind.script, export) as consumer:
            row = replace(row, version=consumer.versions[kind.package], values=consumer.values)
            found = [torch.from_numpy(values) for values in consumer.logits(tokens, LENGTHS, FIRST)]
    except ConsumerError as error:
        return replace(row, outcome=FAILED, reason=str(error))
    return judge(row, {name: differences(found, logits, row.values) for name, logits in wanted.items()})


def judge(row: Row, off: Mapping[str, tuple[float, float]]) -> Row:
    """A row with its outcome.

    Args:
        row: of a consumer that ran.
        off: differences over whole prompts and token by token, to the model and, where it limits its time steps, to
            models that do so otherwise. A consumer may do one thing with prompts and another with single tokens.
    """
    found, remarks = [], []
    for number, way in enumerate(WAYS):
        able = [name for name in off if off[name][number] <= TOLERANCE]
        name = LIMITED if LIMITED in able or not able else able[0]
        found.append(off[name][number])
        if name != LIMITED:
            remarks.append(f"{way}: {OTHERWISE[name]}, which moves a logit by {off[LIMITED][number]:.0e}")
    row = replace(row, whole=found[0], stepped=found[1])
    if max(found) <= TOLERANCE:
        return replace(row, reason="; ".join(remarks))
    reason = ", ".join(f"{way} {value:.1e}" for way, value in zip(WAYS, off[LIMITED], strict=True))
    return replace(row, outcome=DIFFERS, reason=reason)


def rows_of(name: str, source: str, kinds: Sequence[Kind], pythons: dict[str, Path | ConsumerError]) -> Iterator[Row]:
    """Every cut of a model in every consumer."""
    folder = FOLDER / name.split(",")[0]
    tokens = read_tokens(source)
    for cut, masked in prune(name, source, folder):
        place = folder / "exports" / cut.replace(" ", "-").replace("/", "-").replace(",", "")
        shrunk = None if cut == DENSE else exported(masked, cut, "safetensors", {}, True, place)
        wanted = reference(masked, tokens, FIRST, shrunk)
        for kind in kinds:
            row = Row(kind.title, kind.page, name, cut, kind.format, RAN, date.today().isoformat())
            python = pythons[kind.name]
            if isinstance(python, ConsumerError):
                yield replace(row, outcome=FAILED, reason=str(python))
                continue
            row = replace(row, version=pinned(kind))
            try:
                export = exported(masked, cut, kind.format, dict(kind.options), kind.dense, place)
            except SsmcError as error:
                yield replace(row, outcome=REFUSED, reason=str(error))
                continue
            yield explained(ask(row, kind, python, export, tokens, wanted), kind, source)


def explained(row: Row, kind: Kind, source: str) -> Row:
    """A row that differs, as wrong where the consumer is known to compute something else of such a model.

    One that failed gets what is known of why.
    """
    if row.outcome not in (DIFFERS, FAILED):
        return row
    described = read_description(find_directory(source), row.model)
    if row.outcome == FAILED:
        known = refuses(kind.software, *described, row.version) if kind.software else None
        return replace(row, reason=known) if known else row
    known = computes_otherwise(kind.software, *described, wrong=True, version=row.version)
    return replace(row, outcome=WRONG, reason=f"{row.reason}: {known}") if known else row


def environments(kinds: Sequence[Kind]) -> dict[str, Path | ConsumerError]:
    """The interpreter of every consumer, or why there is none."""
    found: dict[str, Path | ConsumerError] = {}
    for kind in kinds:
        print(f"environment of {kind.title}", flush=True)
        try:
            found[kind.name] = python_of(kind)
        except ConsumerError as error:
            found[kind.name] = error
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 1 if a consumer computes something else than the model, without a fault of its own that is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--consumer", action="append", choices=[kind.name for kind in KINDS], help="all unless given")
    parser.add_argument("--model", action="append", help="tiny, tiny-mamba2, jamba ...; all unless given")
    parser.add_argument("--keep", action="store_true", help="take exports of an earlier run as they are")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--take", type=Path, help="run nothing: take the rows of a run on another machine")
    args = parser.parse_args(arguments)
    if args.take:
        write_rows(merged(read_rows(args.json), read_rows(args.take)), args.json)
        return 0
    logging.set_verbosity_error()  # transformers recommends CUDA kernels
    kinds = [kind for kind in KINDS if kind.name in (args.consumer or ()) or not (args.consumer or kind.by_hand)]
    if not args.keep:
        shutil.rmtree(FOLDER, ignore_errors=True)
    pythons, rows = environments(kinds), []
    for name, source in models(FOLDER, args.model or ()).items():
        for row in rows_of(name, source, kinds, pythons):
            said = row.reason or f"whole prompts {row.whole:.1e}, token by token {row.stepped:.1e}"
            print(f"{row.consumer}: {row.model}, {row.cut}: {row.outcome}: {said}", flush=True)
            rows.append(row)
            write_rows(merged(read_rows(args.json), [row]), args.json)  # what was found stays, whatever comes
    print("\n" + markdown(read_rows(args.json)))
    return int(any(row.outcome == DIFFERS for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
