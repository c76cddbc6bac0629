"""Question 1. To what degree do layers work in series or in parallel?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
