"""Residual-stream layer surgery on TransformerLens models: measure, rewire, rebuild.

``surgery.load`` opens a model, ``surgery.Stack`` takes it apart into ``embed -> layers -> readout``, ``surgery.Wiring``
says in which order its layers run. Everything else lives in a room of its own, named after what it is about:
``surgery.series.windows(stack, tokens)``. ``dir(surgery)`` lists the rooms, ``help(surgery.series)`` says what is in one.

Costs are given in F: one forward pass of the model over the batch.

Nothing is imported before it is used, so ``import surgery`` costs no torch.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
