"""Sessions that replay a recorded step against sessions that launch every step."""

import gc
import weakref
from functools import partial

import pytest
import torch

from ssmc.runtime.models.fast import use_fast_scan
from ssmc.runtime.models.generation import TorchSession, stream_tokens
from ssmc.runtime.models.generation.cuda_graphs import NotRecordable, capture, record
from ssmc.runtime.models.generation.sampling import Sampling
from tests.support.gpu import HAS_CUDA, needs_cuda
from tests.support.models import random_model, random_tokens

GPU = (pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA GPU"))


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=GPU)])
def test_recorded_steps_go_on_from_whatever_was_read(where):
    """On a CPU what is replayed is the step itself: that its states are those of the session is what is tested."""
    recorded = []

    def recorder(step, device):
        recorded.append(step)
        return record(step, device) if where == "cuda" else step.run

    model = use_fast_scan(random_model()).to(where)
    session, launched = TorchSession(model, recorder), TorchSession(model, refuse)
    for batch, length in ((2, 5), (3, 1), (2, 7)):
        tokens = random_tokens((batch, 20), seed=length)
        for both in (session, launched):
            both.reset()
        for begin, end in ((0, length), (length, length + 4), (length + 6, 20)):
            got, wanted = (each.prefill(tokens[:, begin:end]).clone() for each in (session, launched))
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            for position in (end, end + 1) if end < 20 else ():
                got, wanted = session.step(tokens[:, position]), launched.step(tokens[:, position])
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert [len(step.states()[0]) for step in recorded] == [2, 3]  # each number of sequences once


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    ("sampling", "state_dtype"),
    [
        (Sampling(), "float32"),
        (Sampling(), "int8"),
        (Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3), "float32"),
    ],
)
def test_tokens_chosen_in_a_recorded_step_are_those_chosen_after_it(where, sampling, state_dtype):
    """Whole sequences, others and longer ones behind them, and steps of a session in between."""
    recorded = []

    def recorder(step, device):
        recorded.append(step)
        return record(step, device) if where == "cuda" else step.run

    model = use_fast_scan(random_model(), state_dtype=state_dtype).to(where)
    session, launched = TorchSession(model, recorder), TorchSession(model, refuse)
    for prompts in ([[1, 2, 3], [4, 5, 6]], [[7, 8], [9, 1]], [[1, 2, 3]]):
        got, wanted = (list(stream_tokens(each, prompts, sampling, 70)) for each in (session, launched))
        assert got == wanted
        tokens = torch.tensor(prompts)
        for both in (session, launched):
            both.reset()
            both.prefill(tokens)
        got, wanted = session.step(tokens[:, 0]), launched.step(tokens[:, 0])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert len(recorded) == 4  # two numbers of sequences, with a choice and without


def test_a_recorded_step_reads_what_it_chose_without_being_told():
    recorded = []
    session = TorchSession(use_fast_scan(random_model()), lambda step, device: recorded.append(step) or step.run)
    rows = stream_tokens(session, [[1, 2, 3]], max_new_tokens=5)
    first = [next(rows) for _ in range(3)]
    (step,) = recorded
    ahead = step._tokens.item()
    assert next(rows) == [ahead]  # launched before it was asked for
    assert len(first) == 3


def test_a_step_that_cannot_be_recorded_leaves_the_states_as_they_were():
    model = use_fast_scan(random_model())
    session, tokens = TorchSession(model, record), random_tokens((2, 6))
    session.prefill(tokens)
    got = session.step(tokens[:, 0])  # on a CPU it is tried, with real steps
    launched = TorchSession(model)
    launched.prefill(tokens)
    torch.testing.assert_close(got, launched.step(tokens[:, 0]), rtol=1e-5, atol=1e-5)


def refuse(step, device):
    raise NotRecordable("not here")


@needs_cuda
def test_a_graph_keeps_what_it_reads():
    device = torch.device("cuda")
    read = torch.ones(1 << 20, device=device)
    alive, replay = weakref.ref(read), capture(partial(torch.mul, read, 2), device)
    del read
    gc.collect()
    torch.cuda.empty_cache()
    assert alive() is not None
    assert replay().unique().tolist() == [2]
