"""Covariance of the stream over an ensemble of tokens, at every place between two layers."""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from surgery.instruments.ensemble import Ensemble
from surgery.models.stack import Stack

Matrices = Float[Tensor, "place d_model d_model"]


def covariances(stack: Stack, ensemble: Ensemble) -> tuple[Matrices, Matrices]:
    """Return the covariance and the second moment ``E x x^T`` of ``x_0 .. x_L``, in float64 on the CPU.

    Cost: 1 F. Memory: three d_model x d_model matrices a layer.

    >>> from surgery.instruments import known_networks
    >>> from surgery.models.tokens import Tokens
    >>> stack, tokens = Stack(known_networks.serial_network(n_layers=2)), Tokens.of(known_networks.tokens(8))
    >>> covariance, _ = covariances(stack, Ensemble(tokens))
    >>> x = stack.stream(tokens)[1][tokens.ensemble()].double()
    >>> covariance.shape[0], bool(torch.allclose(covariance[1], torch.cov(x.T, correction=0)))
    (3, True)
    """
    square = torch.zeros(stack.n_layers + 1, stack.d_model, stack.d_model, dtype=torch.float64)
    total = torch.zeros(stack.n_layers + 1, stack.d_model, dtype=torch.float64)
    for visit in ensemble.visits(stack, "principal components"):
        x, u = visit.x[visit.mask].double(), visit.u[visit.mask].double()
        places = {visit.layer: x}
        if visit.layer == stack.n_layers - 1:
            places[stack.n_layers] = x + u
        for place, stream in places.items():
            square[place] += (stream.T @ stream).cpu()
            total[place] += stream.sum(0).cpu()
    n_tokens = int(ensemble.mask.sum())
    mean, second = total / n_tokens, square / n_tokens
    return second - einsum(mean, mean, "place row, place column -> place row column"), second
