"""The loss by kind of token against a count by hand and against losses that are known."""

import numpy as np
import pytest
import torch

from ssmc.runtime.errors import UsageError
from ssmc.runtime.evaluation import evaluate_models
from ssmc.runtime.measure.recall import kinds_of, loss_by_kind


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


def test_recall_needs_the_perplexity():
    with pytest.raises(UsageError, match="leave perplexity on"):
        evaluate_models(["tiny"], recall=True, perplexity=False)
