"""Distillation against the divergence of all logits at once, and what it may and may not change."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssmc.compressor.distillation.steps import OTHERS, RATE, Course, Pair, _Moving, distill, divergence
from ssmc.runtime import half_precision
from ssmc.runtime.errors import CalibrationError
from ssmc.runtime.measure.losses import last_hidden
from ssmc.runtime.models.families import architecture_for
from ssmc.runtime.models.fast import use_fast_scan
from tests.support.families import granite
from tests.support.models import random_mamba2, random_model, random_tokens


def pair_of(model):
    """A model and a copy of it that lost half of its states and some of the weights that nothing else stands for."""
    teacher, student = use_fast_scan(model), use_fast_scan(copy.deepcopy(model))
    architecture = architecture_for(model.config.model_type)
    with torch.no_grad():
        for block in architecture.blocks(student):
            mixer = architecture.mixer(block)
            if mixer is not None:
                architecture.mask_states(mixer, list(range(0, architecture.dimensions(model.config).d_state, 2)))
                mixer.out_proj.weight[:, ::3] = 0
    return Pair(architecture, student, teacher)


def naive(pair, tokens):
    p = F.log_softmax(pair.teacher(tokens).logits.float(), dim=-1)
    q = F.log_softmax(pair.student(tokens).logits.float(), dim=-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize("make", [random_model, random_mamba2, granite])
def test_the_divergence_and_its_gradients_are_those_of_all_logits(make):
    pair, tokens = pair_of(make()), random_tokens((3, 17))
    found = divergence(pair, tokens, last_hidden(pair.teacher, tokens), backward=True)
    gradients = {name: p.grad for name, p in pair.student.named_parameters()}
    wanted = naive(pair, tokens)
    assert found == pytest.approx(float(wanted.detach()), rel=1e-5)
    for (name, parameter), gradient in zip(
        pair.student.named_parameters(),
        torch.autograd.grad(wanted, list(pair.student.parameters()), allow_unused=True),
        strict=True,
    ):
        if gradient is not None:
            ours = gradients[name]
            assert torch.allclose(ours, gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9), (
                name,
                parameter.shape,
            )


@pytest.fixture
def in_bfloat16(monkeypatch):
    """Linear maps in bfloat16, whether or not this machine is faster so."""
    monkeypatch.setattr(half_precision, "is_fast", lambda device: True)


@pytest.mark.parametrize("make", [random_model, random_mamba2, granite])
def test_in_bfloat16_the_gradients_are_those_of_float32_but_for_its_rounding(make, in_bfloat16):
    pair, tokens = pair_of(make()), random_tokens((3, 17))
    wanted = gradients_of(pair, tokens)
    with half_precision.half_precision(torch.device("cpu")):
        found = gradients_of(pair, tokens)
    ours, exact = (torch.cat([g.flatten() for g in some.values()]) for some in (found, wanted))
    assert 0.99 < float(F.cosine_similarity(ours, exact, dim=0)) < 1 - 1e-6


def test_in_bfloat16_runs_repeat_and_report_what_float32_says(in_bfloat16):
    twice, text = [pair_of(random_model()) for _ in range(2)], random_tokens((40, 24), seed=5)
    done = [distill(one, text, Course(30)) for one in twice]
    assert done[0] == done[1]
    assert all(torch.equal(a, b) for a, b in zip(*(one.student.parameters() for one in twice), strict=True))
    assert done[0].divergence < 0.9 * done[0].divergence_before
    assert float(naive(twice[0], text[-10:]).detach()) == pytest.approx(done[0].divergence, rel=1e-4)


def test_a_linear_map_with_a_bias_and_one_of_another_type():
    x, map_ = torch.randn(2, 5, 8, dtype=torch.float64), nn.Linear(8, 3)
    with half_precision._LinearInBfloat16():
        found = map_(x.float())
        assert torch.equal(map_.double()(x), F.linear(x, map_.weight, map_.bias))  # float64 stays as it is
    assert torch.allclose(found.double(), map_(x), atol=0.05)
    assert not torch.equal(found.double(), map_(x))


def gradients_of(pair, tokens):
    """Of the divergence, by name of the student's parameters."""
    pair.student.zero_grad()
    divergence(pair, tokens, last_hidden(pair.teacher, tokens), backward=1.0)
    return {name: p.grad for name, p in pair.student.named_parameters() if p.grad is not None}


def test_what_is_lost_on_tokens_seen_far_back_is_told_apart():
    pair, text = pair_of(random_model()), random_tokens((8, 260), seed=5)
    text[-2:, 200:230] = text[-2:, 20:50]
    done = distill(pair, text, Course(1))
    losses = []
    for model in (pair.student, pair.teacher):
        logits = model(text[-2:]).logits[:, :-1].detach()
        losses.append(F.cross_entropy(logits.transpose(1, 2), text[-2:, 1:], reduction="none"))
    above = (losses[0] - losses[1])[:, 201:229]  # a trigram stands again from its third token on
    assert done.excess_far == pytest.approx(float(above.mean()), abs=1e-5)
    assert abs(done.excess_far - done.excess) > 1e-4
    assert distill(pair_of(random_model()), random_tokens((8, 24)), Course(1)).excess_far is None


def test_steps_make_it_better_and_keep_what_was_pruned_at_zero():
    pair = pair_of(random_model())
    zero = {name: (p == 0) for name, p in pair.student.named_parameters()}
    before = {name: p.clone() for name, p in pair.teacher.named_parameters()}
    text = random_tokens((40, 24), seed=5)
    done = distill(pair, text, Course(30))
    assert done.divergence < 0.9 * done.divergence_before
    judged = text[-10:]
    assert float(naive(pair, judged).detach()) == pytest.approx(done.divergence, rel=1e-4)
    losses = [float(model(judged, labels=judged).loss) for model in (pair.student, pair.teacher)]
    assert losses[0] - losses[1] == pytest.approx(done.excess, abs=1e-4)
    for name, parameter in pair.student.named_parameters():
        assert not parameter[zero[name] & (before[name] != 0)].any(), name
        assert parameter.requires_grad
        assert parameter.grad is None
    assert all(torch.equal(p, before[name]) for name, p in pair.teacher.named_parameters())


def test_what_is_equal_stays_as_it_is_and_runs_repeat():
    model = random_model()
    pair = Pair(architecture_for("mamba"), use_fast_scan(copy.deepcopy(model)), use_fast_scan(model))
    done = distill(pair, random_tokens((8, 16)), Course(3))
    assert done.best_step == 0  # nothing is better than nothing lost
    assert all(torch.equal(a, b) for a, b in zip(pair.student.parameters(), model.parameters(), strict=True))
    twice = [pair_of(random_model()) for _ in range(2)]
    for one in twice:
        distill(one, random_tokens((8, 16)), Course(4, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(*(one.student.parameters() for one in twice), strict=True))


def test_steps_are_smaller_where_less_was_lost_and_where_they_are_many():
    moving = _Moving([nn.Parameter(torch.ones(2, 2))], [], [], [None])
    usual, fewer, many, good = (moving.rates(*of)[0] for of in ((0.14, 300), (0.14, 50), (0.14, 1200), (0.035, 300)))
    assert usual == fewer == pytest.approx(OTHERS * RATE)
    assert many == good == pytest.approx(usual / 2)


def test_embedding_and_head_move_less_the_less_was_lost():
    word, other = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moving = _Moving([word, other], [], [word], [None, None])
    ratios = [one / two for one, two in (moving.rates(lost, 300) for lost in (0.28, 0.14, 0.035))]
    assert ratios == pytest.approx([1, 1, 0.5])


def test_one_sequence_is_too_little():
    with pytest.raises(CalibrationError, match="at least two sequences"):
        distill(pair_of(random_model()), random_tokens((1, 16)), Course(1))


class StopHereError(Exception):
    pass


def test_what_was_interrupted_goes_on_to_the_same_bytes():
    text = random_tokens((12, 16))
    whole, parts = pair_of(random_model()), pair_of(random_model())
    wanted = distill(whole, text, Course(40, seed=1))
    kept = []

    def keep(state):
        kept.append(state)
        if len(kept) == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        distill(parts, text, Course(40, seed=1, keep=keep))
    anew = pair_of(random_model())
    found = distill(anew, text, Course(40, seed=1, start=kept[-1]))
    assert 0 < kept[-1]["step"] < 40
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(anew.student.parameters(), whole.student.parameters(), strict=True))
