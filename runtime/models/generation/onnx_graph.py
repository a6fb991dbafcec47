"""Open the folder of an ONNX export: the files are whole, the graph has the inputs and outputs a session needs.

    input_ids (B, L) int64, attention_mask (B, L) int64, and per layer past_conv_i (B, d_conv - 1, d_inner) and
    past_ssm_i (B, d_state, d_inner)  ->  logits (B, 1 or L, V), present_conv_i, present_ssm_i

SSM states may also be float16, or int8 with past_scale_i and present_scale_i beside them, float16.
A Mamba-2 has past_conv_i (B, d_conv - 1, d_inner + 2 n_groups d_state) and past_ssm_i (B, heads, d_state, head_dim).
Attention has past_key_i and past_value_i (B, KV heads, past, head_dim), and the model past_mask (B, past): they grow by
the tokens of every call. Only B, L and that are free; everything else is read from the graph, so layers may be of
different sizes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmc.runtime.device import choose_device
from ssmc.runtime.errors import CheckpointError, UsageError
from ssmc.runtime.files import sha256
from ssmc.runtime.manifest import MANIFEST, ExportManifest, read_manifest
from ssmc.runtime.models.generation.onnx_names import GROWS, PAST, TOTAL, present_name
from ssmc.runtime.progress import NO_PROGRESS, Progress

GRAPH = "model.onnx"
IDS, MASK, LOGITS = "input_ids", "attention_mask", "logits"
CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
SPIN_MICROSECONDS = "200"
"""How long a thread waits for work until it sleeps. onnxruntime's own choice is longer and made for an idle machine:
beside other work (load 9 to 15 on 2 cores) a step of `tiny` took 3 times as long with it. On an idle one a step of 130M
shapes takes 22.6 ms with this, 22.4 with 1000 and 24.6 with 20. Releases that do not know the setting ignore it."""

EXTRA = "pip install 'ssmc[onnx]'"

TYPES = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(double)": (torch.float64, np.float64),
    "tensor(int8)": (torch.int8, np.int8),
}
"""onnxruntime's names of the types of states and logits -> torch's and numpy's, which binding wants."""


@dataclass(frozen=True)
class Slot:
    """One float input or output: its name, its sizes after the batch, and its type.

    `grows` is the place among the sizes of the one that grows by the tokens of a call, which is 0 there; None: none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    numpy_dtype: Any
    grows: int | None = None


@dataclass(frozen=True)
class Graph:
    """An open export.

    Attributes:
        session: onnxruntime's InferenceSession.
        device: where it runs.
        states: past slots and the present slots in the same order.
        logits: of shape (V,).
        all_logits: whether the graph gives the logits of all positions; otherwise of the last token of each row.
        whole_mask: whether the mask of a call is one of all tokens so far.
    """

    session: Any
    device: torch.device
    states: tuple[tuple[Slot, Slot], ...]
    logits: Slot
    all_logits: bool
    whole_mask: bool = False

    @property
    def rounds(self) -> bool:
        """Whether states are rounded after every call, so that it matters how a text is cut into calls."""
        return any(slot.dtype in (torch.int8, torch.float16) for slot, _ in self.states)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.shape[0]


def is_onnx_export(folder: str | Path) -> bool:
    """Whether a folder holds an ONNX export, or what is left of one."""
    folder = Path(folder).expanduser()
    if (folder / GRAPH).is_file():
        return True
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    return isinstance(manifest, ExportManifest) and manifest.format == "onnx"


def open_graph(
    folder: str | Path, device: str = "auto", all_logits: bool = False, progress: Progress = NO_PROGRESS
) -> Graph:
    """Read an ONNX export.

    Args:
        folder: holds model.onnx and its external data.
        device: "cpu", "cuda" or "auto": CUDA where both torch and onnxruntime have it.
        all_logits: let a graph that gives the last token's logits give all, where it is one of ssmc's and onnx is
            installed; otherwise it stays as it is.
        progress: told what is being done.

    Raises:
        UsageError: onnxruntime is missing, or cannot use the device.
        CheckpointError: files are missing or damaged, or this is another kind of graph.
    """
    folder = Path(folder).expanduser()
    ort = require_onnxruntime()
    where = _device(device, ort.get_available_providers())
    if not (folder / GRAPH).is_file():
        raise CheckpointError(f"{folder} holds no {GRAPH}, so it is not an ONNX export. Export the model again.")
    progress(f"checking the files of {folder.name}", 0, 2)
    _check_files(folder)
    progress(f"reading {folder.name}", 1, 2)
    try:
        options = _options(ort)
        source: str | bytes = str(folder / GRAPH)
        if all_logits:
            source = _with_all_logits(folder) or source
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        session = ort.InferenceSession(source, options, providers=_providers(where))
    except Exception as error:  # onnxruntime has a dozen classes of its own, all direct children of Exception
        raise CheckpointError(
            f"{folder / GRAPH} cannot be read by onnxruntime ({reason(error)}). Export the model again."
        ) from error
    if where.type == "cuda" and session.get_providers()[0] != CUDA_PROVIDER:
        raise UsageError("onnxruntime has a CUDA provider but could not start it (is CUDA installed?). Use cpu.")
    progress(f"reading {folder.name}", 2, 2)
    return _graph(session, where, folder)


def _with_all_logits(folder: Path) -> bytes | None:
    """The graph with its head reading all tokens, its weights still in their file; None where that cannot be done."""
    try:
        import onnx

        from ssmc.runtime.models.generation.onnx_logits import give_all_logits

        model = onnx.load(folder / GRAPH, load_external_data=False)
        return give_all_logits(model).SerializeToString()
    except (ImportError, CheckpointError):
        return None


def check_runtime(device: str = "auto") -> None:
    """See whether exports can be run on a device, before one is read.

    Raises:
        UsageError: onnxruntime is missing, or cannot use the device.
    """
    _device(device, require_onnxruntime().get_available_providers())


def require_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"ONNX exports are run by onnxruntime, which cannot be imported ({error}): {EXTRA}."
        ) from error
    onnxruntime.set_default_logger_severity(4)  # what goes wrong comes as an exception, and is said once
    return onnxruntime


def reason(error: Exception) -> str:
    """What onnxruntime has to say, on one line."""
    text = " ".join(str(error).split()).removeprefix("[ONNXRuntimeError] : ").rstrip(".")
    text = re.sub(r"^\d+ : [A-Z_]+ : ", "", text)
    return text if len(text) <= 200 else text[:200].rstrip() + "..."


def _device(name: str, providers: Sequence[str]) -> torch.device:
    if name == "auto" and CUDA_PROVIDER not in providers:
        return torch.device("cpu")
    device = choose_device(name)
    if device.type == "cuda" and CUDA_PROVIDER not in providers:
        raise UsageError(
            "The device cuda was asked for, but the installed onnxruntime has no CUDA provider. Use cpu, or install "
            "onnxruntime-gpu in its place."
        )
    return device


def _providers(device: torch.device) -> list[Any]:
    return [CPU_PROVIDER] if device.type == "cpu" else [(CUDA_PROVIDER, {"device_id": device.index or 0}), CPU_PROVIDER]


def _options(ort: Any) -> Any:
    """As many threads as torch has; one operator after the other, since each is parallel in itself."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    return options


def _check_files(folder: Path) -> None:
    """Compare the files with the manifest's records: a flipped bit in a weight would go unnoticed otherwise."""
    if not (folder / MANIFEST).is_file():
        return
    for name, record in read_manifest(folder).files.items():
        path = folder / name
        if Path(name).name != name or not name.startswith(GRAPH):
            continue
        if not os.path.isfile(path):  # which takes any name, also one that no system can have
            raise CheckpointError(f"{path} is missing. Export the model again.")
        if path.stat().st_size != record.get("bytes") or sha256(path) != record.get("sha256"):
            raise CheckpointError(f"{path} is damaged: it is not the file that was exported. Export the model again.")


def _graph(session: Any, device: torch.device, folder: Path) -> Graph:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    pasts = [name for name in inputs if name.startswith(PAST)]
    wanted = {IDS, MASK, *pasts}, {LOGITS, *(present_name(name) for name in pasts)}
    for kind, names, found in (("input", wanted[0], inputs), ("output", wanted[1], outputs)):
        if names != set(found):
            missing, more = sorted(names - set(found)), sorted(set(found) - names)
            what = f"no {kind} {', '.join(missing)}" if missing else f"an {kind} {', '.join(more)} nobody knows of"
            raise _foreign(folder, f"it has {what}")
    if not pasts:
        raise _foreign(folder, "it has no states (no input past_...)")
    states = tuple((_slot(inputs[name], folder), _slot(outputs[present_name(name)], folder)) for name in pasts)
    for past, present in states:
        if (past.shape, past.dtype, past.grows) != (present.shape, present.dtype, present.grows):
            raise _foreign(folder, f"{past.name} and {present.name} differ")
    logits = outputs[LOGITS]
    if len(logits.shape) != 3:
        raise _foreign(folder, "logits are not (batch, length, vocabulary)")
    whole = inputs[MASK].shape[1:] == [TOTAL]
    return Graph(session, device, states, _slot(logits, folder, skip=2), logits.shape[1] != 1, whole)


def _slot(value: Any, folder: Path, skip: int = 1) -> Slot:
    """The description of a float value; its first `skip` sizes may be free."""
    shape = tuple(value.shape[skip:])
    free = [place for place, size in enumerate(shape) if size in (GROWS, TOTAL)] if skip == 1 else []
    grows = free[0] if len(free) == 1 else None
    shape = tuple(0 if place == grows else size for place, size in enumerate(shape))
    if value.type not in TYPES or not all(isinstance(size, int) for size in shape):
        raise _foreign(folder, f"{value.name} is {value.type} of {list(value.shape)}")
    return Slot(value.name, shape, *TYPES[value.type], grows)


def _foreign(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / GRAPH} is not a graph that ssmc runs: {why}. Make one with `ssmc export --format onnx`."
    )
