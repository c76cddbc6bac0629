r"""Baselines that a trained middle has to beat: no middle, its mean update, and the best linear map.

From nothing learnt to the best that one matrix can do, each is a callable ``(x_start, context) -> x_stop`` for
``surgery.instruments.fidelity.measure``:

===============  ===========================  ==========  ======================================================
map              x_stop                       parameters  a middle that beats it
===============  ===========================  ==========  ======================================================
``skip``         x                            0           writes something of use
``mean_update``  x + E u                      d           tells tokens apart
``linear``       x + E u + (x - E x) B        d^2 + d     attends to other tokens, or bends
===============  ===========================  ==========  ======================================================

``B`` is a ridge regression of the update ``u = x_stop - x_start`` on ``x_start``, token by token, with every direction
of x penalised in units of its standard deviation. It is computed from second moments, without a pass over the data, and
so is its error on any other prompts whose moments are known: the penalty is the one of ``RIDGES`` that leaves least
unexplained on held-out prompts.

A map acts on every token, each prompt's first too, to which other tokens attend and which may lie far from all of
them. So fit with it, ``latents.moments(prompts, skip_first=False)``, and validate without it, as ``fidelity`` measures:
on the bundled model, layers 4 to 8, a map fitted without it leaves 0.23 of the update unexplained, as the one fitted
with it does, and costs 1.91 nats per token instead of 0.17.

Sources: A. E. Hoerl and R. W. Kennard (1970) for ridge regression; A. Razzhigaev et al. (2024, arXiv 2405.12250) for
linear maps of layers, fitted there to x_stop, of which x is most already.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.models.engine import Stream
from surgery.models.stack import Context
from surgery.training.activations import Moments

RIDGES = tuple(float(strength) for strength in np.logspace(-8, 3, 23))  # of the variance of every direction of x
_VARIES = 1e-9  # of the largest standard deviation: a direction of x with less is not used


@dataclass(frozen=True)
class Affine:
    """The map ``x + bias + x matrix`` without the parts that are None; ``ridge`` is the strength of the fit.

    >>> Affine(bias=torch.ones(2, dtype=torch.float64))(torch.zeros(1, 3, 2)).sum().item()
    6.0
    """

    matrix: Float[Tensor, "d_model d_model"] | None = None
    bias: Float[Tensor, " d_model"] | None = None
    ridge: float | None = None

    def __call__(self, x: Stream, context: Context | None = None) -> Stream:
        wide = x if x.dtype == torch.float64 else x.float()
        mapped = wide if self.matrix is None else wide + wide @ self.matrix.to(wide)
        return (mapped if self.bias is None else mapped + self.bias.to(wide)).to(x.dtype)

    @property
    def n_parameters(self) -> int:
        """Numbers that were fitted."""
        return sum(part.numel() for part in (self.matrix, self.bias) if part is not None)

    @property
    def operations(self) -> int:
        """Floating-point operations per token: ``2 d^2`` for the matrix (additions of vectors are not counted)."""
        return 0 if self.matrix is None else 2 * self.matrix.numel()

    def unexplained(self, moments: Moments) -> float:
        """``E |u_hat - u|^2 / E |c(u)|^2`` on the tokens of ``moments``, which ``fidelity.measure`` reads on them too.
        NaN if u does not vary there. Cost: no forward pass."""
        missed, error = moments.uu.trace(), moments.mean_u
        if self.matrix is not None:
            error = error - moments.mean_x @ self.matrix
            missed = missed + ((moments.xx @ self.matrix - 2 * moments.xu) * self.matrix).sum()
        if self.bias is not None:
            error = error - self.bias
        return float((missed + error @ error) / moments.uu.trace())


skip = Affine()


def mean_update(moments: Moments) -> Affine:
    """Give every token the mean update: ``unexplained`` is 1 on the tokens of ``moments``."""
    return Affine(bias=moments.mean_u)


def linear(moments: Moments, validation: Moments | None = None, *, ridge: float | None = None) -> Affine:
    """Fit the best linear map from x to u on the tokens of ``moments``.

    The penalty is ``ridge``, or the one of ``RIDGES`` that leaves least unexplained on the tokens of ``validation``,
    which are of other prompts. Moments to fit are best taken with each prompt's first token, those to validate without
    it (see the module).

    On the tokens it is fitted to the map is never worse than ``mean_update``; on others it may be, with a small ridge.
    The least of 23 values on ``validation`` is a little too good to be true: measure on a third part of the prompts.
    Cost: ``O(d_model^3)``, no forward pass.

    Raises ValueError unless exactly one of ``validation`` and ``ridge`` is given, for a ridge below 0, moments of
    another width, and moments that are not finite.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> twice = Moments(count=9, mean_x=eye[0], mean_u=2 * eye[0], xx=eye, xu=2 * eye, uu=4 * eye)  # u = 2 x
    >>> fit = linear(twice, ridge=0.0)
    >>> round(fit.unexplained(twice), 9), fit.n_parameters, fit.operations
    (0.0, 6, 8)
    """
    if (validation is None) == (ridge is None):
        raise ValueError(
            "give either the moments of other prompts, on which the strength of the ridge is chosen, or ridge=..."
        )
    if ridge is not None and not ridge >= 0:
        raise ValueError(f"ridge is a penalty, 0 or more, got {ridge}")
    if validation is not None and validation.xx.shape != moments.xx.shape:
        raise ValueError(
            f"these moments are of {len(moments.xx)} dimensions, those to validate with of {len(validation.xx)}"
        )
    if not (moments.xx.isfinite().all() and moments.xu.isfinite().all()):
        raise ValueError("the moments are not finite: harvest in bfloat16 or float32, or fix the model's weights")
    regression = _Regression(moments)
    if ridge is not None:
        return regression.fit(ridge)
    assert validation is not None
    return min(map(regression.fit, RIDGES), key=lambda fit: fit.unexplained(validation))


@dataclass(frozen=True)
class _Regression:
    """Ridge regression with any penalty from one eigendecomposition, that of the correlations of x."""

    moments: Moments

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.moments.xx.diagonal().clamp(min=0).sqrt()
        inverse = torch.where(scale > _VARIES * scale.max(), 1 / scale, 0).unsqueeze(1)
        values, vectors = torch.linalg.eigh(inverse * self.moments.xx * inverse.T)
        return values, inverse * vectors, vectors.T @ (inverse * self.moments.xu)

    def fit(self, ridge: float) -> Affine:
        values, out, into = self._spectrum
        # as a pseudo-inverse does: a direction that is rounding alone does not count
        significant = values > len(values) * torch.finfo(values.dtype).eps * values.max()
        matrix = out @ (torch.where(significant, 1 / (values + ridge), 0).unsqueeze(1) * into)
        return Affine(matrix, self.moments.mean_u - self.moments.mean_x @ matrix, ridge)
