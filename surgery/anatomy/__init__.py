"""Question 3. Where are the borders between input translation, reasoning and output translation?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
