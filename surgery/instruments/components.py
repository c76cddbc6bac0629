"""MLPs and attention heads of a model: record what they write, and let them write something else.

An MLP's *site* is what it writes into the stream, a head's its slice of what enters the layer's attention output
weights. Units are numbered through the model, ``per_layer`` to a layer: head h of layer l is ``l * n_heads + h``.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.random_network(n_layers=2))
>>> context = stack.context(known_networks.tokens(3, 6))
>>> heads = Sites.of(stack, context, "heads")
>>> with heads.recorded() as written:
...     streams = stack.stream(context)
>>> heads.per_layer, heads.layer(5), len(written), tuple(written[0].shape[:2])
(4, 1, 2, (3, 6))
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from surgery.models.errors import ModelError
from surgery.models.scopes import CALL, FORWARD, scope
from surgery.models.stack import Context, Stack

UNITS = ("layers", "mlps", "heads")
Written = Float[Tensor, "prompt pos width"]


@dataclass(frozen=True)
class Sites:
    """Where the units of a kind write, a module per layer; whole layers have none, they write into the stream."""

    units: str
    n_layers: int
    per_layer: int
    modules: tuple[nn.Module, ...]

    @classmethod
    def of(cls, stack: Stack, context: Context, units: str) -> "Sites":
        """Find the modules in the engine that runs ``context``.

        Raises ValueError for an unknown kind of unit, ModelError for a layer without such a part.
        """
        if units not in UNITS:
            raise ValueError(f"units are {', '.join(UNITS)}, not {units!r}")
        if units == "layers":
            return cls(units, stack.n_layers, 1, ())
        parts = context.engine.parts
        found: list[Any]
        if units == "mlps":
            found = [part.mlp for part in parts]
        else:
            blocks = [block.attn for block in stack.model.blocks]
            outs = [attn.submodules.get("o") for attn in blocks]
            found = [
                None if out is None else attn.o if part.attn is attn else part.attn.get_submodule(out.name)
                for attn, out, part in zip(blocks, outs, parts, strict=True)
            ]
        modules = tuple(module for module in found if module is not None)
        if len(modules) < len(parts):
            raise ModelError(f"{stack.name} has layers whose {units} cannot be told apart: take out its layers")
        return cls(units, stack.n_layers, 1 if units == "mlps" else int(stack.model.cfg.n_heads), modules)

    @property
    def count(self) -> int:
        """How many units the model has."""
        return self.n_layers * self.per_layer

    def layer(self, unit: int) -> int:
        """The layer that a unit belongs to."""
        return unit // self.per_layer

    def part(self, unit: int, width: int) -> slice:
        """The unit's own numbers among the ``width`` of its site."""
        size = width // self.per_layer
        return slice(unit % self.per_layer * size, (unit % self.per_layer + 1) * size)

    @contextmanager
    def recorded(self) -> Iterator[dict[int, Written]]:
        """Context manager: what was last written at every layer's site, as layers run."""
        written: dict[int, Written] = {}

        def keep(layer: int) -> Callable[[Written], None]:
            return lambda values: written.update({layer: values})

        with ExitStack() as listening:
            for layer in range(len(self.modules)):
                listening.enter_context(self._heard(layer, keep(layer)))
            yield written

    def replaced(self, layer: int, change: Callable[[Written], Written]) -> Any:
        """Context manager: ``change`` decides what a layer's site writes, given what it would."""
        return self._heard(layer, change)

    @contextmanager
    def _heard(self, layer: int, hear: Callable[[Written], Written | None]) -> Iterator[None]:
        """``hear`` gets what is written; what it returns, if not None, is written instead."""

        def heard(x: Tensor) -> Tensor:
            values = hear(x.reshape(*x.shape[:2], -1))
            return x if values is None else values.reshape(x.shape)

        def before(inner: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return inner(heard(x), *args, **kwargs)

        def after(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            return type(output)((heard(output[0]), *output[1:])) if isinstance(output, tuple | list) else heard(output)

        with scope() as opened:
            if self.units == "mlps":
                opened.around(self.modules[layer], CALL, after)
            else:
                opened.around(self.modules[layer], FORWARD, before)
            yield
