r"""Directions of the stream that the following layers hardly read, and walks confined to them.

If layers [start, L) have the Jacobian J, a small displacement d moves the end by J d. The directions that are read
least are the eigenvectors of E[J^T J] with the smallest eigenvalues, where the expectation is over tokens and J^T J of
a token is estimated as g g^T, g = J^T v, with random signs v over all tokens behind it. A walk along them should leave
the prediction alone; so it adds variety to activations without spoiling their labels. That is only as true as the first
order: compare with a walk as long along the directions that are read most, and in any direction (``walk.Scattered``).

>>> import surgery
>>> from surgery.instruments import known_networks
>>> stack = surgery.Stack(known_networks.random_network(n_layers=3, d_model=8))
>>> strength, basis = read_directions(stack, known_networks.tokens(6, 5), 1)
>>> bool((strength.diff() >= 0).all()), tuple(basis.shape)
(True, (8, 8))
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.graft.steps import Kind, Noise
from surgery.instruments.ensemble import Ensemble
from surgery.memory import in_smaller_batches
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling
from surgery.training.regions import Region, Rows


@dataclass(frozen=True, eq=False)
class Confined:
    """Move every activation as far as ``kind`` does, in a random direction within the columns of ``basis``.

    ``basis`` has orthonormal columns. Raises ValueError if it has not.
    """

    kind: Kind
    basis: Float[Tensor, "d_model direction"]

    def __post_init__(self) -> None:
        gram = self.basis.T @ self.basis
        if not torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), atol=1e-4):
            raise ValueError("the columns of basis must be orthonormal: take some of read_directions(...)[1]")

    def draw(self, generator: np.random.Generator, length: int, d_model: int) -> Float[np.ndarray, "pos number"]:
        numbers = self.kind.draw(generator, length, d_model)
        return np.concatenate([generator.standard_normal((length, self.basis.shape[1])), numbers], 1)

    def move(self, region: Region, x: Rows, noise: Noise) -> Rows:
        inside = self.basis.shape[1]
        distance = (self.kind.move(region, x, noise[:, inside:]) - x).norm(dim=1, keepdim=True)
        direction = noise[:, :inside] @ self.basis.to(x).T
        return x + distance * direction / direction.norm(dim=1, keepdim=True)


@in_smaller_batches
def read_directions(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    start: int,
    draws: int = 4,
    *,
    sampling: Sampling = Sampling(batch_size=8),
) -> tuple[Float[Tensor, " direction"], Float[Tensor, "d_model direction"]]:
    """How strongly layers [start, L) read each direction, the least first, and the directions as orthonormal columns.

    The strength is the mean square by which the end moves per unit of displacement, times its width. Cost: 1 F and
    ``draws`` backward passes of the layers from ``start`` on. Memory: their graph of one batch.

    Raises ValueError for a ``start`` that is no layer, fewer than one draw, and a stream that is not finite.
    """
    if not 0 <= start < stack.n_layers or draws < 1:
        raise ValueError(f"give a layer of {stack.name}, 0 to {stack.n_layers - 1}, and a draw or more")
    ensemble = Ensemble.of(stack, tokens, sampling)
    total = torch.zeros(stack.d_model, stack.d_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(sampling.seed)
    for _, context, mask in ensemble.batches(stack, "directions read"):
        with torch.enable_grad():
            x = stack.execute(f":{start}", context.x0, context) if start else context.x0
            x = x.detach().clone().requires_grad_()
            final = stack.execute(f"{start}:", x, context, grad=True)
        if not final.isfinite().all():
            raise ValueError(f"the stream of {stack.name} is not finite: load the model in float32, or fix its weights")
        for draw in range(draws):
            signs = (torch.randint(2, final.shape, generator=generator) * 2 - 1).to(final) * mask.unsqueeze(-1)
            (gradient,) = torch.autograd.grad(final, x, signs, retain_graph=draw < draws - 1)
            rows = gradient[mask].double().cpu()
            total += rows.T @ rows
    strength, basis = torch.linalg.eigh(total / (draws * int(ensemble.mask.sum())))
    return strength.clamp(min=0), basis.float()
