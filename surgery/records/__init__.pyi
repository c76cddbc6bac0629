from . import checked as checked
from . import manifest as manifest
from . import tables as tables
