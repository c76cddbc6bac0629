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

Beside these a metric may be a function of your own (``surgery.scan.metrics``); higher is better.

Where the logits of a probe are not finite numbers (a stream that overflowed, a broken weight), every metric of it is
NaN, also those that only count first choices: the first choice among NaN is whatever comes first. A function of your
own is not called then.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.corpus.probes import Encoded
from surgery.instruments import readout
from surgery.models.half_precision import Layers
from surgery.models.stack import Stack
from surgery.scan import metrics as names
from surgery.scan.metrics import Metric, name_of
from surgery.scan.packing import Inputs
from surgery.wiring.value import Wiring


def check_metrics(metrics: Sequence[Metric], encoded: Encoded) -> None:
    """Raise ValueError as ``metrics.require``, and for ``choice`` on probes without choices."""
    names.require(metrics)
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
    """Scores the final streams of a portion of the probes.

    Args:
        layers: what runs the unmodified model for ``kl``: the stack, or its layers in half precision.

    Attributes:
        context: the sequences that run for the probes (``surgery.scan.packing``).
        at_once: how many wirings to read out together, so that the head is used well.

    Cost of making one: the embedding of the portion; with ``kl`` 1 F without the head.
    """

    def __init__(self, stack: Stack, encoded: Encoded, metrics: Sequence[Metric], layers: Layers | None = None) -> None:
        self.stack, self.encoded, self.metrics = stack, encoded, tuple(metrics)
        self.layers: Layers = stack if layers is None else layers
        inputs = Inputs.of(encoded)
        self.context = stack.context(inputs.tokens.to(stack.device))
        self._places = inputs.places.to(stack.device)
        self.at_once = max(1, readout.at_once(stack) // max(1, len(inputs.places)))
        scored = encoded.scored.cpu()
        share = scored.float() / scored.sum(1, keepdim=True) if encoded.credit is None else encoded.credit.cpu()
        order = inputs.place.argsort(stable=True)  # of the scored tokens: a chunk of places has a run of them
        self._place = inputs.place[order]
        self._targets = encoded.tokens.ids.cpu()[scored][order].to(stack.device)
        self._row = scored.nonzero()[:, 0][order]
        self._credit = share[scored].double()[order]
        self._right = np.array(encoded.choice) == 0
        by_row = scored.sum(1).tolist()
        self._answers = [  # of every probe's right answer, in the order of its tokens: the places, and the tokens
            answer
            for answer, right in zip(
                zip(inputs.place.split(by_row), encoded.tokens.ids.cpu()[scored].split(by_row)), self._right
            )
            if right
        ]
        self._unmodified: Tensor | None = None
        if "kl" in self.metrics:
            self._unmodified = self.final(self.layers.execute(":", self.context.x0, self.context))

    @property
    def prompts(self) -> tuple[int, ...]:
        """Indices of the portion's probes in their set."""
        return self.encoded.prompts

    @property
    def precision(self) -> str:
        """Of ``surgery.models.half_precision.PRECISIONS``, that of the layers."""
        return "float32" if self.layers is self.stack else "bf16"

    def final(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "place d_model"]:
        """What of a stream is read out: where it predicts an answer, every place once."""
        return x[self._places[:, 0], self._places[:, 1]]

    def rows(self, wiring: Wiring | str, x: Float[Tensor, "batch pos d_model"]) -> pd.DataFrame:
        """The scores of the stream ``x`` that ``wiring`` leaves: wiring, prompt, group, metric, value.

        Cost: the readout of the scored tokens; with ``kl`` twice that.
        """
        return self.tables([(wiring, self.final(x))])[0]

    def tables(self, finals: "Sequence[tuple[Wiring | str, Float[Tensor, 'place d_model']]]") -> list[pd.DataFrame]:
        """The scores of several wirings, read out together, as of ``rows``."""
        streams = torch.stack([final for _, final in finals])
        own = [metric for metric in self.metrics if not isinstance(metric, str)]
        values = self._values(streams) if len(own) < len(self.metrics) else {}
        values |= self._own_values(streams, own) if own else {}
        metrics = [name_of(metric) for metric in self.metrics]
        fixed = {
            "prompt": np.tile(np.array(self.prompts), len(metrics)),
            "group": list(self.encoded.groups) * len(metrics),
            "metric": np.repeat(metrics, len(self.prompts)),
        }
        return [
            pd.DataFrame(
                {"wiring": str(wiring)}
                | fixed
                | {"value": np.concatenate([values[metric][place] for metric in metrics])}
            )
            for place, (wiring, _) in enumerate(finals)
        ]

    def _values(self, finals: Float[Tensor, "wiring place d_model"]) -> dict[str, Float[np.ndarray, "wiring probe"]]:
        """Every built-in metric, a value per wiring and probe: that of its right answer."""
        parts = [self._read(finals, chunk, tokens) for chunk, tokens in self._chunks(len(finals))]
        log_p, missed, divergence = (torch.cat(part, 1).double().cpu() for part in zip(*parts, strict=True))
        n_rows = len(self.encoded.probe)

        def per_row(values: Tensor) -> Tensor:
            return torch.zeros(len(finals), n_rows, dtype=torch.float64).index_add_(1, self._row, values)

        loglik, wrong = per_row(log_p), per_row(missed)
        count = torch.bincount(self._row, minlength=n_rows)
        by_row = {
            "loglik": loglik,
            "exact": (wrong == 0).double().masked_fill(wrong.isnan(), math.nan),
            "credit": per_row((1 - missed) * self._credit),
            "loss": -loglik / count,
            "kl": per_row(divergence) / count,
        }
        values = {metric: of_rows.numpy()[:, self._right] for metric, of_rows in by_row.items()}
        if "choice" in self.metrics:
            values["choice"] = self._right_choices(loglik.numpy())
        return values

    def _own_values(
        self, finals: Float[Tensor, "wiring place d_model"], own: Sequence[Callable[..., Any]]
    ) -> dict[str, Float[np.ndarray, "wiring probe"]]:
        """The functions of the user, called for one wiring and probe at a time."""
        values = {name_of(function): np.full((len(finals), len(self._answers)), np.nan) for function in own}
        for probe, (places, targets) in enumerate(self._answers):
            targets = targets.to(finals.device)
            size = max(1, readout.at_once(self.stack) // len(places))
            for first in range(0, len(finals), size):
                some = finals[first : first + size, places.to(finals.device)]
                read = readout.log_probabilities(self.stack, some.flatten(0, 1)).unflatten(0, some.shape[:2])
                for wiring, log_p in enumerate(read, start=first):
                    if log_p.isnan().any():
                        continue
                    for function in own:
                        values[name_of(function)][wiring, probe] = _number(function, log_p, targets)
        return values

    def _chunks(self, n_wirings: int) -> Iterator[tuple[slice, slice]]:
        """Chunks of the places, and the run of scored tokens that each predicts."""
        size = max(1, readout.at_once(self.stack) // n_wirings)
        starts = range(0, len(self._places), size)
        edges = torch.searchsorted(self._place, torch.tensor([*starts, len(self._places)])).tolist()
        for start, (first, stop) in zip(starts, itertools.pairwise(edges), strict=True):
            yield slice(start, start + size), slice(first, stop)

    def _read(
        self, finals: Float[Tensor, "wiring place d_model"], chunk: slice, tokens: slice
    ) -> tuple[Float[Tensor, "wiring token"], Float[Tensor, "wiring token"], Float[Tensor, "wiring token"]]:
        """For the tokens that a chunk of places predicts: log-probability, 1 if not the first choice, divergence."""
        n_wirings, place = len(finals), (self._place[tokens] - chunk.start).to(self._targets.device)
        logits = readout.logits(self.stack, finals[:, chunk].flatten(0, 1))
        largest, total = readout.normaliser(logits)
        at = torch.arange(n_wirings, device=place.device)[:, None] * (len(logits) // n_wirings) + place
        target = logits[at, self._targets[tokens]]
        undefined = total.isnan()[at]
        log_p = (target - largest[at] - total.log()[at]).masked_fill(undefined, math.nan)
        missed = divergence = torch.zeros_like(log_p)
        if not {"exact", "credit"}.isdisjoint(self.metrics):
            first = target == largest[at]
            tied = first & (total[at] >= 2)  # perhaps: the largest has at most half of the probability
            first[tied] = logits[at[tied]].argmax(1) == self._targets[tokens].expand_as(at)[tied]
            missed = (~first).to(log_p).masked_fill(undefined, math.nan)
        if self._unmodified is not None:
            unmodified = readout.log_probabilities(self.stack, self._unmodified[chunk])
            p = unmodified.exp()  # what has probability 0 adds nothing, however unlikely it is otherwise
            by_place = torch.stack(
                [
                    (p * (unmodified - of_wiring.log_softmax(-1))).masked_fill(p == 0, 0).sum(1)
                    for of_wiring in logits.chunk(n_wirings)
                ]
            )
            divergence = by_place[:, place].masked_fill(undefined, math.nan)
        return log_p, missed, divergence

    def _right_choices(self, loglik: Float[np.ndarray, "wiring row"]) -> Float[np.ndarray, "wiring probe"]:
        """1 for every probe whose right choice is the likeliest, else 0; a tie is wrong, NaN among them is NaN."""
        probe, wrong = np.array(self.encoded.probe), np.array(self.encoded.choice) > 0
        others = np.full((len(self.encoded.groups), len(loglik)), -np.inf)
        np.maximum.at(others, probe[wrong], loglik.T[wrong])
        own = loglik[:, ~wrong]
        alone = ~np.isin(probe[~wrong], probe[wrong])
        return np.where(np.isnan(own) | np.isnan(others.T), np.nan, (own > others.T) | alone)


def _number(
    function: Callable[..., Any], log_p: Float[Tensor, "token d_vocab"], targets: Int[Tensor, " token"]
) -> float:
    """What a metric of the user says of one answer. Raises ValueError where that is no number."""
    value = function(log_p, targets)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"the metric {name_of(function)} must return one number for a probe, not {what}") from error
