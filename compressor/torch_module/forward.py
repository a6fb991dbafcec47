"""A user's module on the user's batches, run by its own forward while its mixers are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import nn

from ssmc.runtime.errors import CalibrationError, SsmcError
from ssmc.runtime.models.mixers import Mixer
from ssmc.runtime.progress import NO_PROGRESS, Progress

AGREES = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest number of an output
AGREES_HALF = 2e-2
SEQUENCES = "a (B, L, d_model) tensor"  # what a mixer of one direction reads

Forward = Callable[[nn.Module, Any], Any]
"""How a module is run on a batch."""


def run_on(module: nn.Module, batch: Any) -> Any:
    """A tensor is the only argument, a tuple or list the positional ones, a mapping those with names."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


class _Enough(BaseException):
    """Ends a forward when everything was seen; no `except Exception` of the module's own stops it."""


@dataclass(frozen=True)
class Call:
    """What a mixer was called with."""

    hidden: torch.Tensor  # (B, L, d_model), or (B, H, W, d_model) of an image
    mask: torch.Tensor | None  # (B, L), 0 at padding

    @classmethod
    def of(cls, mixer: Watchable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """The first floating-point (B, L, d_model) among the arguments, and transformers' mask; None without any."""
        sequences = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        axes = getattr(mixer, "axes", 3)
        hidden = next((a for a in sequences if a.dim() == axes and a.is_floating_point()), None)
        if hidden is None:
            return None
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return cls(hidden, None)
        return cls(hidden, mask[:, -hidden.shape[1] :])

    def pieces(self) -> Iterator[torch.Tensor]:
        """The sequences without their padding: all together, or (1, length, d_model) each."""
        if self.mask is None or bool(self.mask.all()):
            yield self.hidden
            return
        for row, mask in zip(self.hidden, self.mask, strict=True):
            places = mask.nonzero().flatten().tolist()
            if places:
                yield row[None, places[0] : places[-1] + 1]


@dataclass
class Use:
    """What a mixer did on the first batch."""

    calls: int = 0
    reads_sequences: bool = True
    agrees: bool = True  # whether its own forward puts out what its structure says
    finite: bool = True

    def reason_to_leave(self, wanted: str, otherwise: str) -> str | None:
        """Why a mixer that was used like this is left as it is; None: it is not.

        Args:
            wanted: what it should have been called with.
            otherwise: what is said of one whose forward computes something else than its structure says.

        Raises:
            CalibrationError: what the module puts out is no number.
        """
        if not self.calls:
            return "was not called on the first batch"
        if not self.reads_sequences:
            return f"was called without {wanted}"
        if not self.finite:
            raise CalibrationError(
                "The module puts out NaN or infinity on the first batch. Check the batches and the module, or compute "
                "in float32."
            )
        return None if self.agrees else otherwise


class Watchable(Protocol):
    """A mixer, as far as it is watched."""

    @property
    def name(self) -> str:
        """Where it is in the module."""

    @property
    def module(self) -> nn.Module:
        """The mixer itself."""


Agreement = Callable[[Any], Callable[[Call, torch.Tensor], bool]]
"""Of a mixer: whether what it put out for a call is what its structure says."""


@dataclass
class WatchedModule:
    """A module and the batches it is calibrated on."""

    module: nn.Module
    batches: Iterable[Any]
    forward: Forward = run_on
    progress: Progress = NO_PROGRESS
    _first: Any = field(init=False)

    def __post_init__(self) -> None:
        if isinstance(self.batches, Iterator):  # can be read once, and every mixer reads them anew
            self.batches = list(self.batches)
        try:
            self._first = next(iter(self.batches))
        except StopIteration:
            raise CalibrationError("batches is empty: give at least one, as the module takes them.") from None
        except TypeError:
            raise CalibrationError(
                f"batches is a {type(self.batches).__name__}, which holds no batches: give a list of them or a "
                "DataLoader."
            ) from None

    def look(self, mixers: Sequence[Watchable], agreement: Agreement | None = None) -> dict[str, Use]:
        """What the mixers do on the first batch, by name, in the order they are first called.

        Args:
            mixers: of the module.
            agreement: whether a call of a mixer put out what its structure says; by default that of its family.
        """
        seen: dict[str, Use] = {}

        def hook(mixer: Watchable) -> Callable[..., None]:
            agrees = structural_agreement(cast(Mixer, mixer)) if agreement is None else agreement(mixer)

            def watch(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                entry = seen.setdefault(mixer.name, Use())
                entry.calls += 1
                call = Call.of(mixer, args, kwargs)
                if call is None:
                    entry.reads_sequences = False
                    return
                own = _tensor(output)
                entry.finite &= bool(own.isfinite().all())
                entry.agrees &= agrees(call, own)

            return watch

        with self._hooked([m.module.register_forward_hook(hook(m), with_kwargs=True) for m in mixers]):
            self._run(self._first, 0)
        return seen

    def inputs(self, mixer: Watchable, calls: int, label: str) -> Iterator[torch.Tensor]:
        """What a mixer reads, batch after batch: sequences (n, L, d_model) without padding.

        Args:
            mixer: the mixer.
            calls: how often a forward calls it; with the last the forward ends.
            label: what to call the work.
        """
        total = len(self.batches) if isinstance(self.batches, Sized) else 0
        for number, batch in enumerate(self.batches):
            self.progress(label, number, max(total, number + 1))
            read: list[Call | None] = []

            def watch(_: nn.Module, args: Any, kwargs: Any, read: list[Call | None] = read) -> None:
                read.append(Call.of(mixer, args, kwargs))
                if len(read) >= calls:
                    raise _Enough

            with self._hooked([mixer.module.register_forward_pre_hook(watch, with_kwargs=True)]):
                self._run(batch, number)
            for call in read:
                if call is None:
                    raise CalibrationError(
                        f"{mixer.name or 'The mixer'} reads no (B, L, d_model) tensor in batch {number}, as it does in "
                        "the first. Give batches of one kind."
                    )
                for piece in call.pieces():
                    if not bool(piece.isfinite().all()):
                        raise CalibrationError(
                            f"What {mixer.name or 'the mixer'} reads in batch {number} is not finite (NaN or infinity)."
                            " Check the batches and the module, or compute in float32."
                        )
                    yield piece

    def outputs(self, mixer: Watchable, calls: int) -> list[torch.Tensor]:
        """What a mixer puts out on the first batch, call after call."""
        put_out: list[torch.Tensor] = []

        def watch(_: nn.Module, args: Any, output: Any) -> None:
            put_out.append(_tensor(output).detach().clone())
            if len(put_out) >= calls:
                raise _Enough

        with self._hooked([mixer.module.register_forward_hook(watch)]):
            self._run(self._first, 0)
        return put_out

    def _run(self, batch: Any, number: int) -> None:
        try:
            self.forward(self.module, batch)
        except _Enough:
            pass
        except SsmcError:
            raise
        except Exception as error:
            raise CalibrationError(
                f"The {type(self.module).__name__} cannot be run on batch {number} ({type(error).__name__}: {error}). "
                f"{self._how_given()}"
            ) from error

    def _how_given(self) -> str:
        """What to give where a batch could not be run."""
        if isinstance(self.batches, (torch.Tensor, Mapping, str)):  # iterating these gives no batches, as a rule
            what = type(self.batches).__name__
            return f"batches is a {what} itself, batch 0 the first that comes out of it: give a list, [{what}, ...]."
        return (
            "A tensor is given to it as its only argument, a tuple as several, a dict by name; `forward` can do "
            "otherwise."
        )

    @staticmethod
    @contextmanager
    def _hooked(handles: Sequence[Any]) -> Iterator[None]:
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module in eval mode inside the block, and every part of it as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def same(outputs: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    """Whether a mixer put out the same twice, but for rounding."""
    return len(outputs) == len(others) and all(close(a, b) for a, b in zip(outputs, others, strict=True))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs are the same but for rounding."""
    if a.shape != b.shape:
        return False
    largest = float(b.float().abs().max()) if b.numel() else 0.0
    allowed = AGREES.get(a.dtype, AGREES_HALF) * largest
    return bool(((a.float() - b.float()).abs() <= allowed + 1e-30).all())


def structural_agreement(mixer: Mixer) -> Callable[[Call, torch.Tensor], bool]:
    """Whether a mixer puts out what its family does."""
    block = mixer.block()
    return lambda call, own: close(own, _structural(mixer, block, call))


def _structural(mixer: Mixer, block: nn.Module, call: Call) -> torch.Tensor:
    """What a mixer of this structure puts out, (B, L, d_model)."""
    architecture, view = mixer.architecture, block.mixer
    hidden = architecture.normed(block, call.hidden)
    if call.mask is not None:
        hidden = hidden * call.mask[:, :, None].to(hidden.dtype)
    inputs = architecture.scan_inputs(view, *architecture.expand(view, hidden), attention_mask=call.mask)
    y, _ = architecture.scan(view, inputs)
    return view.out_proj(y.to(hidden.dtype))


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
