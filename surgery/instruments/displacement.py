r"""Displace the stream at one token, and measure what the layer then does differently there.

That updates go with streams, from token to token, does not say that a layer answers to the stream: both may follow
from a third. So the stream ``x`` is moved by a vector ``d`` at one token, and the layer ``f`` is run again:

    slope = E<d, f(x + d) - f(x)> / E|d|^2

The part of a displacement that the layer adds to it: -1 takes all of it back, 0 does not answer along it, above 0
carries it further. A layer that turns ``d`` answers against it too, and takes nothing back: so what is left in all is
``remaining = sqrt(E|d + f(x + d) - f(x)|^2 / E|d|^2)``, 1 for a rotation.

The expectation runs over random tokens, one of a prompt at a time: displacing all would add what they send each other
through attention. ``d`` has a given length and one of three directions (``KINDS``):

    difference    towards another prompt's token at that place (``surgery.instruments.ensemble.partners``)
    random        anywhere, all directions alike
    principal     along one of the top principal components of the stream, either way

The part of ``d`` that only makes the stream longer is divided away again by a live norm. So every displacement is made
a second time with the norms' denominators kept at the clean run's; what that changes is the normalisation's doing.

Compare with ``surgery.instruments.known_networks``: where every layer writes into a fresh subspace, difference and
principal read 0, and random reads 0 within its interval. A force shows at several lengths of ``d``.

Cost: ``3 + 2 (1 + 3 draws / pos)`` F for prompts of ``pos`` tokens (``surgery.instruments.branches``), ``3 + 6 draws``
where moves must run alone. Memory: one batch's stream, and a d_model x d_model matrix a layer. The measure is ours.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> from surgery.stats import weights
>>> from surgery.models.tokens import Tokens
>>> stack, ensemble = Stack(known_networks.parallel_network()), Ensemble(Tokens.of(known_networks.tokens(48)))
>>> by_kind = responses(stack, ensemble, lengths=[0.1] * stack.n_layers, draws=1)
>>> abs(round(by_kind["difference"].slope(3, weights(48))[0].item(), 6))
0.0
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from surgery.instruments.branches import State, answers
from surgery.instruments.covariance import covariances
from surgery.instruments.ensemble import Ensemble, Visit, partners
from surgery.models.stack import Context, Stack
from surgery.stats.bootstrap import ratio

KINDS = ("difference", "random", "principal")
KEPT = 16  # components remembered, so that measures that ask for different numbers of them share one walk


@dataclass(frozen=True)
class Response:
    """How the layers respond to one kind of displacement: sums over the draws of each unit of resampling."""

    product: Float[Tensor, "layer unit"]  # <d, f(x + d) - f(x)>
    square: Float[Tensor, "layer unit"]  # |d|^2
    left: Float[Tensor, "layer unit"]  # |d + f(x + d) - f(x)|^2

    def slope(self, layer: int, weights: Float[Tensor, "resample unit"]) -> Float[Tensor, " resample"]:
        """Return ``E<d, f(x + d) - f(x)> / E|d|^2`` of a layer for every row of ``weights``; NaN if nothing moved."""
        return ratio(weights @ self.product[layer], weights @ self.square[layer])

    def remaining(self, layer: int, weights: Float[Tensor, "resample unit"]) -> Float[Tensor, " resample"]:
        """Return how long the displacement is after the layer, beside before, 1 if turned; NaN if nothing moved."""
        return ratio(weights @ self.left[layer], weights @ self.square[layer]).sqrt()


def responses(stack: Stack, ensemble: Ensemble, lengths: Sequence[float], draws: int) -> dict[str, Response]:
    """Measure how every layer responds to ``draws`` displacements of every prompt and kind, ``lengths[layer]`` long.

    Keys: the ``KINDS``, with live norms, and ``<kind>_frozen``; the latter are absent if the model has a norm whose
    denominator cannot be found. The top ``draws`` principal components are used, one a draw.

    Cost: 3 F for principal components, the walk and the norms' denominators, and with live and with frozen norms
    ``1 + 3 draws / pos`` F each, or ``3 draws`` where moves must run alone (``surgery.instruments.branches``).

    Raises ValueError if ``draws`` is not positive, if there is not one length a layer, or if the stream is not finite.
    """
    if draws < 1 or len(lengths) != stack.n_layers:
        raise ValueError(
            f"give at least one draw and a length for each of {stack.n_layers} layers, got draws={draws} and "
            f"{len(lengths)} lengths"
        )
    bases = principal_components(stack, ensemble, draws)
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, stack.n_layers, ensemble.n_units, dtype=torch.float64))
    for visit in ensemble.visits(stack, "displaced streams"):
        if visit.layer == 0:
            state = _state(stack, visit.context)
        moves = [  # frozen and live norms are asked the same
            displacements(visit, bases[visit.layer], draw, ensemble.generator(visit, draw)) for draw in range(draws)
        ]
        prompt, kinds = moves[0][0], [kind for _, _, directions in moves for kind in directions]
        place = torch.stack([place for _, place, directions in moves for _ in directions])
        vectors = lengths[visit.layer] * torch.stack([unit for *_, directions in moves for unit in directions.values()])
        for frozen in (False, True)[: 1 if state is None else 2]:
            products = _products(stack, visit, prompt, place, vectors, state if frozen else None)
            for kind, of_move in zip(kinds, products, strict=True):
                of_layer = sums[f"{kind}{'_frozen' * frozen}"][:, visit.layer]
                of_layer.index_add_(1, visit.unit[prompt.cpu()], of_move)
    return {name: Response(*of_kind) for name, of_kind in sums.items()}


def along(
    stack: Stack,
    ensemble: Ensemble,
    axes: Sequence[Float[Tensor, "_ d_model"]],
    lengths: Sequence[float],
) -> list[Response]:
    """Measure how every layer responds, with live norms, to displacements along ``axes`` of its own, either way.

    One ``Response`` for each of the most axes that a layer has; a layer without that many reads NaN there. Every prompt
    is displaced once an axis. Cost: 2 F and the mean number of axes a layer over ``pos``, or 1 F and that number.
    """
    most = max((len(of_layer) for of_layer in axes), default=0)
    sums = torch.zeros(most, 3, stack.n_layers, ensemble.n_units, dtype=torch.float64)
    if most:
        for visit in ensemble.visits(stack, "streams displaced along directions"):
            if not (count := len(axes[visit.layer])):
                continue
            moves = [
                displacements(visit, axes[visit.layer], number, ensemble.generator(visit, 4, number))
                for number in range(count)
            ]
            prompt, place = moves[0][0], torch.stack([place for _, place, _ in moves])
            vectors = lengths[visit.layer] * torch.stack([directions["principal"] for *_, directions in moves])
            for number, of_move in enumerate(_products(stack, visit, prompt, place, vectors)):
                sums[number, :, visit.layer].index_add_(1, visit.unit[prompt.cpu()], of_move)
    return [Response(*of_axis) for of_axis in sums]


def _products(
    stack: Stack,
    visit: Visit,
    prompt: Int[Tensor, " chosen"],
    place: Int[Tensor, "move chosen"],
    vectors: Float[Tensor, "move chosen d_model"],
    state: State | None = None,
) -> Float[Tensor, "move 3 chosen"]:
    """Displace the stream by ``vectors`` at one token of each prompt, and return the products of ``Response``."""
    x = visit.x[prompt, place]
    moved = x + vectors.to(x)
    d = moved.double() - x.double()  # what rounding left of it
    response = answers(stack, visit, prompt, place, moved, state)
    left = d + response
    return torch.stack([(d * response).sum(-1), (d * d).sum(-1), (left * left).sum(-1)], 1).cpu()


def principal_components(stack: Stack, ensemble: Ensemble, count: int) -> list[Float[Tensor, "component d_model"]]:
    """Return the top ``count`` principal components of the stream entering each layer, or all it has.

    Cost: 1 F and an eigendecomposition a layer; nothing where the ``memory`` of the ensemble has them.
    """
    if ensemble.memory is None:
        components = _components(stack, ensemble, count)
    else:
        kept = max(count, KEPT)
        components = ensemble.memory.recall(("components", stack, kept), lambda: _components(stack, ensemble, kept))
    return [basis[basis.any(1)] for basis in components[:, :count]]


def _components(stack: Stack, ensemble: Ensemble, count: int) -> Float[Tensor, "layer component d_model"]:
    """Return the top components of every layer; 0 where a stream has fewer."""
    covariance, _ = covariances(stack, ensemble)
    values, vectors = torch.linalg.eigh(covariance[:-1])
    varies = values >= 1e-9 * values[:, -1:]
    return (vectors * varies.unsqueeze(1)).mT.flip(1)[:, :count].clone()


def _state(stack: Stack, context: Context) -> dict[str, Tensor] | None:
    try:
        return stack.norm_state(context)
    except ValueError:  # a norm whose denominator cannot be found: only the live responses are measured
        return None


def displacements(
    visit: Visit, basis: Float[Tensor, "component d_model"], draw: int, generator: np.random.Generator
) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " chosen"], dict[str, Float[Tensor, "chosen d_model"]]]:
    """Draw one token of every prompt that has any: return its prompt, its place, and a unit vector of each kind.

    Where two tokens differ by no more than rounding there is no direction, and the vector is 0.
    """
    prompt, place = visit.mask.nonzero(as_tuple=True)
    lengths = visit.mask.sum(1).cpu().numpy()
    first = np.cumsum(lengths) - lengths
    chosen = torch.from_numpy((first + generator.integers(np.maximum(lengths, 1)))[lengths > 0]).to(prompt.device)
    x = visit.x[visit.mask].double()
    noise = torch.from_numpy(generator.standard_normal((len(chosen), x.shape[1]))).to(x)
    sign = torch.from_numpy(generator.choice([-1.0, 1.0], (len(chosen), 1))).to(x)
    difference = x[partners(visit.mask, generator)[chosen]] - x[chosen]
    least = 8 * torch.finfo(visit.x.dtype).eps * x[chosen].norm(dim=-1, keepdim=True)
    differs = difference.norm(dim=-1, keepdim=True) > least
    directions = {
        "difference": functional.normalize(difference, dim=-1) * differs,
        "random": functional.normalize(noise, dim=-1),
        "principal": sign * basis[draw % len(basis)].to(x),
    }
    return prompt[chosen], place[chosen], directions
