"""A model opened exactly: loading, the stack of layers, the engines that run it, tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
