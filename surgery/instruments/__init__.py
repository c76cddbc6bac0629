"""What several questions share: read a stream out, take layers away, push it, compare it, run it in parallel."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
