from . import anatomy as anatomy
from . import atlas as atlas
from . import cli as cli
from . import corpus as corpus
from . import dropout as dropout
from . import graft as graft
from . import hooks as hooks
from . import instruments as instruments
from . import models as models
from . import page as page
from . import planning as planning
from . import rebuild as rebuild
from . import records as records
from . import report as report
from . import reversion as reversion
from . import scan as scan
from . import series as series
from . import stats as stats
from . import study as study
from . import tape as tape
from . import training as training
from . import wiring as wiring
from .models.loading import load as load
from .models.stack import Stack as Stack
from .stats.sampling import Sampling as Sampling
from .wiring.value import Wiring as Wiring

__version__: str
