"""Uncertainty: the bootstrap over prompts, corrected comparisons, drift, panels, change points. No model code."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
