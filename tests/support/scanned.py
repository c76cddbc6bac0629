"""The table of a scan, from numbers; and numbers without effect."""

import numpy as np
import pandas as pd


def scan(d, groups=None, metric="loglik", baseline=-3.0):
    """The table of a scan whose values lie ``d`` [wiring, prompt] above the baseline."""
    d = np.asarray(d, dtype=float)
    wirings, prompts = d.shape
    return pd.DataFrame(
        {
            "wiring": np.repeat([f":{place + 2} 1:" for place in range(wirings)], prompts),
            "prompt": np.tile(np.arange(prompts), wirings),
            "group": np.tile([""] * prompts if groups is None else groups, wirings),
            "metric": metric,
            "value": baseline + d.ravel(),
            "baseline": baseline,
        }
    )


def correlated(rng, wirings, prompts):
    """No effect: noise that wirings share to half, prompts of very different spread."""
    shared, own = rng.normal(size=prompts), rng.normal(size=(wirings, prompts))
    return (shared + own) * np.exp(rng.normal(size=prompts))
