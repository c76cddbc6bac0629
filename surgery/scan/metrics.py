"""What a scan can measure on each probe: built-in metrics by name, and functions of your own.

``surgery.scan.scores`` defines the built-in ones. No torch in here, so that the command line can list them.

A metric of your own is a function of one probe. It takes the log-probabilities at the scored tokens of the right answer
[token d_vocab] (float32 or float64, nats) and these tokens [token], and returns a number, higher being better:

>>> def rank(log_p, targets):
...     "How many words are likelier than the answer's first token, on a log scale; less is better, so it is negative."
...     return -(1 + (log_p[0] > log_p[0, targets[0]]).sum()).log()
>>> name_of(rank), name_of("loglik")
('rank', 'loglik')

Its name in the table is its ``__name__``. Its cost beside the built-in ones: one readout of the probe's scored tokens
and one call, per wiring and probe.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

MEANINGS = {
    "loglik": "sum of the log-probabilities of the answer's tokens, nats",
    "exact": "1 if every token of the answer is the first choice, else 0",
    "credit": "share of the answer whose tokens are the first choice",
    "loss": "mean over the scored tokens of -log p, nats; less is better",
    "kl": "mean over the scored tokens of KL(unmodified || wiring), nats; 0 is the unmodified model",
    "choice": "1 if the right choice is the likeliest, else 0; for probes with choices",
}
METRICS = tuple(MEANINGS)
Metric = str | Callable[..., Any]
_ANONYMOUS = "<lambda>"


def name_of(metric: Metric) -> str:
    """The name of a metric in a table."""
    return metric if isinstance(metric, str) else str(getattr(metric, "__name__", _ANONYMOUS))


def require(metrics: Sequence[Metric]) -> None:
    """Raise ValueError for a metric that there is none of, one without a name of its own, and a name given twice.

    >>> require(["loglik", lambda log_p, targets: 0.0])
    Traceback (most recent call last):
    ValueError: a metric of your own needs a name for the table, and a lambda has none: write it with def
    """
    for metric in metrics:
        name = name_of(metric)
        if isinstance(metric, str):
            if metric not in METRICS:
                raise ValueError(
                    f"there is no metric {metric!r}; there are {', '.join(METRICS)}, or a function of your own"
                )
        elif not callable(metric):
            raise ValueError(f"a metric is a name or a function, not a {type(metric).__name__}")
        elif name == _ANONYMOUS:
            what = "a lambda" if hasattr(metric, "__name__") else f"a {type(metric).__name__}"
            raise ValueError(f"a metric of your own needs a name for the table, and {what} has none: write it with def")
        elif name in METRICS:
            raise ValueError(f"your function {name} has the name of a built-in metric: give it another")
    names = [name_of(metric) for metric in metrics]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the metric {twice} is given twice; give every function a name of its own")


def identity(metric: Metric) -> str:
    """The name of a metric and, of a function, a hash of what it does: its source, defaults and enclosed values.

    Where there is no source, its bytecode. What it reads besides (globals, files, other functions) is not in the hash.
    """
    if isinstance(metric, str):
        return metric
    function = inspect.unwrap(metric) if inspect.isroutine(metric) else type(metric).__call__
    try:
        does = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        does = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(metric)
    cells = [_plain(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    given = [_plain(value) for value in getattr(function, "__defaults__", None) or ()]
    own = [] if inspect.isroutine(metric) else [_plain(value) for value in vars(metric).values()]
    return f"{name_of(metric)} {hashlib.sha256(repr((does, cells, given, own)).encode()).hexdigest()[:16]}"


def _plain(value: Any) -> str:
    """A value in full; an array's own text leaves out its middle."""
    return repr(value.tolist() if hasattr(value, "tolist") else value)
