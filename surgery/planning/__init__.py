"""What a study costs on this machine, and what of it fits into a budget of time and memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
