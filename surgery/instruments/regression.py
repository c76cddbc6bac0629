"""Linear maps fitted to half of the prompts, in closed form, to be measured on the other half."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.models.tokens import Tokens


def halves(tokens: Tokens, seed: int) -> tuple[Tokens, Tokens]:
    """Split the prompts at random: one half to measure on, the other to fit on. ValueError for a single prompt."""
    if len(tokens) < 2:
        raise ValueError(
            "what is fitted on one half of the prompts is measured on the other, and there is one prompt: give at "
            "least two, better hundreds"
        )
    order = torch.from_numpy(np.random.default_rng((seed, 2)).permutation(len(tokens))).to(tokens.ids.device)
    measured, fitted = (half.sort().values for half in order.tensor_split(2))
    return Tokens(tokens.ids[measured], tokens.mask[measured]), Tokens(tokens.ids[fitted], tokens.mask[fitted])


class LeastSquares:
    """Ridge regression ``y ~ x B + b`` from sums; the penalty on a dimension of ``x`` is in units of its variance.

    >>> fit, x = LeastSquares(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> fit.add(x, 3 * x + 1)
    >>> [(value.round(decimals=6) + 0.0).tolist() for value in fit.solve(0.0)]
    [[[3.0, 0.0], [0.0, 3.0]], [1.0, 1.0]]
    """

    def __init__(self, d_model: int) -> None:
        self.count = 0
        self.sums = torch.zeros(2, d_model, dtype=torch.float64)
        self.products = torch.zeros(2, d_model, d_model, dtype=torch.float64)

    def add(self, x: Float[Tensor, "token d_model"], y: Float[Tensor, "token d_model"]) -> None:
        """Add tokens to fit on. Raises ValueError for numbers that are not finite: they would give a map to nothing."""
        x, y = x.double(), y.double()
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError(
                "numbers that are not finite cannot be fitted: load the model in float32, or fix its weights"
            )
        self.count += len(x)
        self.sums = self.sums.to(x) + torch.stack([x.sum(0), y.sum(0)])
        self.products = self.products.to(x) + torch.stack([x.T @ x, x.T @ y])

    @property
    def mean_x(self) -> Float[Tensor, " d_model"]:
        """Mean of ``x`` over all tokens added."""
        return self.sums[0] / self.count

    def solve(self, ridge: float) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
        """Return ``B`` and ``b``. A dimension in which ``x`` does not vary gets no weight. ValueError for ridge < 0."""
        if ridge < 0:
            raise ValueError(f"ridge is a penalty, 0 or more, got {ridge}")
        mean, target = self.sums / self.count
        xx, xy = self.products / self.count - torch.stack([torch.outer(mean, mean), torch.outer(mean, target)])
        scale = xx.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(scale > 1e-9 * scale.max(), 1 / scale, 0)
        correlation = inverse.unsqueeze(1) * xx * inverse + ridge * torch.eye(len(xx)).to(xx)
        matrix = inverse.unsqueeze(1) * (torch.linalg.pinv(correlation, hermitian=True) @ (inverse.unsqueeze(1) * xy))
        return matrix, target - mean @ matrix
