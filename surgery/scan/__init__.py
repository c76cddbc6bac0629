"""Question 4. What does running layers again, or skipping, swapping or joining them, do?"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
