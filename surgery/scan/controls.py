"""Controls for the gain of a repeated span, and the reorder family of Sun et al. as one table.

Is it this span, the whole of its second pass, and what the layers compute in it, that helps?

==============  =====================================  =================================================================
control         second pass of the span i:j            what it tests
==============  =====================================  =================================================================
random span     of another span of equal length        whether any repeat of that size would do
damped          ``:j beta*(i:j) j:``                   whether less of it is better; 1 is the repeat itself
norm-only       stream scaled to the size that the     whether only the stream's size matters
                second pass would give it
linearised      ``x_j + J u``, ``u = x_j - x_i``       whether the layers' answer to what they wrote is more than linear
==============  =====================================  =================================================================

The first two are wirings, for ``scan.run``; the others are streams, scored by ``surgery.scan.search.loglik``.
``painters`` lists the variants of Sun et al. (2024, "Transformer Layers as Painters", arXiv 2407.09298).

>>> repeats(12, 4, 8, count=2)["control"].tolist()
['repeat', 'random span', 'random span', 'damped 0.25', 'damped 0.5', 'damped 1']
"""

import random
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.models.stack import Context, Stack
from surgery.wiring.value import Layer, Scaled, Wiring


def repeats(
    n_layers: int,
    start: int,
    stop: int,
    count: int = 20,
    factors: Sequence[int | float] = (0.25, 0.5, 1),
    seed: int = 0,
) -> pd.DataFrame:
    """List the repeated span and its controls that are wirings: control, wiring.

    Raises ValueError for a span that is empty or leaves the model.
    """
    rows = [("repeat", Wiring.of(n_layers).repeat(start, stop))]
    rows += [("random span", wiring) for wiring in random_spans(n_layers, start, stop, count, seed)]
    rows += [(f"damped {factor:g}", damped(n_layers, start, stop, factor)) for factor in factors]
    return pd.DataFrame([(name, str(wiring)) for name, wiring in rows], columns=["control", "wiring"])


def random_spans(n_layers: int, start: int, stop: int, count: int = 20, seed: int = 0) -> list[Wiring]:
    """Repeats of ``count`` different other spans of equal length, or of all if there are fewer.

    Raises ValueError for a span that is empty or leaves the model.
    """
    whole = Wiring.of(n_layers)
    whole.repeat(start, stop)  # refuses a span that is empty or leaves the model
    first, last, _ = slice(start, stop).indices(n_layers)
    other_starts = [i for i in range(n_layers - (last - first) + 1) if i != first]
    starts = random.Random(seed).sample(other_starts, min(count, len(other_starts)))
    return [whole.repeat(i, i + last - first) for i in starts]


def damped(n_layers: int, start: int, stop: int, factor: int | float) -> Wiring:
    """The wiring ``:stop factor*(start:stop) stop:``, in which the second pass counts only in part.

    Raises ValueError for a span that is empty or leaves the model.
    """
    whole = Wiring.of(n_layers)
    whole.repeat(start, stop)  # refuses a span that is empty or leaves the model
    first, last, _ = slice(start, stop).indices(n_layers)
    return Wiring(n_layers, (*whole.steps[:last], Scaled(factor, whole.steps[first:last]), *whole.steps[last:]))


def norm_only(stack: Stack, start: int, stop: int, context: Context) -> Float[Tensor, "batch pos d_model"]:
    """The final stream if the second pass changed only the stream's size: ``x_j |F(x_j)| / |x_j|`` at every token.

    ``F`` are the layers ``start`` to ``stop - 1``. Cost: that of the repeat.
    """
    x = _run(stack, 0, stop, context.x0, context)
    twice = _run(stack, start, stop, x, context)
    ratio = twice.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return _run(stack, stop, stack.n_layers, x * ratio, context)


class NoDerivativeError(ValueError):
    """A model with layers that torch has no forward-mode derivative for."""


def linearised(stack: Stack, start: int, stop: int, context: Context) -> Float[Tensor, "batch pos d_model"]:
    """The final stream if the second pass were linear about the first: ``F(x_i) + J (x_j - x_i) = x_j + J u``.

    ``F`` are the layers ``start`` to ``stop - 1``, ``J`` their Jacobian at ``x_i``, ``u = x_j - x_i`` what the first
    pass wrote, at all tokens. For affine layers this is the repeat. Cost: the repeat, and the span twice more.

    Raises NoDerivativeError for layers that torch has no forward-mode derivative for (some mixtures of experts).
    """
    x = _run(stack, 0, start, context.x0, context)

    def span(x: Tensor) -> Tensor:
        return _run(stack, start, stop, x, context, grad=True)

    after = _run(stack, start, stop, x, context)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other backends have no forward-mode derivative
            change = torch.func.jvp(span, (x,), (after - x,))[1]
    except NotImplementedError as error:
        raise NoDerivativeError(
            f"{stack.name} cannot be linearised, torch has no derivative for its layers: {error}"
        ) from error
    return _run(stack, stop, stack.n_layers, (after + change).detach(), context)


def painters(n_layers: int, sizes: Sequence[int] | None = None, seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    """List the variants of Sun et al. over centred windows of growing ``size``: variant, size, wiring.

    Skip, middle-repeat (the model's centre layer in place of every layer of the window), reverse, random order (one row
    per seed), parallel mean, parallel sum, and looped parallel (mean, 3 times). By default every size from 2 to
    ``n_layers - 1``. A window of 2 in reverse is also its only random order.

    Raises ValueError for a size outside 2 to ``n_layers - 1``.

    >>> painters(12, [4]).head(3)["wiring"].tolist()
    [':4 8:', ':4 6 6 6 6 8:', ':4 7:3:-1 8:']
    """
    whole, rows = Wiring.of(n_layers), []
    for size in range(2, n_layers) if sizes is None else sizes:
        if not 2 <= size < n_layers:
            raise ValueError(f"windows have 2 to {n_layers - 1} of {n_layers} layers, got {size}")
        start = (n_layers - size + 1) // 2
        stop = start + size
        middle = (Layer(n_layers // 2),) * size
        variants = [
            ("skip", whole.skip(start, stop)),
            ("middle-repeat", Wiring(n_layers, (*whole.steps[:start], *middle, *whole.steps[stop:]))),
            ("reverse", whole.reverse(start, stop)),
            *(("random order", whole.shuffle(start, stop, seed=seed)) for seed in seeds),
            ("parallel mean", whole.parallel(start, stop, mean=True)),
            ("parallel sum", whole.parallel(start, stop)),
            ("looped parallel", whole.loop(start, stop, 3, mean=True)),
        ]
        rows += [(name, size, str(wiring)) for name, wiring in variants]
    return pd.DataFrame(rows, columns=["variant", "size", "wiring"])


def _run(stack: Stack, start: int, stop: int, x: Tensor, context: Context, grad: bool = False) -> Tensor:
    """Run layers ``start`` to ``stop - 1`` on ``x``; none if both are equal."""
    if start == stop:
        return x
    return stack.execute(f"{start}:{stop}", x, context, grad=grad)
