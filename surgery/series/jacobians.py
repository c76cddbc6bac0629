r"""Jacobian composition: does a later layer read, to first order, the directions that an earlier one writes?

``J_l`` is the derivative of layer ``l``'s update ``u_l = f_l(x_l)`` with respect to the stream, of the whole sequence
and not of one token: what a token sends to others through attention counts. A random probe ``xi`` (standard normal, at
all tokens of the ensemble) goes through the earlier layer, ``v = J_i xi``, and then through the later one,

    C_ij = sqrt( E|J_j v|^2 / (d E|J_j eta|^2) ),       eta_t a random direction of the length of v_t, d = d_model.

What random directions would read need not be drawn for every pair: ``E|J_j eta|^2 = sum_t |v_t|^2 a_t / d``, where a_t
is the squared size of all that j reads at token t, ``E|(J_j^T zeta)_t|^2`` over random ``zeta`` of length sqrt(d). A
few backward passes of layer j give it for all earlier layers (``NULLS``).

Over probes ``d E|J_j eta|^2`` is the product of the squared Frobenius norms of ``J_j`` and ``J_i``, taken token by
token. So in a model without attention whose tokens are all alike ``C_ij = |J_j J_i| / (|J_j| |J_i|)``, in [0, 1]; in
others, tokens with large writes may lift it slightly above 1. A layer that reads all directions alike, or random ones,
reads ``1/sqrt(d)``, the ``baseline``; ``direct_excess = direct - baseline``.

* ``direct`` is this number: the later layer reads what the earlier one wrote, with no layer in between.
* ``total`` lets the layers between carry it on: ``v`` is the change of the stream that reaches the later layer,
  ``w_{i+1} = J_i xi, w_{l+1} = w_l + J_l w_l``. For neighbours both are the same (but for the draw of eta).

Parallel network: both 0 for every pair. Serial network: ``direct`` is above its baseline for neighbours and 0 for all
others, as no layer reads past its neighbour; ``total`` is above 0 for all. Neither is 1: a layer that mixes the
directions it reads at random has ``1/sqrt(width)`` of the ``width`` directions that are written and read. With live
norms (``frozen=False``) a layer also responds to what rescales its input, and the parallel network reads above 0.

Derivatives are products of the whole layer with a vector, by reverse mode twice (``linearise``): this works for every
architecture, with attention running in its plain form, and takes as long as the layer itself. The estimator is
Hutchinson's (1990); the normalised product is ours, after the coupling of Jacobians in Aubry et al. 2024 (arXiv
2407.07810), who compare the singular vectors of every two layers.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.parallel_network(n_layers=3))
>>> frame = pairs(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
>>> frame.total.round(5).tolist()
[0.0, 0.0, 0.0]
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble, Visit
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

Stream = Float[Tensor, "batch pos d_model"]
NULLS = 2  # draws of the null of every later layer

COLUMNS = {
    "earlier": "the layer that writes",
    "later": "the layer that reads",
    "n_prompts": "number of prompts, the unit of resampling",
    "baseline": "what random directions would read: 1 / sqrt(d_model)",
    **massive.COLUMNS,
}
_MEASURES = {
    "direct": "|J_j J_i| / (|J_j| |J_i|), token by token: how much of what i writes j reads, 0 none",
    "direct_excess": "direct minus its baseline",
    "total": "the same for what reaches the later layer of it, the layers between carrying it on",
    "total_excess": "total minus its baseline",
}
COLUMNS |= described(_MEASURES)


@dataclass(frozen=True)
class Derivative:
    """The derivative J of a layer's update over all positions of a batch: ``derivative(d)`` is ``J d``.

    ``pulled`` is ``J^T cotangent`` as a function of the stream and of the cotangent, in which it is linear.
    """

    x: Stream
    update: Stream
    cotangent: Stream
    pulled: Stream

    def __call__(self, change: Stream) -> Stream:
        """Return ``J d``. Cost: about 1/L F."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(self.pulled, self.cotangent, change, retain_graph=True)[0]

    def transposed(self, cotangent: Stream) -> Stream:
        """Return ``J^T c``. Cost: about 1.2/L F."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(self.update, self.x, cotangent, retain_graph=True)[0]

    def bent(self, change: Stream) -> tuple[Stream, Stream]:
        """Return ``H d`` and ``J d``, with H the second derivative of the update along the cotangent.

        Cost: about 3/L F.
        """
        with sdpa_kernel(SDPBackend.MATH):
            both = torch.autograd.grad(
                self.pulled, (self.x, self.cotangent), change, retain_graph=True, materialize_grads=True
            )
        return both[0], both[1]


def linearise(stack: Stack, layer: int, x: Stream, context: Context, cotangent: Stream | None = None) -> Derivative:
    """Return the derivative of a layer's update at ``x``, and its second derivative along ``cotangent`` (or 0).

    Cost: about 3/L F, a forward and a backward pass of the layer, each with a graph.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network())
    >>> x = stack.stream(known_networks.tokens(2, 4))[1]
    >>> derivative = linearise(stack, 1, x, stack.context(known_networks.tokens(2, 4)))
    >>> bool(torch.allclose(derivative(x), stack.update(1, x), atol=1e-5))  # relu: homogeneous
    True
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
        x = x.detach().requires_grad_()
        update = stack.update(layer, x, context, grad=True)
        cotangent = (torch.zeros_like(update) if cotangent is None else cotangent).detach().requires_grad_()
        (pulled,) = torch.autograd.grad(update, x, cotangent, create_graph=True)
    return Derivative(x, update, cotangent, pulled)


@with_meanings(COLUMNS)
@in_smaller_batches
def pairs(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    *,
    probes: int = 1,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure ``direct`` and ``total`` Jacobian composition of every two layers ``earlier < later``.

    Columns: ``COLUMNS``. A pair is undefined (NaN) if the earlier layer responds to no probe, or the later one to
    nothing. The intervals are over prompts; they contain the noise of the probes, which falls with tokens times
    ``probes``.

    Cost in a model of L layers: 2 F (with norms live 1 F less), 3 F to linearise the layers, 1.2 F a draw of the null,
    and ``probes`` times ``(L - 1)^2 / L + 1`` F for products. Memory: ``2 L probes`` streams of one batch.

    Raises ValueError for a model of one layer, and if ``probes`` is not positive.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network(n_layers=3))
    >>> serial = pairs(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    >>> bool((serial.total > 0.1).all())
    True
    """
    _check(stack, probes)
    ensemble = Ensemble.of(stack, tokens, sampling)
    sums: defaultdict[tuple, Tensor] = defaultdict(lambda: torch.zeros(2, len(ensemble.tokens), dtype=torch.float64))
    for visit in ensemble.visits(stack, "jacobians"):
        prompts = slice(visit.first, visit.first + len(visit.mask))
        if visit.layer == 0:
            state = stack.norm_state(visit.context) if frozen else None
            written: dict[tuple[int, int], Stream] = {}  # by layer and probe
            carried: dict[tuple[int, int], Stream] = {}  # the same with what later layers made of it
        noise = _Noise(visit, ensemble)
        with stack.frozen(visit.context, state) if frozen else nullcontext():
            derivative = linearise(stack, visit.layer, visit.x, visit.context)
            pulled = [noise.squares(derivative.transposed(noise.even())) for _ in range(NULLS if written else 0)]
            for (earlier, probe), change in written.items():
                read = derivative(change)
                total = carried.get((earlier, probe), change)
                passed = read if total is change else derivative(total)
                for form, reach, effect in (("direct", change, read), ("total", total, passed)):
                    null = noise.squares(reach) * sum(pulled) / (NULLS * stack.d_model)
                    energies = torch.stack([noise.squares(effect), null]).sum(-1)
                    sums[form, earlier, visit.layer][:, prompts] += energies.cpu()
                carried[earlier, probe] = total + noise.kept(passed)
            for probe in range(probes if visit.layer < stack.n_layers - 1 else 0):
                written[visit.layer, probe] = noise.kept(derivative(noise()))
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    baseline = 1 / math.sqrt(stack.d_model)
    rows = []
    for later in range(1, stack.n_layers):
        for earlier in range(later):
            row = {"earlier": earlier, "later": later, "n_prompts": len(ensemble.tokens), "baseline": baseline}
            for form in ("direct", "total"):
                read, null = sums[form, earlier, later]
                composition = ratio(draws @ read, draws @ null).sqrt() * baseline
                row |= measure_columns({form: composition, f"{form}_excess": composition - baseline})
            rows.append(row)
    frame = pd.DataFrame(rows).sort_values(["earlier", "later"], ignore_index=True)
    return ensemble.annotate(frame, "earlier", "later")


class _Noise:
    """Standard normal vectors at the tokens of one visit that are in the ensemble, and sums over these tokens."""

    def __init__(self, visit: Visit, ensemble: Ensemble) -> None:
        self.like, self.mask = visit.x, visit.mask
        self.generator = torch.Generator().manual_seed(int(ensemble.generator(visit).integers(2**62)))

    def __call__(self) -> Stream:
        return self.kept(torch.randn(self.like.shape, generator=self.generator).to(self.like))

    def even(self) -> Stream:
        """Return random directions, each as long as a standard normal vector is on average (root mean square)."""
        return functional.normalize(self(), dim=-1) * math.sqrt(self.like.shape[-1])

    def kept(self, values: Stream) -> Stream:
        """Return ``values`` at the ensemble's tokens, 0 elsewhere."""
        return values * self.mask.unsqueeze(-1)

    def squares(self, values: Stream) -> Float[Tensor, "batch pos"]:
        """Return the squared length of every vector of the ensemble, 0 elsewhere, in float64."""
        return torch.linalg.vector_norm(values, dim=-1).double().square() * self.mask


def _check(stack: Stack, probes: int) -> None:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; a pair needs two")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got probes={probes}")
