"""One step of decoding as a CUDA graph: at small batches, launching its kernels takes longer than running them.

The choice of the token is part of the step, so that the next one need not wait for the host to know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from ssmc.runtime.models.generation.sampling import Chooser, Sampling

WARM_UPS = 3
TOLERANCE = 1e-2  # of the largest logit: a recorded step runs the same kernels
_KINDS = ("conv_states", "recurrent_states")


class NotRecordable(Exception):  # noqa: N818 (a finding for a report, nobody's mistake)
    """Why a step cannot be recorded, in a few words."""


class Step(Protocol):
    """One token more of B sequences, from and to states that lie at fixed places."""

    def run(self) -> torch.Tensor:
        """What follows every token, from the states as they are."""

    def states(self) -> list[torch.Tensor]:
        """The tensors that a step changes."""


Recorder = Callable[[Step, torch.device], Callable[[], torch.Tensor]]
"""`record`, or what does the same."""


def states_of(cache: Any) -> list[torch.Tensor]:
    """Convolution windows and SSM states of all layers in transformers' cache, those that are there."""
    held = [state for layer in cache.layers for kind in _KINDS for state in getattr(layer, kind, {}).values()]
    return [state for state in held if state is not None]


class RecordedStep:
    """A decoding step of one number of sequences, for any of them: its states are overwritten with theirs.

    With a way to choose, the tokens it chooses are those that the next one reads, without going through the host.

    Attributes:
        cache: transformers' cache that the step reads and changes.
        overtaken: whether something else may have changed the cache since the last step; whoever does must say so.
    """

    def __init__(self, model: nn.Module, cache: Any, batch: int, record: Recorder, sampling: Sampling | None = None):
        """Record it.

        Args:
            model: whose cache is all states, none of them growing, with the fast scan.
            cache: after a prompt; it belongs to the step from now on, with the states it has.
            batch: sequences in the cache.
            record: makes the replay.
            sampling: how it chooses; None: it does not. The seed does not matter.

        Raises:
            NotRecordable: as `record` says.
        """
        device = model.get_input_embeddings().weight.device
        self.cache = cache
        self.overtaken = False
        self._model = model
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._sampling = sampling
        self._numbers = None if sampling is None or sampling.greedy else torch.zeros(batch, device=device)
        self._states = states_of(cache)
        self._replay = record(self, device)

    def states(self) -> list[torch.Tensor]:
        """The tensors that a step changes."""
        return [*states_of(self.cache), *([self._tokens] if self._sampling is not None else [])]

    def run(self) -> torch.Tensor:
        """One step as it is recorded, (B, V) float32."""
        output = self._model(self._tokens, cache_params=self.cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        if self._sampling is not None:
            self._tokens.copy_(self._sampling.choose(logits, self._numbers)[:, None])
        return logits

    def __call__(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Read tokens (B, 1) after what `cache` holds; from then on `self.cache` is what holds it.

        Returns:
            Logits (B, V) in a buffer that the next call overwrites.
        """
        self._begin(tokens, cache)
        return self._replay()

    @torch.inference_mode()
    def write(self, tokens: torch.Tensor, cache: Any, chooser: Chooser, count: int) -> Iterator[torch.Tensor]:
        """The `count` tokens that follow after tokens (B, 1), (B,) each on the CPU, chosen as was recorded.

        A step is launched before the tokens of the one before it are waited for. So where nobody asks for the rest, the
        cache is one token further than what was given.
        """
        self._begin(tokens, cache)
        on_gpu = self._tokens.is_cuda
        kept = [torch.empty(len(tokens), dtype=torch.long, pin_memory=on_gpu) for _ in range(2)]
        arrived = [torch.cuda.Event() if on_gpu else None for _ in range(2)]

        def launch(number: int) -> None:
            numbers = chooser.numbers(self._tokens.device)
            if self._numbers is not None and numbers is not None:
                self._numbers.copy_(numbers)
            self._replay()
            kept[number % 2].copy_(self._tokens[:, 0], non_blocking=True)
            if (event := arrived[number % 2]) is not None:
                event.record()

        if count:
            launch(0)
        for number in range(count):
            if number + 1 < count:
                launch(number + 1)
            if (event := arrived[number % 2]) is not None:
                event.synchronize()
            yield kept[number % 2].clone()

    def _begin(self, tokens: torch.Tensor, cache: Any) -> None:
        """Put what a step reads where it reads it."""
        if cache is not self.cache or self.overtaken:
            self._take(cache)
        self._tokens.copy_(tokens)

    def _take(self, cache: Any) -> None:
        """Copy the states of a cache to where the graph reads them, and let the step's own cache hold them there."""
        for kept, state in zip(self._states, states_of(cache), strict=True):
            if kept is not state:
                kept.copy_(state)
        self.overtaken = False
        kept = iter(self._states)
        for layer in self.cache.layers:
            for kind in _KINDS:
                held = getattr(layer, kind, {})
                for index in (index for index, state in held.items() if state is not None):
                    held[index] = next(kept)


@torch.inference_mode()
def record(step: Step, device: torch.device) -> Callable[[], torch.Tensor]:
    """A callable that replays `step` from a CUDA graph.

    Tokens and states keep their places in memory, as a graph needs it, so each replay continues the sequences as the
    step itself does; that is checked before it is handed out, and the states are put back to what they were.

    Raises:
        NotRecordable: there is no CUDA device, or the step does something a graph cannot hold.
    """
    kept = [state.clone() for state in step.states()]
    try:
        if not states_stay(step):
            raise NotRecordable("the states move in memory from step to step")
        if device.type != "cuda":
            raise NotRecordable("CUDA graphs need a CUDA device")
        replay = capture(step.run, device)
        difference = _difference(step, replay)
        if not difference <= TOLERANCE:
            raise NotRecordable(f"replayed, it gives other logits (relative difference {difference:.2g})")
    except RuntimeError as error:
        raise NotRecordable(str(error).strip().split("\n")[0]) from error
    finally:
        for state, value in zip(step.states(), kept, strict=True):
            state.copy_(value)
    return replay


@torch.inference_mode()
def states_stay(step: Step) -> bool:
    """Whether a step leaves every state where it is in memory and changes it there."""
    before = [state.data_ptr() for state in step.states()]
    values = [state.clone() for state in step.states()]
    step.run()
    after = step.states()
    changed = any(not torch.equal(value, state) for value, state in zip(values, after, strict=True))
    return changed and before == [state.data_ptr() for state in after]


def capture(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """Record one call as a CUDA graph, after a few on a stream of their own so that everything is allocated and chosen.

    What is returned holds `run`, and with it every tensor that the graph reads: a graph knows addresses only.

    Raises:
        RuntimeError: it does something a graph cannot hold.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay(holding: Callable[[], torch.Tensor] = run) -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _difference(step: Step, replay: Callable[[], torch.Tensor]) -> float:
    """Largest difference of a logit between a step and its replay from the same states, relative to the largest."""
    states = step.states()
    before = [state.clone() for state in states]
    wanted = step.run().float().clone()
    for state, value in zip(states, before, strict=True):
        state.copy_(value)
    got = replay().float()
    return float((got - wanted).abs().max() / wanted.abs().max())
