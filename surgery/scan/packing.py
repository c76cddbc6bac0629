"""What of a probe set has to run: no padding, nothing twice, and nothing after the last token that predicts an answer.

A causal model gives a token the same stream whatever follows it. So of every sequence the last scored token is left
out, since nothing is read from it; and a sequence that then equals another, or begins it, is not run: choices of one
token cost what a single one of them does. What is left runs in portions of like length.

>>> from surgery import Stack, models
>>> from surgery.corpus.probes import Probe, ProbeSet
>>> asked = ProbeSet("two", (Probe("p3 >other", "o2", choices=("o1", "o2")), Probe("p1 p2 >plain", "p2")))
>>> inputs = Inputs.of(asked.encode(Stack(models.load("babel"))))
>>> len(asked.encode(Stack(models.load("babel"))).tokens), inputs.tokens.mask.sum(1).tolist(), inputs.places.tolist()
(3, [3, 4], [[0, 2], [1, 3]])
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from surgery.corpus.probes import Encoded
from surgery.models.tokens import Tokens, padded


@dataclass(frozen=True)
class Inputs:
    """The sequences that run for a probe set, on the CPU, padded on the right.

    Attributes:
        tokens: the sequences.
        row: for every row of the probe set, the sequence that begins with it.
        places: sequence and position of every token whose logits are read, ascending.
        place: for every scored token of the probe set, row by row, which of the places predicts it.
    """

    tokens: Tokens
    row: tuple[int, ...]
    places: Int[Tensor, "place 2"]
    place: Int[Tensor, " scored"]

    @classmethod
    def of(cls, encoded: Encoded) -> "Inputs":
        ids, mask, scored = (part.cpu() for part in (encoded.tokens.ids, encoded.tokens.mask, encoded.scored))
        answers = [row[real].nonzero().flatten().tolist() for row, real in zip(scored, mask)]
        needed = [tuple(row[real].tolist()[: max(after, default=1)]) for row, real, after in zip(ids, mask, answers)]
        whole = _whole(needed)
        kept = list(dict.fromkeys(whole[begins] for begins in needed))
        number = {sequence: n for n, sequence in enumerate(kept)}
        row = tuple(number[whole[begins]] for begins in needed)
        read = [(sequence, at - 1) for sequence, after in zip(row, answers) for at in after]
        places, place = torch.tensor(read, dtype=torch.long).reshape(-1, 2).unique(dim=0, return_inverse=True)
        return cls(padded(kept, 0, 1), row, places, place)

    def sizes(self, encoded: Encoded) -> tuple[list[int], list[int]]:
        """For every probe: how many sequences run for it, and the length of the longest."""
        lengths = self.tokens.mask.sum(1).tolist()
        sequences: list[set[int]] = [set() for _ in encoded.groups]
        for probe, row in zip(encoded.probe, self.row, strict=True):
            sequences[probe].add(row)
        return [len(own) for own in sequences], [max(lengths[row] for row in own) for own in sequences]


def _whole(sequences: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """For each sequence, the one among them that begins with it and is begun by no other."""
    whole: dict[tuple[int, ...], tuple[int, ...]] = {}
    after: tuple[int, ...] = ()
    for sequence in sorted(set(sequences), reverse=True):  # what begins like a sequence comes right after it in order
        whole[sequence] = whole[after] if after[: len(sequence)] == sequence else sequence
        after = sequence
    return whole


def portions(
    counts: Sequence[int], lengths: Sequence[int], most_tokens: int, most_probes: int, fixed: float
) -> list[list[int]]:
    """Probes of like length, by index, so that padding and the cost of portions are least together.

    Args:
        counts, lengths: sequences of each probe, and the tokens of the longest.
        most_tokens: in a portion, with its padding; one of a single probe may have more.
        most_probes: in a portion.
        fixed: what a portion costs besides its tokens, in tokens.

    >>> portions([1] * 5, [9, 3, 9, 4, 3], 100, 100, fixed=2), portions([1] * 5, [9, 3, 9, 4, 3], 100, 100, fixed=99)
    ([[1, 4, 3], [0, 2]], [[1, 4, 3, 0, 2]])
    """
    order = sorted(range(len(lengths)), key=lambda probe: (lengths[probe], probe))
    sizes = np.array(counts)[order]
    parts = []
    for first, stop in _alike(np.array(lengths)[order], sizes, fixed):
        tokens = int(sizes[first:stop].sum()) * lengths[order[stop - 1]]
        count = max(-(-tokens // max(most_tokens, 1)), -(-(stop - first) // most_probes))
        edges = np.linspace(first, stop, min(stop - first, count) + 1).round().astype(int)
        parts += [order[a:b] for a, b in itertools.pairwise(edges)]
    return parts


def _alike(
    lengths: Int[np.ndarray, " probe"], counts: Int[np.ndarray, " probe"], fixed: float
) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs whose cost, each ``fixed`` and its sequences times its longest, is least."""
    stops = np.append(np.flatnonzero(np.diff(lengths)) + 1, len(lengths))
    before = np.concatenate([[0], np.cumsum(counts)[stops - 1]])  # sequences in front of every length
    least, begins = np.zeros(len(stops) + 1), np.zeros(len(stops) + 1, dtype=int)
    for n, longest in enumerate(lengths[stops - 1], start=1):
        costs = least[:n] + (before[n] - before[:n]) * longest + fixed
        begins[n] = costs.argmin()
        least[n] = costs[begins[n]]
    edges, runs, stop = [0, *stops.tolist()], [], len(stops)
    while stop:
        runs.append((edges[begins[stop]], edges[stop]))
        stop = begins[stop]
    return runs[::-1]
