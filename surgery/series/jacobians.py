r"""Jacobian composition: does a later layer read, to first order, the directions that an earlier one writes?

``J_l`` is the derivative of layer ``l``'s update ``u_l = f_l(x_l)`` with respect to the stream, of the whole sequence
and not of one token: what a token sends to others through attention counts. A random probe ``xi`` (standard normal, at
all tokens of the ensemble) goes through the earlier layer, ``v = J_i xi``, and then through the later one,

    C_ij = sqrt( E|J_j v|^2 / (d E|J_j eta|^2) ),       eta_t a random direction of the length of v_t, d = d_model.

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
architecture, with attention running in its plain form. The estimator is Hutchinson's (1990); the normalised product is
ours, after the coupling of Jacobians in Aubry et al. 2024 (arXiv 2407.07810), who compare the singular vectors of every
two layers.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.parallel_network(n_layers=3))
>>> frame = pairs(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
>>> frame.total.round(5).tolist()
[0.0, 0.0, 0.0]
"""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

Stream = Float[Tensor, "batch pos d_model"]

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


def linearise(stack: Stack, layer: int, x: Stream, context: Context) -> Callable[[Stream], Stream]:
    """Return ``d -> J_l d``: the derivative of a layer's update at ``x``, over all positions, along a change ``d``.

    Cost: a forward and a backward pass of the layer, and about two backward passes for every use.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.serial_network())
    >>> x = stack.stream(known_networks.tokens(2, 4))[1]
    >>> jvp = linearise(stack, 1, x, stack.context(known_networks.tokens(2, 4)))
    >>> bool(torch.allclose(jvp(x), stack.update(1, x), atol=1e-5))  # relu: homogeneous
    True
    """
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
        x = x.detach().requires_grad_()
        update = stack.update(layer, x, context, grad=True)
        cotangent = torch.zeros_like(update, requires_grad=True)
        (pulled,) = torch.autograd.grad(update, x, cotangent, create_graph=True)  # linear in the cotangent

    def along(change: Stream) -> Stream:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.grad(pulled, cotangent, change, retain_graph=True)[0]

    return along


@in_smaller_batches
def pairs(
    stack: Stack, tokens: Tokens | Tensor, *, probes: int = 1, frozen: bool = True, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    """Measure ``direct`` and ``total`` Jacobian composition of every two layers ``earlier < later``.

    Columns: ``COLUMNS``. A pair is undefined (NaN) if the earlier layer responds to no probe, or the later one to
    nothing. The intervals are over prompts; they contain the noise of the probes, which falls with tokens times
    ``probes``.

    Cost in a model of L layers: 2 F and L linearisations (another F forward), with norms live 1 F less; and
    ``probes * 2 L^2`` products, each about two backward passes of a layer. Memory: ``2 L probes`` streams of one
    batch.

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
        keep, prompts = visit.mask.unsqueeze(-1), slice(visit.first, visit.first + len(visit.mask))
        if visit.layer == 0:
            state = stack.norm_state(visit.context) if frozen else None
            written: dict[str, dict[tuple, Tensor]] = {"direct": {}, "total": {}}
        draw = torch.Generator().manual_seed(int(ensemble.generator(visit).integers(2**62)))

        def noise(like: Tensor = visit.x, keep: Tensor = keep, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=torch.float64).to(like) * keep

        with stack.frozen(visit.context, state) if frozen else nullcontext():
            along = linearise(stack, visit.layer, visit.x, visit.context)
            for form, changes in written.items():
                for (earlier, probe), change in changes.items():
                    read = along(change)
                    null = along(functional.normalize(noise(), dim=-1) * change.norm(dim=-1, keepdim=True))
                    squares = ((values * keep).double().square() for values in (read, null))
                    energies = [reduce(square, "prompt pos d_model -> prompt", "sum").cpu() for square in squares]
                    sums[form, earlier, visit.layer][:, prompts] += torch.stack(energies)
                    if form == "total":
                        changes[earlier, probe] = change + read * keep
            for probe in range(probes):
                written["direct"][visit.layer, probe] = written["total"][visit.layer, probe] = along(noise()) * keep
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


def _check(stack: Stack, probes: int) -> None:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; a pair needs two")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got probes={probes}")
