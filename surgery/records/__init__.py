"""Results on disk: tables with documented columns, each beside a manifest of where it came from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
