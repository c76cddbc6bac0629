from . import frontier as frontier
from . import rivals as rivals
from . import search as search
from . import speed as speed
from .frontier import Halves as Halves
from .frontier import measure as measure
