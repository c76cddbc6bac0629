"""Questions 4 to 6. Train a fresh middle between frozen ends; make it wider or narrower; walk in its input space."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
