"""Run several streams of one batch together: fewer and larger calls of each layer, with the same results.

A layer called on a few hundred tokens mostly waits for Python. Streams of one batch that wait for the same layer can
share a call, as copies of the batch one after another; up to what a core's cache holds, that is faster.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.random_network())
>>> context = stack.context(known_networks.tokens(4, 6))
>>> several = Together(stack, context)
>>> x = stack.stream(context)
>>> finals = several.ride({1: [x[1], 2 * x[1]], 4: [x[4]]})
>>> [bool(torch.allclose(final, x[-1], atol=1e-4)) for final in finals]
[True, False, True]
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from einops import repeat

from surgery.models.engine import Context, Stream
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

_TOKENS, _NUMBERS = {"cpu": 1024, "cuda": 32768}, 2**17  # in one call: whichever is more


class Together:
    """The streams of one batch, as many in a call as are faster than one by one: ``group``.

    Inside ``stack.frozen`` of the same batch every copy keeps the denominators of the batch.
    """

    def __init__(self, stack: Stack, context: Context) -> None:
        self.stack, self._contexts = stack, {1: context}
        at_once = max(_TOKENS.get(stack.device.type, 8192), _NUMBERS // stack.d_model)
        self.group = max(1, at_once // context.tokens.ids.numel())

    @property
    def context(self) -> Context:
        """The batch."""
        return self._contexts[1]

    def run(self, call: Callable[[Stream, Context], Stream], streams: Sequence[Stream]) -> list[Stream]:
        """Return ``call(x, context)`` of every stream x [batch, pos, d_model], in their order."""
        results: list[Stream] = []
        for first in range(0, len(streams), self.group):
            some = streams[first : first + self.group]
            if len(some) == 1:
                results.append(call(some[0], self.context))
            else:
                results += call(torch.cat(tuple(some)), self._copies(len(some))).chunk(len(some))
        return results

    def updates(self, layer: int, streams: Sequence[Stream]) -> list[Stream]:
        """Return the update of a layer on every stream. Cost: 1/L F each."""
        return self.run(partial(self.stack.update, layer), streams)

    def ride(
        self, waiting: Mapping[int, Sequence[Stream]], advance: Callable[[int], object] = lambda steps: None
    ) -> list[Stream]:
        """Return the streams that leave the model if those of ``waiting[l]`` enter layer l, in the order of layers.

        ``advance`` is told after every layer how many went through it. Cost: (L - l)/L F for each. Memory: all of them.
        """
        riding: list[Stream] = []
        for layer in range(self.stack.n_layers):
            riding += waiting.get(layer, ())
            riding = self.run(partial(self.stack.execute, str(layer)), riding)
            advance(len(riding))
        return [*riding, *waiting.get(self.stack.n_layers, ())]

    def _copies(self, count: int) -> Context:
        """Return the batch, ``count`` times."""
        if count not in self._contexts:
            tokens = self.context.tokens
            copies = (repeat(part, "batch pos -> (copy batch) pos", copy=count) for part in (tokens.ids, tokens.mask))
            self._contexts[count] = self.stack.context(Tokens(*copies))
        return self._contexts[count]
