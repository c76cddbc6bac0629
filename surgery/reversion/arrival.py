r"""What share of a small random displacement arrives at the end of the model: the trace of the Jacobian.

With J[t', t] the Jacobian of the last stream at token t' by the stream that leaves layer l at token t, and d its width,

    own     E_t  tr J[t, t] / d                      what arrives at the token that was moved
    whole   E_t  sum over t' >= t of tr J[t', t] / d  the same and what attention carries to later tokens

A stack that writes nothing has 1. ``own`` is the limit of ``along`` (``surgery.reversion.returns``) for small random
displacements followed to the end, found with gradients instead of finite ones: an outside check. ``whole`` is tr(J)/d
of the Jacobian lens (Gurnee et al. 2026, ``transformer_lens.tools.analysis.JacobianLens``), whose exact fit takes d
backward passes a prompt where this takes a few: traces are estimated with random signs (Hutchinson 1989). Below 1 a
displacement is taken back or turned; only ``remaining`` tells which of the two.

Compare with the architecture untrained.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> frame = shares(Stack(known_networks.random_network(n_layers=3)), known_networks.tokens(6, 5))
>>> frame.layer.tolist()
[0, 1]
"""

from collections.abc import Iterator

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from surgery.instruments import massive
from surgery.instruments.ensemble import Ensemble, Totals
from surgery.meanings import with_meanings
from surgery.memory import in_smaller_batches
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import described, measure_columns, ratio, weights
from surgery.stats.sampling import Sampling

_MEASURES = {
    "own": "share of a displacement behind the layer that arrives at the end, at its token: tr J[t, t] / d",
    "whole": "the same summed over its token and all later ones: tr J / d of the Jacobian lens",
}
COLUMNS: dict[str, str] = {
    "layer": "the layer behind which the stream is displaced",
    "n_prompts": "number of prompts",
    **described(_MEASURES),
    **massive.COLUMNS,
}


@with_meanings(COLUMNS)
@in_smaller_batches
def shares(
    stack: Stack, tokens: Ensemble | Tokens | Tensor, draws: int = 4, *, sampling: Sampling = Sampling(batch_size=8)
) -> pd.DataFrame:
    """Measure both shares behind every layer but the last: ``COLUMNS``. Intervals are over prompts.

    Cost: 1 F, and 2 ``draws`` backward passes of all layers. Memory: the graph of one batch.

    Raises ValueError for fewer than one draw, and a stream that is not finite.
    """
    if draws < 1:
        raise ValueError(f"draws are random signs to estimate a trace with, 1 or more, got {draws}")
    ensemble = Ensemble.of(stack, tokens, sampling)
    totals = Totals(ensemble.n_units)
    for first, (unit, context, mask) in enumerate(ensemble.batches(stack, "arrival")):
        streams = _streams(stack, context)
        generator = torch.Generator().manual_seed(hash((sampling.seed, first)) % 2**31)
        for name in _MEASURES:
            for draw in range(draws):
                values = _traces(streams, mask, name, generator, last=name == "whole" and draw == draws - 1)
                totals.add(name, unit, values.sum(-1).T / stack.d_model / draws)
        totals.add("count", unit, mask.sum(1).double())
    drawn = weights(ensemble.n_units, sampling.resamples, sampling.seed)
    count = drawn @ totals["count"]
    frame = pd.DataFrame(
        {"layer": layer, "n_prompts": len(ensemble.tokens)}
        | measure_columns({name: ratio(drawn @ totals[name][:, layer], count) for name in _MEASURES})
        for layer in range(stack.n_layers - 1)
    )
    return ensemble.annotate(frame, "layer")


def _streams(stack: Stack, context: Context) -> list[Float[Tensor, "prompt pos d_model"]]:
    """What leaves every layer, with the graph that connects them."""
    streams = [context.x0.detach().clone().requires_grad_()]
    with torch.enable_grad():
        for layer in range(stack.n_layers):
            streams.append(stack.execute(str(layer), streams[-1], context, grad=True))
    if not streams[-1].isfinite().all():
        raise ValueError(f"the stream of {stack.name} is not finite: load the model in float32, or fix its weights")
    return streams[1:]


def _traces(
    streams: list[Tensor], mask: Tensor, name: str, generator: torch.Generator, *, last: bool
) -> Float[Tensor, "layer prompt pos"]:
    """One estimate of the trace at every token, behind every layer but the last; ``last`` frees the graph.

    With signs of its own for every target token, only what stays at a token counts on average.
    """
    final = streams[-1]
    shape = final.shape if name == "own" else (len(final), 1, final.shape[-1])
    signs = (torch.randint(2, shape, generator=generator) * 2 - 1).to(final).expand_as(final) * mask.unsqueeze(-1)
    gradients: Iterator[Tensor] = iter(torch.autograd.grad(final, streams[:-1], signs, retain_graph=not last))
    return torch.stack([(gradient * signs).sum(-1) for gradient in gradients])
