from . import checked as checked
from . import kept as kept
from . import manifest as manifest
from . import tables as tables
