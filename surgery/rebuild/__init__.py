"""Make a change permanent: taped wirings, new layouts, wider or narrower blocks, checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
