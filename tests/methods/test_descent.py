"""The training loop on problems whose answer is known."""

import pytest
import torch

from ssmc.compressor.methods.descent import Pace, descend


def bowl(rate, steps=60, **options):
    """Steps of plain gradient descent on |x|^2: each multiplies x by 1 - 2 rate."""
    x = torch.full((4,), 0.5, requires_grad=True)
    done = descend(
        [x],
        lambda: torch.autograd.grad(x.square().sum(), [x]),
        lambda: float(x.detach().square().sum()),
        Pace(steps, [rate], constant=True, **options),
        optimiser=lambda groups: torch.optim.SGD(groups, lr=0.0),
    )
    return x.detach(), done


def test_the_best_that_was_judged_stays():
    x, done = bowl(0.05)
    assert done.error_before == 1.0
    assert done.error == pytest.approx(0.9**120)
    assert done.best_step == done.steps == 60
    assert float(x.square().sum()) == pytest.approx(done.error)


def test_steps_that_diverge_are_undone_and_become_smaller():
    x, done = bowl(1.5)  # each step doubles x
    assert torch.equal(x, torch.full((4,), 0.5))
    assert done.best_step == 0
    x, done = bowl(1.5, backs_off=True)  # after the first judgement each halves it
    assert 0 < done.error < 1e-12
    assert float(x.square().sum()) == pytest.approx(done.error)
