"""Mean and covariance of rows that come in chunks."""

import torch
from jaxtyping import Float
from torch import Tensor


class Scatter:
    """Mean and covariance of rows that come in chunks, in float64. Memory: at most four matrices.

    Put together as Chan, Golub and LeVeque (1983) do, so that a mean much larger than the spread costs no digits.

    >>> scatter = Scatter()
    >>> for chunk in ([[1e9, 0.0]], [[1e9 + 2, 1.0], [1e9 + 4, 2.0]]):
    ...     scatter.add(torch.tensor(chunk, dtype=torch.float64))
    >>> scatter.count, (3 * scatter.covariance).tolist()
    (3, [[8.0, 4.0], [4.0, 2.0]])
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Float[Tensor, "row d_model"]) -> None:
        """Add one or more rows."""
        rows = rows.double()
        mean = rows.mean(0)
        if not self.count:
            self.mean, self.products = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        centred, new, share = rows - mean, mean - self.mean, len(rows) / (self.count + len(rows))
        self.products += centred.T @ centred + torch.outer(new, new) * (self.count * share)
        self.mean += new * share
        self.count += len(rows)

    @property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        """The covariance of all rows so far, divided by their number."""
        return self.products / self.count
