"""Pruning a model layer by layer from its files to those of the result; no more than a layer of it is in memory.

A layer that is finished is on disk, with what happened to it in a journal. A run that goes on where another one ended
takes it from there: the layer is run, so that the next one reads what it read before, and not pruned again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ssmc.compressor.methods.method import Job, Plan
from ssmc.compressor.records import as_json, from_json
from ssmc.runtime.collectives import all_alike
from ssmc.runtime.errors import OutputError, UsageError, VerificationError
from ssmc.runtime.models.checkpoints import Checkpoint, Written
from ssmc.runtime.models.families import CHANNEL
from ssmc.runtime.ranks import ranks
from ssmc.runtime.resumable import Resumable
from ssmc.runtime.versions import versions

HIDDEN = "hidden"  # folder of hidden states that are not in memory


def goes_by_layer(plan: Plan) -> bool:
    """Whether nothing of a run looks at more than a layer of the model at once."""
    return not plan.config.distill and not any(step.looks_at_whole(plan) for step in plan.steps)


def check_shares(plan: Plan) -> None:
    """Refuse several processes for a method that must see all samples.

    Raises:
        UsageError: with the reason.
    """
    whole = [step.name for step in plan.steps if not step.shares_samples(plan)] if ranks() > 1 else []
    if whole:
        raise UsageError(
            f"Several processes cannot share the samples of this run: {', '.join(whole)} must see all of them "
            "together. Use one process."
        )


def check_samples(tokens: torch.Tensor | None) -> None:
    """Refuse more processes than there are samples (nsamples, seqlen), which are all that they share.

    Raises:
        UsageError: with the numbers.
    """
    count = 0 if tokens is None else len(tokens)
    if count < ranks() > 1:
        raise UsageError(
            f"There are {count} samples for {ranks()} processes. Give at least one sample to each with --nsamples, or "
            "use fewer processes."
        )


class Result:
    """The masked model on its way to the files of the result.

    Args:
        checkpoint: the dense model, not in memory.
        work: where it is written, and which layers are there already.
        follows: whether this is one of several processes and not the first, which alone writes.

    Raises:
        OutputError: layers that are called finished are not there.
    """

    def __init__(self, checkpoint: Checkpoint, work: Resumable, follows: bool = False):
        self.checkpoint, self.work, self.follows = checkpoint, work, follows
        if not follows:
            for folder in work.beside.glob(f"{HIDDEN}-*"):  # of the run that ended
                shutil.rmtree(folder, ignore_errors=True)
        self.written = Written(checkpoint, work.folder, again=follows or bool(work.steps))
        if work.steps and self.written.shards.made:
            raise OutputError(
                f"The files in {work.beside} are not those of its journal, so nothing can be resumed. Leave --resume "
                "out to begin anew."
            )

    def restore(self, job: Job) -> bool:
        """Give a job what an earlier run made of its layer; whether there was one."""
        note = self.work.steps.get(job.index)
        if note is None:
            return False
        result = from_json(note, job.plan)
        job.states_kept, job.channels_kept, job.records = result.states_kept, result.channels_kept, [*result.records]
        job.units_kept = dict(result.units_kept)
        stored = self.written.read(self._names(job))
        prefix = job.architecture.block_prefix(job.index)
        _fill(job.block, {name.removeprefix(prefix): tensor for name, tensor in stored.items()})
        if note["narrow"]:
            job.work = job.architecture.narrow(job.block, CHANNEL, job.channels_kept or ())
        if note["more"]:
            _fill(job.work, load_file(self._beside(job.index)))
        return True

    def finished(self, job: Job) -> None:
        """Write a layer as it is now; of several processes the first does.

        Raises:
            VerificationError: the processes made different things of it.
        """
        note = as_json(job.result())
        if not all_alike(json.dumps(note)):
            raise VerificationError(
                f"The processes made different things of layer {job.index}, so nothing was written. Give all of them "
                "the same hardware and versions, or use one."
            )
        if self.follows:
            return
        prefix, names = job.architecture.block_prefix(job.index), self._names(job)
        state = job.block.state_dict(prefix=prefix)
        rounded = {name: state[name].detach().to("cpu", self.checkpoint.dtypes[name]) for name in names}
        self.written.put(rounded)
        more = _not_stored(job, {name.removeprefix(prefix): tensor for name, tensor in rounded.items()})
        if more:
            save_file(more, self._beside(job.index))
        narrow = job.work is not job.block
        self.work.finished(job.index, note | {"narrow": narrow, "more": bool(more)})

    def rest(self) -> list[Path]:
        """Write what is not in a layer; all files."""
        prefix = self.checkpoint.architecture.block_prefix(0).removesuffix("0.")
        tensors = self.checkpoint.tensors().items()
        self.written.put({name: tensor for name, tensor in tensors if not name.startswith(prefix)})
        return self.written.close()

    def _names(self, job: Job) -> list[str]:
        prefix = job.architecture.block_prefix(job.index)
        return [name for name in self.checkpoint.dtypes if name.startswith(prefix)]

    def _beside(self, index: int) -> Path:
        return self.work.beside / f"layer-{index}.safetensors"


def _not_stored(job: Job, rounded: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that the layer runs with and that cannot be had from what is stored: those of a narrow copy."""
    own = job.work.state_dict()
    if job.work is not job.block:
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in own.items()}
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in own.items()
        if name in rounded and not torch.equal(tensor.cpu(), rounded[name].to(tensor.dtype))
    }


def _fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Overwrite the tensors of a module in place."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def identity(checkpoint: Checkpoint, plan: Plan, tokens: torch.Tensor | None, device: str) -> dict[str, Any]:
    """What makes the result of a run what it is: only a run with the same goes on where it ended."""
    text = None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(checkpoint.directory.iterdir())
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    }
    return {
        "options": plan.config.model_dump(mode="json", exclude={"device"}),
        "model": {"folder": str(checkpoint.directory.resolve()), "files": files},
        "calibration text": text,
        "versions": versions(),
        "device": device,
        "number of processes": ranks(),
    }
