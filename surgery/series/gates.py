r"""Gates on the layers' updates, ``x_{l+1} = x_l + alpha_l u_l``: how does the output depend on all of them?

In parallel the output is a sum over layers, linear in the gates; in series it is a chain, a product of them. Three
readings of that, all derivatives at the model itself, ``alpha = 1``:

* ``exponents``: all updates of a window of ``m`` layers are scaled by ``eps``. What its last layer writes grows as
  ``kappa_g = d log n(c(eps u_last)) / d log eps``: 1 in the parallel network, exactly ``m`` in the serial one without
  biases (relu is homogeneous); ``gate_series = (kappa_g - 1) / (m - 1)`` is then 0 and 1. Real layers may leave that
  range, if the last one writes less because others write. ``kappa_g_stream`` reads all that the window wrote,
  ``x_stop - x_start``: the mean length of the paths in it, weighted by energy, so less than ``m`` in series as well.
* ``hessian``: ``H_ij = d^2 s / d alpha_i d alpha_j / s`` for the margin ``s`` of the likeliest next token over the
  second: 0 for every pair in parallel. In series it is 1 for every pair if the head reads the last layer alone; a head
  that reads layer ``l`` too, as the serial network's does, adds terms in which ``j > l`` has no part, and H is then the
  share of the margin from layers ``>= j``, of either sign.
* ``path_lengths``: the gradient of the margin with respect to the embeddings is a sum over paths, through the branch or
  past it at every layer; how much of it runs through ``k`` branches? In parallel all is at k <= 1. In series with a
  head that reads the last layer alone all is at k = L; the serial network's own head reads every length of chain.

The margin is read through the final norm with its denominators kept, and linearly, so that the curvature of the head
does not count (Veit et al. 2016, arXiv 1605.06431, take the gradient of the loss). The layers' norms are frozen too by
default; live, their division couples all layers. ``exponents`` and ``hessian`` are our definitions.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.serial_network(n_layers=3))
>>> frame = exponents(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
>>> frame.kappa_g.round(4).tolist()
[2.0, 3.0, 2.0]
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.readout import frozen_head, portions
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.engine import Stream
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.series.jacobians import linearise
from surgery.stats.bootstrap import Moments, columns, described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

COLUMNS = {
    "start": "first layer of the window",
    "stop": "one past the last layer of the window",
    "earlier": "the earlier layer of the pair",
    "later": "the later layer of the pair",
    "branches": "number of layers through whose branch the gradient passes",
    "n_prompts": "number of prompts, the unit of resampling",
    **massive.COLUMNS,
}
_MEASURES = {
    "kappa_g": "power of a common factor on the window's updates with which its last layer's write grows: 1 parallel",
    "gate_series": "(kappa_g - 1) / (length - 1): 0 parallel, 1 serial and homogeneous",
    "kappa_g_stream": "the same power for all that the window wrote: energy-weighted mean length of path",
    "hessian": "second derivative of the margin by the two layers' gates, over the margin: 0 parallel",
    "share": "share of the gradient that passes through this many branches",
    "mean_branches": "mean number of branches over the shares (the same in every row)",
}
COLUMNS |= described(_MEASURES)


@with_meanings(COLUMNS)
@in_smaller_batches
def exponents(
    stack: Stack,
    tokens: Ensemble | Tokens | Tensor,
    *,
    start: int | None = None,
    frozen: bool = True,
    sampling: Sampling = Sampling(),
) -> pd.DataFrame:
    """Measure the gate exponent of every window of two layers or more, or of those alone that begin at ``start``.

    Columns: ``start``, ``stop``, ``n_prompts`` and, with intervals, ``kappa_g``, ``gate_series``, ``kappa_g_stream``. A
    last layer that writes the same for every token has none (NaN). A layer that reads all directions alike responds to
    the share of its input that the window wrote, and from layer 0 of a model with small embeddings that is nearly all
    (an untrained network of 4 layers: 0.99 for layers 0 and 1, 0.5 and less from layer 1 on): compare windows from
    layer 1 with the architecture untrained.

    Cost in a model of L layers: 2 F (with live norms 1 F less), 3 F to linearise the layers, and (L - 1)/2 F for the
    derivatives along a vector, from one ``start`` no more than 1 F. Memory: L streams of one batch, and 4 L^2 d_model
    numbers a prompt.

    Raises ValueError for a model of one layer.
    """
    _check(stack)
    ensemble = Ensemble.of(stack, tokens, sampling)
    last: defaultdict[tuple, list[Moments]] = defaultdict(list)
    whole: defaultdict[tuple, list[Moments]] = defaultdict(list)
    for visit in ensemble.visits(stack, "gate exponents"):
        if visit.layer == 0:
            state = stack.norm_state(visit.context) if frozen else None
            entries: dict[int, Tensor] = {}
            tangents: dict[int, Tensor] = {}  # d x / d eps of the windows from every start
        with stack.frozen(visit.context, state) if frozen else nullcontext():
            along = linearise(stack, visit.layer, visit.x, visit.context)
            for first, tangent in tangents.items():
                response = along(tangent)
                tangents[first] = tangent + visit.u + response
                window, written = (first, visit.layer + 1), visit.x + visit.u - entries[first]
                last[window] += [Moments.of(visit.u, b, visit.mask) for b in (None, response)]
                whole[window] += [Moments.of(written, b, visit.mask) for b in (None, tangents[first])]
        if start is None or visit.layer == start:
            entries[visit.layer], tangents[visit.layer] = visit.x, visit.u
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)

    def slope(parts: list[Moments]) -> Tensor:  # variances of what is written, and covariances with its derivative
        variance, covariance = (Moments.concatenate(parts[i::2]).covariance(draws) for i in (0, 1))
        return ratio(covariance, variance)

    rows = []
    for window in sorted(last):
        first, stop = window
        kappa = 1 + slope(last[window])
        measures = {"kappa_g": kappa, "gate_series": (kappa - 1) / (stop - first - 1)}
        measures["kappa_g_stream"] = slope(whole[window])
        rows.append({"start": first, "stop": stop, "n_prompts": len(ensemble.tokens)} | measure_columns(measures))
    return ensemble.annotate(pd.DataFrame(rows), "start", "stop")


@with_meanings(COLUMNS)
@in_smaller_batches
def hessian(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, *, frozen: bool = True, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    r"""Measure ``H_ij`` of every pair of layers: ``earlier``, ``later``, ``n_prompts``, ``hessian`` with its interval.

    A prompt has one set of gates: they act at all of its positions, and the margins of its tokens are added up. With
    ``t_i`` what gate i changes of the stream, to first order, and ``lambda_l`` the margin's gradient at ``x_l``,

        d^2 s / d alpha_i d alpha_j = lambda_{j+1} J_j t_i + sum_{l > j} lambda_{l+1} (D^2 f_l)[t_i, t_j],      i < j,

    so layer after layer is bent once along every earlier gate, and no graph of the whole model is held.

    Cost in a model of L layers: 2 F (1 with live norms), one readout, 5 F to linearise, and 3 (L - 1)/2 F for the
    second derivatives. Memory: 2 L streams of one batch.

    Raises ValueError for a model of one layer.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.parallel_network(n_layers=3))
    >>> frame = hessian(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    >>> frame.hessian.abs().round(5).tolist()
    [0.0, 0.0, 0.0]
    """
    _check(stack)
    ensemble = Ensemble.of(stack, tokens, sampling)
    curvatures, margins = [], []
    for _, context, mask in ensemble.batches(stack, "gates"):
        stream = stack.stream(context)
        margin, slope = _margin(stack, stream[-1], mask)
        with _running(stack, context, frozen):
            curvatures.append(_curvature(stack, context, stream, slope))
        margins.append(margin)
    curvature, margin = torch.cat(curvatures, -1), torch.cat(margins)
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    frame = pd.DataFrame(
        {"earlier": earlier, "later": later, "n_prompts": len(ensemble.tokens)}
        | columns("hessian", ratio(draws @ curvature[earlier, later], draws @ margin))
        for earlier, later in itertools.combinations(range(stack.n_layers), 2)
    )
    return ensemble.annotate(frame, "earlier", "later")


def _curvature(
    stack: Stack, context: Context, stream: Float[Tensor, "place batch pos d_model"], slope: Stream
) -> Float[Tensor, "earlier later batch"]:
    """Return the second derivatives of the margin by two gates, where earlier < later."""
    gradient = [slope]  # at x_L, x_{L-1}, ..., x_1
    for layer in reversed(range(1, stack.n_layers)):
        x = stream[layer].detach().requires_grad_()
        update = stack.update(layer, x, context, grad=True)
        gradient.append(gradient[-1] + torch.autograd.grad(update, x, gradient[-1])[0])
    gradient.reverse()
    curvature = torch.zeros(stack.n_layers, stack.n_layers, len(slope), dtype=torch.float64)
    tangents: list[Stream] = []
    for layer in range(stack.n_layers):
        passed = []
        if layer:
            derivative = linearise(stack, layer, stream[layer], context, gradient[layer])
            for earlier, tangent in enumerate(tangents):
                bent, response = derivative.bent(tangent)
                curvature[earlier, layer] += _product(gradient[layer], response)
                for later in range(earlier + 1, layer):
                    curvature[earlier, later] += _product(bent, tangents[later])
                passed.append(tangent + response)
        tangents = [*passed, stream[layer + 1] - stream[layer]]
    return curvature


def _product(a: Stream, b: Stream) -> Float[Tensor, " batch"]:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1)).detach().double().cpu()


@with_meanings(COLUMNS)
@in_smaller_batches
def path_lengths(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, *, frozen: bool = True, sampling: Sampling = Sampling()
) -> pd.DataFrame:
    r"""Measure how much of the margin's gradient passes through k branches: a row for every ``branches`` from 0 to L.

    With ``g_k`` the sum over all paths through exactly k branches, taken at the embedding, and ``Sigma`` the covariance
    of the embeddings of the ensemble (a direction in which no token differs from another is no path to it),

        share_k = n(Sigma^(1/2) g_k) / sum_k n(Sigma^(1/2) g_k).

    The ``g_k`` are exact and not sampled: they are carried back together, ``g_k <- g_k + J_l^T g_{k-1}``. Paths of one
    length are added before their size is taken, so those that cancel do not count (Veit et al. add the sizes of sampled
    ones). If every branch passed on as much as its shortcut and no two paths agreed, the shares would go as the square
    root of the binomial coefficients, with a mean of L/2.

    Columns: ``branches``, ``n_prompts``, ``share``, ``mean_branches``, each of the last two with its interval.
    Cost in a model of L layers: 2 F (1 with live norms), one readout, 1.5 F with a graph and ``L (L + 1) / 2`` backward
    passes of a layer, each 1.2/L F. Memory: 2 L streams of one batch.

    >>> from surgery import Stack
    >>> from surgery.instruments import known_networks
    >>> stack = Stack(known_networks.parallel_network(n_layers=3))
    >>> frame = path_lengths(stack, known_networks.tokens(8, 6), sampling=Sampling(resamples=0))
    >>> frame.share[2:].round(5).tolist()
    [0.0, 0.0]
    """
    ensemble = Ensemble.of(stack, tokens, sampling)
    root = _root_covariance(stack, ensemble)
    energies = []
    for _, context, mask in ensemble.batches(stack, "gates"):
        stream = stack.stream(context)
        gradients = [_margin(stack, stream[-1], mask)[1]]
        with _running(stack, context, frozen):
            for layer in reversed(range(stack.n_layers)):
                x = stream[layer].detach().requires_grad_()
                update = stack.update(layer, x, context, grad=True)
                branch = [torch.autograd.grad(update, x, g, retain_graph=True)[0] for g in gradients]
                none = torch.zeros_like(x)
                gradients = [past + through for past, through in zip([*gradients, none], [none, *branch], strict=True)]
        weighted = torch.stack([g.detach().double() @ root.to(g.device) for g in gradients])
        energies.append((weighted.square().sum(-1) * mask).sum(-1).cpu())
    draws = weights(len(ensemble.tokens), sampling.resamples, sampling.seed)
    sizes = (draws @ torch.cat(energies, 1).T).sqrt()
    shares = sizes / sizes.sum(1, keepdim=True)
    mean = columns("mean_branches", shares @ torch.arange(stack.n_layers + 1).double())
    rows: list[dict[str, float]] = [
        {"branches": k, "n_prompts": len(ensemble.tokens)} | columns("share", share) | mean
        for k, share in enumerate(shares.T)
    ]
    return ensemble.annotate(pd.DataFrame(rows))


@contextmanager
def _running(stack: Stack, context: Context, frozen: bool) -> Iterator[None]:
    """Context manager: attention has second derivatives, which fast kernels lack, and norms are ``frozen`` or live."""
    with sdpa_kernel(SDPBackend.MATH), stack.frozen(context) if frozen else nullcontext():
        yield


def _margin(
    stack: Stack, final: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch pos d_model"]]:
    """Return the margin of the first over the second logit, summed over a prompt's tokens, and its gradient."""
    measured = final[mask].detach()
    margins, slopes = [], []
    for rows in portions(stack, measured):
        x = measured[rows].requires_grad_()
        with frozen_head(stack, x):
            best = stack.readout(x, grad=True).topk(2, dim=-1).values
        margin = best[:, 0] - best[:, 1]
        slopes.append(torch.autograd.grad(margin.sum(), x)[0])
        margins.append(margin.detach().double().cpu())
    slope = torch.zeros_like(final)
    slope[mask] = torch.cat(slopes)
    prompts = mask.nonzero()[:, 0].cpu()
    return torch.zeros(len(mask), dtype=torch.float64).index_add(0, prompts, torch.cat(margins)), slope


def _root_covariance(stack: Stack, ensemble: Ensemble) -> Float[Tensor, "d_model d_model"]:
    """Return the symmetric square root of the embeddings' covariance."""
    contexts = ensemble.batches(stack, "embeddings")
    x = torch.cat([context.x0[mask].double().cpu() for _, context, mask in contexts])
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _check(stack: Stack) -> None:
    if stack.n_layers < 2:
        raise ValueError(f"{stack.name} has one layer; gates interact between two or more")
