"""Second moments of a layer's inputs, streamed: all that SparseGPT, Wanda and Eq. 7 need to know about the data.

For a linear map y = W x the squared error of the output over the calibration tokens is tr(dW H dW') with
H = sum x x', so H (times 2, which cancels everywhere) is the Hessian of every row. Sums are plain: each token of each
sample weighs the same, whatever the order or the number of calls. The products of one call are summed in float32 over
at most `TOKENS` tokens (float64 if the input is), sums of those in float64.
"""

from __future__ import annotations

import torch

from ssmc.compressor.calibration.placement import computing
from ssmc.runtime.collectives import summed
from ssmc.runtime.errors import CalibrationError

PANELS = 4  # bands of rows that H is summed in; 4 leave 5/8 of the whole product
TOKENS = 2048  # tokens summed in float32 before float64 takes over


class SecondMoment:
    """H = sum x x' over all tokens seen.

    Attributes:
        total: (in_features, in_features) float64.
        tokens: how many vectors were added.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    @property
    def total(self) -> torch.Tensor:
        """The sum so far."""
        return self._upper.triu() + self._upper.triu(1).t()

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs (tokens, in_features), or (..., in_features)."""
        x = x.detach().flatten(0, -2)  # (T, in)
        width = max(128, -(-x.shape[1] // PANELS))
        for part in computing(x).split(TOKENS):
            for start in range(0, x.shape[1], width):  # what lies below the diagonal follows from symmetry
                panel = slice(start, start + width)
                self._upper[panel, start:] += part[:, panel].t() @ part[:, start:]
        self.tokens += len(x)

    def pool(self) -> None:
        """Add what the other processes saw."""
        self._upper, self.tokens = summed(self._upper), round(summed(self.tokens))

    def mean(self) -> torch.Tensor:
        """H per token, (in_features, in_features)."""
        return self.total / max(1, self.tokens)


class SquaredInputs:
    """The diagonal of `SecondMoment` alone, for Wanda: no matrix product.

    Attributes:
        total: (in_features,) float64, sum of x^2.
        tokens: how many vectors were added.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in inputs (tokens, in_features), or (..., in_features)."""
        x = x.detach().flatten(0, -2)
        for part in computing(x).split(TOKENS):
            self.total += part.square().sum(0)
        self.tokens += len(x)

    def pool(self) -> None:
        """Add what the other processes saw."""
        self.total, self.tokens = summed(self.total), round(summed(self.tokens))


class DepthwiseSecondMoment:
    """Second moments of a depthwise causal conv1d, one (K, K) matrix per channel.

    y_t[d] = bias[d] + sum_k w[d, k] x_{t-K+1+k}[d], so the "input" of channel d at time t is the window
    (x_{t-K+1}, ..., x_t) of that channel alone. What lies before a sequence is zero, as conv1d's padding.

    Attributes:
        total: (D, K, K) float64.
        tokens: how many windows were added.
    """

    def __init__(self, channels: int, kernel: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(channels, kernel, kernel, dtype=torch.float64, device=device)
        self.tokens = 0

    @property
    def kernel(self) -> int:
        """K, the width of the convolution."""
        return self.total.shape[1]

    def add(self, x: torch.Tensor, history: torch.Tensor | None = None) -> None:
        """Take in a stretch of time.

        Args:
            x: (B, L, D) what conv1d reads.
            history: (B, K - 1, D) the inputs just before x, when x goes on a sequence; None at its start.
        """
        x, before = computing(x.detach()), self.kernel - 1
        if history is None:
            history = x.new_zeros(x.shape[0], before, x.shape[2])
        padded = torch.cat([history.detach().to(x.dtype), x], dim=1)  # (B, K - 1 + L, D)
        for start in range(0, x.shape[1], TOKENS):
            self._add(padded[:, start : start + TOKENS + before])
        self.tokens += x.shape[0] * x.shape[1]

    def _add(self, padded: torch.Tensor) -> None:
        length = padded.shape[1] - self.kernel + 1
        taps = [padded[:, k : k + length] for k in range(self.kernel)]  # tap k reads x_{t-K+1+k}
        for k, tap in enumerate(taps):
            for j in range(k, self.kernel):
                self.total[:, k, j] += (tap * taps[j]).sum((0, 1))
                self.total[:, j, k] = self.total[:, k, j]

    def pool(self) -> None:
        """Add what the other processes saw."""
        self.total, self.tokens = summed(self.total), round(summed(self.tokens))

    def mean(self) -> torch.Tensor:
        """The matrices per token, (D, K, K)."""
        return self.total / max(1, self.tokens)


class StateMoment:
    """sum h h' over samples, time and channels, for the baseline "SparseGPT on A_log".

    Attributes:
        total: (N, N) float64.
        tokens: how many state vectors were added (samples times time times channels).
    """

    def __init__(self, d_state: int, device: torch.device | str = "cpu"):
        self.total = torch.zeros(d_state, d_state, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, states: torch.Tensor) -> None:
        """Take in hidden states (B, T, N, D), in the layout of `scan_states`; h_{t-1} is what A_log acts on."""
        h = computing(states.detach()).flatten(0, 1)  # (B T, N, D)
        self.total += torch.bmm(h, h.transpose(1, 2)).sum(0, dtype=torch.float64)
        self.tokens += len(h) * h.shape[2]

    def pool(self) -> None:
        """Add what the other processes saw."""
        self.total, self.tokens = summed(self.total), round(summed(self.tokens))


def check_finite(hessian: torch.Tensor) -> torch.Tensor:
    """The Hessian itself.

    Raises:
        CalibrationError: it holds an infinity or NaN.
    """
    if not hessian.isfinite().all():
        raise CalibrationError(
            "The inputs of a layer overflow on the calibration text: their second moment is not finite. "
            "Compute in float32 and check the checkpoint."
        )
    return hessian
