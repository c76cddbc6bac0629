"""What is scored when a stream leaves the last layer: the metrics of every probe.

========  ==========================================================================  ========================
metric    value, per probe                                                            better
========  ==========================================================================  ========================
loglik    sum of the log-probabilities of the answer's tokens, nats                   higher
exact     1 if every token of the answer is the first choice (greedy), else 0         higher
credit    the share of the answer whose tokens are the first choice                   higher
loss      mean over the scored tokens of -log p, nats                                 lower
kl        mean over the scored tokens of KL(unmodified || wiring), nats               0 is the unmodified model
choice    1 if the right choice has the highest loglik (probes with choices), else 0  higher
========  ==========================================================================  ========================

Where the logits of a probe are not finite numbers (a stream that overflowed, a broken weight), every metric of it is
NaN, also those that only count first choices: the first choice among NaN is whatever comes first.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery.corpus.probes import Encoded
from surgery.instruments import readout
from surgery.models.stack import Stack
from surgery.scan.metrics import METRICS
from surgery.wiring.value import Wiring


def check_metrics(metrics: Sequence[str], encoded: Encoded) -> None:
    """Raise ValueError for a metric that there is none of, and for ``choice`` on probes without choices."""
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if "choice" in metrics and max(encoded.choice) == 0:
        raise ValueError("the metric 'choice' needs probes with choices, and these have none")


def predicting(scored: Bool[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
    """Mark the positions whose logits predict a scored token: the one before each.

    >>> predicting(torch.tensor([[False, False, True, True]])).tolist()
    [[False, True, True, False]]
    """
    positions = torch.zeros_like(scored)
    positions[:, :-1] = scored[:, 1:]
    return positions


class Scorer:
    """Scores the final streams of a portion of the probes, which starts with probe ``first`` of its set.

    Cost of making one: the embedding of the portion; with ``kl`` 1 F without the head.
    """

    def __init__(self, stack: Stack, encoded: Encoded, metrics: Sequence[str], first: int = 0) -> None:
        self.stack, self.encoded, self.metrics, self.first = stack, encoded, tuple(metrics), first
        self.context = stack.context(encoded.tokens.to(stack.device))
        scored = encoded.scored.to(stack.device)
        self._predicting = predicting(scored)
        self._targets = encoded.tokens.ids.to(stack.device)[scored]
        self._row = scored.nonzero()[:, 0].cpu()
        share = scored.float() / scored.sum(1, keepdim=True) if encoded.credit is None else encoded.credit
        self._credit = share.to(stack.device)[scored].double().cpu()
        self._unmodified = stack.stream(self.context)[-1][self._predicting] if "kl" in self.metrics else None

    @property
    def prompts(self) -> range:
        """Indices of the portion's probes in their set."""
        return range(self.first, self.first + len(self.encoded.groups))

    def rows(self, wiring: Wiring | str, x: Float[Tensor, "batch pos d_model"]) -> pd.DataFrame:
        """The scores of the stream ``x`` that ``wiring`` leaves: wiring, prompt, group, metric, value.

        Cost: the readout of the scored tokens; with ``kl`` twice that.
        """
        values = self._values(x)
        columns = {
            "wiring": str(wiring),
            "prompt": np.tile(np.array(self.prompts), len(self.metrics)),
            "group": list(self.encoded.groups) * len(self.metrics),
            "metric": np.repeat(self.metrics, len(self.prompts)),
            "value": np.concatenate([values[metric] for metric in self.metrics]),
        }
        return pd.DataFrame(columns)

    def _values(self, x: Tensor) -> dict[str, Float[np.ndarray, " probe"]]:
        """Every metric, a value per probe: that of its right answer."""
        loglik = torch.zeros(len(self.encoded.probe), dtype=torch.float64)
        wrong, credit, divergence = (torch.zeros_like(loglik) for _ in range(3))
        final = x[self._predicting]
        for chunk in readout.portions(self.stack, final):
            log_p = readout.log_probabilities(self.stack, final[chunk])
            places, targets = chunk.cpu(), self._targets[chunk]
            row = self._row[places]
            loglik.index_add_(0, row, log_p.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu())
            undefined = log_p.isnan().any(1)
            missed = (log_p.argmax(1) != targets).double().masked_fill(undefined, math.nan).cpu()
            wrong.index_add_(0, row, missed)
            credit.index_add_(0, row, (1 - missed) * self._credit[places])
            if self._unmodified is not None:
                unmodified = readout.log_probabilities(self.stack, self._unmodified[chunk])
                p = unmodified.exp()  # what has probability 0 adds nothing, however unlikely it is otherwise
                terms = (p * (unmodified - log_p)).masked_fill(p == 0, 0)
                divergence.index_add_(0, row, terms.sum(1).double().masked_fill(undefined, math.nan).cpu())
        count = torch.bincount(self._row, minlength=len(loglik))
        right = np.array(self.encoded.choice) == 0
        values = {
            "loglik": loglik.numpy()[right],
            "exact": (wrong == 0).double().masked_fill(wrong.isnan(), math.nan).numpy()[right],
            "credit": credit.numpy()[right],
            "loss": (-loglik / count).numpy()[right],
            "kl": (divergence / count).numpy()[right],
        }
        if "choice" in self.metrics:
            values["choice"] = self._right_choices(loglik.numpy())
        return values

    def _right_choices(self, loglik: np.ndarray) -> np.ndarray:
        """1 for every probe whose right choice is the likeliest, else 0; a tie is wrong, NaN among them is NaN."""
        rows = pd.DataFrame({"probe": self.encoded.probe, "choice": self.encoded.choice, "loglik": loglik})
        rows = rows.sort_values(["probe", "loglik", "choice"], ascending=[True, False, False])
        by_probe = rows.groupby("probe")
        right = (by_probe["choice"].first() == 0).astype(float)
        return right.where(by_probe["loglik"].count() == by_probe["loglik"].size()).to_numpy()
