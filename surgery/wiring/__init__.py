"""The order in which layers run: an immutable value, its notation, the families a scan tries, other tools' formats.

Nothing in this room imports torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
