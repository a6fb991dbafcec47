"""The loss by kind of token against a count by hand and against losses that are known."""

import numpy as np
import pytest
import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.measure.losses import IGNORED
from ssmc.runtime.measure.mqar import Mqar, ask, summarised
from ssmc.runtime.measure.passkey import CELL, KEY, hide
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind, of_kind


def slow_kinds(window, counts, total):
    """From the definition: look back for every token."""
    found = []
    for t in range(1, len(window)):
        before = [s for s in range(2, t) if window[s - 2 : s + 1] == window[t - 2 : t + 1]] if t >= 2 else []
        back = t - max(before) if before else 0
        found.append((back > 0, back > 100, back > 0 and counts[window[t]] <= total / 1000, back == 0, back))
    return found


def test_kinds_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(9, (3, 700), generator=generator)
    windows[1, 300:340] = windows[1, 20:60]  # far back
    windows[2, 50:53] = windows[2, 350:353] = torch.tensor([70, 71, 72])  # rare and far back
    kinds = kinds_of(windows)
    counts = torch.bincount(windows.flatten())
    for row, window in enumerate(windows.tolist()):
        for place, (repeated, far, rare, new, back) in enumerate(slow_kinds(window, counts, windows.numel())):
            said = [kinds[name][row, place] for name in ("repeated", "far", "rare", "new")]
            assert said == [repeated, far, rare, new]
            assert kinds["repeated, 33 to 100 back"][row, place] == (33 <= back <= 100)
    assert kinds["rare"][2].sum() == 1
    assert kinds["far"][1].sum() > 5


def test_losses_errors_and_excess():
    generator = np.random.default_rng(0)
    dense = generator.exponential(size=(50, 99))
    mask = generator.random((50, 99)) < 0.2
    model = dense + np.where(mask, 0.5, 0.1) + 0.05 * generator.standard_normal((50, 99))
    kinds = {"repeated": mask, "new": ~mask, "none": np.zeros_like(mask)}
    repeated, new, none = loss_by_kind(model, kinds, dense)
    assert repeated.nll == pytest.approx(model[mask].mean())
    assert repeated.excess == pytest.approx(0.5, abs=0.01)
    assert new.excess == pytest.approx(0.1, abs=0.01)
    # windows are independent here, so the error over windows is that over tokens
    assert repeated.excess_stderr == pytest.approx(0.05 / mask.sum() ** 0.5, rel=0.3)
    assert (none.tokens, none.nll, none.excess) == (0, None, None)
    assert loss_by_kind(model[:1], {"all": mask[:1] | True})[0].stderr is None


def test_an_evaluation_shows_what_is_lost_by_kind(text):
    report = evaluate_models(["tiny", "tiny"], text=text, window=256, max_windows=2, recall=True, device="cpu")
    dense = {kind.kind: kind for kind in report.models[0].recall}
    assert dense["all"].nll == pytest.approx(report.models[0].perplexity.nll_per_token)
    assert dense["repeated"].tokens + dense["new"].tokens == dense["all"].tokens == report.models[0].perplexity.tokens
    assert dense["repeated"].nll < dense["new"].nll  # what it has read before it predicts better
    assert report.to_json()["models"][0]["recall"][0]["kind"] == "all"
    assert of_kind(report.models[1].recall, "far").excess == 0
    assert [found.task for found in report.models[1].constructed] == ["passkey", "mqar"]
    assert any("no such recall to lose" in note for note in report.notes)  # `tiny` knows stories only


def test_recall_needs_the_perplexity():
    with pytest.raises(UsageError, match="leave perplexity on"):
        evaluate_models(["tiny"], recall=True, perplexity=False)


def test_every_listed_key_is_asked_for_its_value():
    task = Mqar(range(1, 12), range(12, 20), pairs=6, length=40)
    questions = ask(task, 50, torch.Generator().manual_seed(3))
    places = set()
    for tokens, targets, distances in zip(*(t.tolist() for t in vars(questions).values()), strict=True):
        listed = {key: (place, tokens[place + 1]) for place, key in enumerate(tokens[:12]) if place % 2 == 0}
        assert len(listed) == 6
        assert set(listed) <= set(range(1, 12))
        asked = [place for place, target in enumerate(targets) if target != IGNORED]
        assert sorted(tokens[place] for place in asked) == sorted(listed)
        for place in asked:
            began, value = listed[tokens[place]]
            assert place >= 12
            assert (targets[place], tokens[place + 1]) == (value, value)
            assert distances[place] == place - began
        assert sum(token != 0 for token in tokens) == 24
        places |= set(asked)
    assert places == set(range(12, 40, 2))
    with pytest.raises(ValueError, match="four tokens each"):
        Mqar(range(1, 12), range(12, 20), pairs=11, length=40)


def test_passkeys_stand_twice_at_their_distance():
    windows = torch.randint(50, 90, (3, 300), generator=torch.Generator().manual_seed(0))
    before = windows.clone()
    questions = hide(windows, torch.Generator().manual_seed(1), questions=8, distances=(32, 64, 512))
    assert torch.equal(windows, before)
    asked = (questions.targets != IGNORED).nonzero().tolist()
    assert len(asked) == 24
    for row, place in asked:
        back, tokens = int(questions.distances[row, place]), questions.tokens[row].tolist()
        first = place - KEY + 1
        assert back in (32, 64)  # 512 does not fit
        assert tokens[first : place + 2] == tokens[first - back : place - back + 2]
        assert questions.targets[row, place] == tokens[place + 1]
    changed = (questions.tokens != before).sum(1)
    assert (changed <= 2 * 8 * (KEY + 1)).all()
    assert CELL > KEY


def test_accuracy_by_distance_is_a_count():
    questions = ask(Mqar(range(1, 30), range(30, 60), 8, 64), 40, torch.Generator().manual_seed(0))
    right = (questions.distances > 0) & (questions.distances <= 20)  # one that remembers no further back
    every, near, far = summarised(questions, right, (20,))
    assert (near.accuracy, far.accuracy, near.stderr) == (1, 0, 0)
    assert near.asked + far.asked == every.asked == 320
    assert every.accuracy == pytest.approx(near.asked / 320)
    assert near.high <= 20 < far.low
    # of 40 sequences of 8 questions each: as if independent, which they nearly are
    assert every.stderr == pytest.approx((every.accuracy * (1 - every.accuracy) / 320) ** 0.5, rel=0.5)
