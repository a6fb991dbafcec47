"""How much each calibration token counts when states are chosen and repaired: more where something is recalled.

A mean over tokens is a mean over what is easy: few tokens need what stood far back, so a choice that loses just that
looks good. A read-out from which the next token is predicted counts more here if that token ends a trigram that stood
in the sample already, more than FAR tokens back (`ssmc.runtime.measure.recall`). That needs no labels and no pass
through the model.
"""

from __future__ import annotations

import torch

from ssmc.runtime.measure.recall import FAR, repeats


def token_weights(tokens: torch.Tensor, more: float) -> torch.Tensor | None:
    """Weights (nsamples, L) of the squared errors at each token; None: all count the same.

    Args:
        tokens: (nsamples, L).
        more: what a token from which something is recalled counts above the 1 of all others.
    """
    if not more:
        return None
    back = torch.stack([torch.as_tensor(repeats(sample)) for sample in tokens.tolist()])
    weights = torch.ones(tokens.shape)
    weights[:, :-1] += more * (back[:, 1:] > FAR)  # the token before, whose read-out predicts it
    return weights
