"""Residual-stream layer surgery on TransformerLens models: measure, rewire, rebuild.

``surgery.load`` opens a model, ``surgery.Stack`` takes it apart into ``embed -> layers -> readout``,
``surgery.Wiring`` says in which order its layers run. Everything else lives in a room of its own, named after what it
is about: ``surgery.series.windows(stack, tokens)``. ``dir(surgery)`` lists the rooms; ``help(surgery.series)`` says
what is in one.

Costs are given in F: one forward pass of the model over the batch.

Nothing is imported before it is used, so ``import surgery`` costs no torch.
"""

from typing import Any

import lazy_loader

from surgery import moved, notebook

__version__ = "0.1.0"
_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
moved.put_up()
notebook.show_figures()


def __getattr__(name: str) -> Any:
    if name in moved.MOVED:
        raise AttributeError(moved.advice(name))
    try:
        return _attribute(name)
    except AttributeError:
        raise AttributeError(f"surgery has no {name!r}; it has {', '.join(__all__)}") from None
