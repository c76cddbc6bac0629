"""Train on stored activations: the loop, the ledger of operations, harvesting, regions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
