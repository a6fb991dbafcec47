"""Selective scans of Mamba and Mamba-2: one interface, fast CPU kernels, and plain torch where they cannot serve."""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from types import ModuleType

from ssmc.runtime.errors import UsageError
from ssmc.runtime.later import torch
from ssmc.runtime.scan import reference, ssd
from ssmc.runtime.scan.accelerators import accelerates, accelerator, is_plain
from ssmc.runtime.scan.inputs import ScanInputs, SsdInputs
from ssmc.runtime.scan.moments import Moments, SsdMoments, moments_of_states, quartic_moment, sum_of_squares
from ssmc.runtime.scan.rounded import rounded_scan
from ssmc.runtime.scan.rounding import StateFormat

__all__ = [
    "BACKENDS",
    "Moments",
    "ScanInputs",
    "SsdInputs",
    "SsdMoments",
    "accelerator",
    "check_backend",
    "quartic_moment",
    "scan_moments",
    "scan_states",
    "selective_scan",
    "ssd_moments",
    "ssd_scan",
    "sum_of_squares",
]

BACKENDS = ("auto", "cpu", "triton", "mamba-ssm", "reference")


def selective_scan(
    inputs: ScanInputs,
    state: torch.Tensor | None = None,
    backend: str = "auto",
    in_place: bool = False,
    rounding: StateFormat | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence of one layer and read it out (Mamba, section 3.2; see `ScanInputs`).

    Args:
        inputs: what the scan reads; float16 and bfloat16 are computed in float32.
        state: (B, D, N) state before the first token; None starts from zero. It is not modified.
        backend: "cpu" the numba kernels, "triton" our kernels for a GPU, "mamba-ssm" that package's where it is
            installed, "reference" plain torch on any device, "auto" the numba kernels for CPU tensors, Triton for those
            of a GPU if it is there, and the reference for everything else. All but mamba-ssm's, which leave that to the
            reference, have gradients here, but only those of the reference can be differentiated again.
        in_place: allow a kernel for a GPU to overwrite the state of a single token with the one after it.
        rounding: round the state to this format after every token but the last; None rounds nothing.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, gated when `inputs.z` is given, and the final state (B, D, N) in
        float32.

    Raises:
        UsageError: there is no such backend, or it cannot take these tensors.
        ValueError: the shapes do not belong together.
    """
    if rounding is not None:
        return rounded_scan(inputs.with_time_steps(), state, rounding, partial(selective_scan, backend=backend))
    module = _choose(backend, inputs, state, "cpu_backward")
    if accelerates(module):
        return module.selective_scan(inputs, state, in_place=in_place)
    return module.selective_scan(inputs.with_time_steps(), state)


def scan_states(inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """All hidden states of the recurrence; takes memory for L (D, N) states, so give it one time chunk at a time.

    Args and errors: as `selective_scan`, but only the reference has gradients.

    Returns:
        (B, L + 1, N, D) float32; entry t is the state before token t, so `[:, 1:]` is h_t, `[:, -1]` the final state.
    """
    module = _choose(backend, inputs, state)
    return module.scan_states(inputs if accelerates(module) else inputs.with_time_steps(), state)


def scan_moments(inputs: ScanInputs, state: torch.Tensor | None = None, backend: str = "auto") -> Moments:
    """Sums over all hidden states of the recurrence; on a GPU none of the states ever reaches its memory.

    Args and errors: as `selective_scan`, without gradients.
    """
    module = _choose(backend, inputs, state)
    if accelerates(module):
        return module.scan_moments(inputs, state)
    return moments_of_states(inputs, state, module.scan_states)


def ssd_scan(
    inputs: SsdInputs,
    state: torch.Tensor | None = None,
    backend: str = "auto",
    in_place: bool = False,
    rounding: StateFormat | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence of one Mamba-2 layer and read it out (Mamba-2, section 6; see `SsdInputs`).

    Args:
        inputs: what the scan reads; float16 and bfloat16 are computed in float32 on a CPU, and multiplied as they are,
            with sums in float32, on a GPU.
        state: (B, H, P, N) state before the first token; None starts from zero. It is not modified.
        backend: as for `selective_scan`, without "mamba-ssm". The reference, matrix products over chunks of tokens, and
            Triton's kernels have gradients.
        in_place: allow a kernel for a GPU to overwrite the state of a single token with the one after it.
        rounding: round the state to this format after every token but the last; None rounds nothing.

    Returns:
        Output (B, L, D) in the dtype of `inputs.u`, not gated, and the final state (B, H, P, N) in float32.

    Raises:
        UsageError: there is no such backend, or it cannot take these tensors.
        ValueError: the shapes do not belong together.
    """
    if rounding is not None:
        return rounded_scan(inputs.with_time_steps(), state, rounding, partial(ssd_scan, backend=backend))
    module = _choose(backend, inputs, state)
    if accelerates(module):
        return module.ssd_scan(inputs, state, in_place=in_place)
    return module.ssd_scan(inputs.with_time_steps(), state)


def ssd_moments(
    inputs: SsdInputs, gain: torch.Tensor, state: torch.Tensor | None = None, backend: str = "auto"
) -> SsdMoments:
    """Sums over all hidden states of a Mamba-2 with one group of heads, on a GPU, none of which reaches its memory.

    Args:
        inputs: what the scan reads.
        gain: (B, L, D) by which a read-out is multiplied on its way to out_proj.
        state: (B, H, P, N) before the first token; None starts from zero.
        backend: "triton", or "auto" for tensors of a GPU.

    Raises:
        UsageError: there is no kernel for these tensors.
        ValueError: the shapes do not belong together.
    """
    module = _choose(backend, inputs, state)
    if not accelerates(module):
        raise UsageError("Sums over a Mamba-2's states need a GPU and triton: elsewhere, sum over `scan_states`.")
    if inputs.groups != 1 or gain.shape != inputs.u.shape:
        raise ValueError(f"there must be one group and a gain for every channel, not {inputs.groups}, {gain.shape}")
    return module.ssd_moments(inputs, gain, state)


def check_backend(backend: str) -> str:
    """Return `backend` if there is such a one.

    Raises:
        UsageError: there is not.
    """
    if backend not in BACKENDS:
        raise UsageError(f"There is no scan backend {backend!r}: choose one of {', '.join(BACKENDS)}.")
    return backend


def _choose(
    backend: str, inputs: ScanInputs | SsdInputs, state: torch.Tensor | None, with_gradients: str | None = None
) -> ModuleType:
    """The module that computes this scan; `with_gradients` names the one of the kernels' that has gradients, if any."""
    is_ssd = isinstance(inputs, SsdInputs)
    plain, kernels = (ssd, "ssd_cpu") if is_ssd else (reference, "cpu")
    if check_backend(backend) == "reference":
        return plain
    if is_ssd and backend == "mamba-ssm":
        raise UsageError("There is no mamba-ssm scan of a Mamba-2: use backend 'auto', 'triton', 'cpu' or 'reference'.")
    tensors = [t for t in (*vars(inputs).values(), state) if isinstance(t, torch.Tensor)]
    on_gpu = accelerator(backend, tensors, gradients=is_ssd or with_gradients is not None)
    if on_gpu is not None:
        _check(inputs, state)
        return on_gpu
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if backend not in ("auto", "cpu"):
        return plain
    obstacle = _obstacle(tensors)
    if obstacle is None and grad and with_gradients is None:
        obstacle = f"it computes no gradients of {'a Mamba-2' if is_ssd else 'all states'}"
    if obstacle is None:
        # the kernels work on raw memory
        _check(inputs, state)
        found = _kernels(with_gradients if grad and with_gradients else kernels)
        return plain if found is None else found
    if backend == "cpu":
        raise UsageError(f"The cpu scan cannot run here: {obstacle}. Use backend 'auto' or 'reference'.")
    return plain


def _obstacle(tensors: list[torch.Tensor]) -> str | None:
    """Why the numba kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if not tensor.is_cpu:
            return "a tensor is not in CPU memory"
        if not is_plain(tensor):
            return "a tensor is of a special type, without plain memory"
    if _kernels("cpu") is None:
        return "numba cannot be imported"
    return None


@cache
def _kernels(name: str) -> ModuleType | None:
    """A module of numba kernels, imported at first use as numba takes half a second; None if missing or broken."""
    try:
        return import_module(f".{name}", __name__)
    except Exception:  # a numba that does not fit this numpy or Python raises all sorts of errors
        return None


def _check(inputs: ScanInputs | SsdInputs, state: torch.Tensor | None) -> None:
    """Raise ValueError unless all shapes belong together."""
    if isinstance(inputs, SsdInputs):
        _check_ssd_shapes(inputs, state)
    else:
        _check_shapes(inputs, state)


def _check_shapes(inputs: ScanInputs, state: torch.Tensor | None) -> None:
    """Raise ValueError unless all shapes belong together."""
    if inputs.u.dim() != 3 or inputs.A.dim() != 2:
        raise ValueError(f"u must be (B, L, D) and A (D, N), not {tuple(inputs.u.shape)} and {tuple(inputs.A.shape)}")
    sequence = (inputs.batch, inputs.length)
    channels, states = (*sequence, inputs.d_inner), (*sequence, inputs.d_state)
    wanted = {"dt": channels, "z": channels, "B": states, "C": states, "D": channels[2:], "dt_bias": channels[2:]}
    wanted["A"] = (inputs.d_inner, inputs.d_state)
    for name, shape in wanted.items():
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} to go with u and A, not {tuple(tensor.shape)}")
    if state is not None and state.shape != (inputs.batch, inputs.d_inner, inputs.d_state):
        raise ValueError(f"state must be {(inputs.batch, inputs.d_inner, inputs.d_state)}, not {tuple(state.shape)}")


def _check_ssd_shapes(inputs: SsdInputs, state: torch.Tensor | None) -> None:
    """Raise ValueError unless all shapes belong together."""
    if inputs.u.dim() != 3 or inputs.dt.dim() != 3 or inputs.B.dim() != 4:
        shapes = [tuple(tensor.shape) for tensor in (inputs.u, inputs.dt, inputs.B)]
        raise ValueError("u must be (B, L, D), dt (B, L, H) and B (B, L, G, N), not {}, {} and {}".format(*shapes))
    sequence, heads = (inputs.batch, inputs.length), inputs.heads
    if inputs.d_inner % heads or heads % inputs.groups:
        raise ValueError(f"{inputs.d_inner} channels, {heads} heads and {inputs.groups} groups do not divide evenly")
    readers = (*sequence, inputs.groups, inputs.d_state)
    wanted = {"dt": (*sequence, heads), "z": inputs.u.shape, "B": readers, "C": readers, "A": (heads,), "D": (heads,)}
    wanted["dt_bias"] = (heads,)
    for name, shape in wanted.items():
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)} to go with u, dt and B, not {tuple(tensor.shape)}")
    if state is not None and state.shape != (inputs.batch, heads, inputs.head_dim, inputs.d_state):
        wanted_state = (inputs.batch, heads, inputs.head_dim, inputs.d_state)
        raise ValueError(f"state must be {wanted_state}, not {tuple(state.shape)}")
