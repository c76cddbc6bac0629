"""From series to parallel: fewer layers in a row, at a loss that the user allows and fresh texts confirm."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
