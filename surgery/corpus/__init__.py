"""Model inputs: the Babel language, probe sets, text files and bundled prompts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
