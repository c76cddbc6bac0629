from . import averaging as averaging
from . import checkpoint as checkpoint
from . import layout as layout
from . import passes as passes
from . import tape as tape
from . import units as units
from . import weights as weights
from . import width as width
