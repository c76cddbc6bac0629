from . import babel as babel
from . import bundled as bundled
from . import parallel_sentences as parallel_sentences
from . import probes as probes
from . import questions as questions
from . import splits as splits
from . import text_files as text_files
