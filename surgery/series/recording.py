"""What is recorded of every window, one batch of prompts at a time: sums that can be stored, and joined later.

``Recording.sums`` is a function of the batch alone: a dictionary of tensors that ``torch.save`` keeps. So a long
measurement can be stopped between two batches, and ``surgery.series.window.frame`` makes the table of all of them.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> stack = Stack(known_networks.parallel_network(n_layers=3))
>>> recording = Recording.of(stack, known_networks.tokens(8, 6), sampling=Sampling(batch_size=4))
>>> [recording.sums(prompts)["frozen square"].shape for prompts in recording.batches]
[torch.Size([3, 4]), torch.Size([3, 4])]
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from surgery.instruments import losses
from surgery.instruments.ensemble import Ensemble, partner_places, partner_prompts
from surgery.instruments.readout import predicting_positions
from surgery.instruments.together import Together
from surgery.instruments.windows import (
    FORMS,
    Spans,
    Stream,
    Sums,
    Turns,
    Units,
    record_entry_updates,
    record_exchanged,
    record_stream,
    record_turned,
)
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.stats.sampling import Sampling

READOUT = 5  # layers that take as long as reading the words out, about
_HELD = 2**27  # numbers of the streams of windows in parallel that are under way at once


def _unseen(steps: int = 1) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Recording:
    """A measurement of windows that is under way: what to measure, and all that is drawn for it.

    ``damaged`` are the windows that also run in parallel, in each of ``forms``.
    """

    units: Units
    ensemble: Ensemble
    spans: Spans
    turns: Turns
    partner: Int[Tensor, " prompt"]
    damaged: frozenset[tuple[int, int]]
    forms: tuple[str, ...]
    matched: Units | None

    @classmethod
    def of(
        cls,
        stack: Stack,
        tokens: Ensemble | Tokens | Tensor,
        max_length: int | None = None,
        *,
        damage_length: int | None = None,
        forms: Sequence[str] = ("sum",),
        grain: str = "layer",
        untrained: Stack | None = None,
        sampling: Sampling = Sampling(),
    ) -> "Recording":
        """Prepare what ``surgery.series.windows`` measures, with its arguments; no ``forms``, no damage.

        Cost: 1 F, what it costs to find massive tokens and, with ``untrained``, 2 F of 16 prompts. Raises as
        ``surgery.series.windows`` does.
        """
        units = Units.of(stack, grain)
        longest = len(units) if max_length is None else max_length
        prompts = tokens.tokens if isinstance(tokens, Ensemble) else Tokens.of(tokens)
        require_measurable(units, prompts, longest, sampling.batch_size, sampling.skip_first)
        if unknown := [form for form in forms if form not in FORMS]:
            raise ValueError(f"layers in parallel are put together by {' or '.join(FORMS)}, not by {unknown[0]!r}")
        ensemble = Ensemble.of(stack, tokens, sampling)
        spans = Spans.of(len(units), longest)
        reach = longest if damage_length is None else damage_length
        return cls(
            units,
            ensemble,
            spans,
            Turns.of(units, ensemble),
            partner_prompts(ensemble.mask, np.random.default_rng((sampling.seed, 1))),
            frozenset((start, last) for start, last in spans.pairs if forms and last - start < reach),
            tuple(forms),
            None if untrained is None else units.matched(untrained, ensemble),
        )

    @property
    def batches(self) -> list[slice]:
        """The prompts of every batch."""
        ends = [0]
        for batch in self.ensemble.tokens.batches(self.ensemble.sampling.batch_size):
            ends.append(ends[-1] + len(batch))
        return [slice(first, stop) for first, stop in itertools.pairwise(ends)]

    @property
    def steps(self) -> int:
        """Number of steps that ``sums`` of one batch tells: layers run, and readouts as so many layers."""
        n_layers, a_layer = self.units.stack.n_layers, self.units.a_layer
        after = sum(n_layers - math.ceil((last + 1) / a_layer) + READOUT for _, last in self.damaged)
        return 4 * len(self.spans.pairs) + len(self.forms) * after

    @torch.no_grad()
    def sums(
        self, prompts: slice, advance: Callable[..., None] = _unseen
    ) -> dict[str, Shaped[Tensor, "place prompt ..."]]:
        """Return the sums of one batch, by name: see ``surgery.instruments.windows.Sums``.

        ``advance`` is called as ``steps`` are done. Cost of W windows in L layers: 3 + 4 W/L F, with damage as
        ``surgery.series.windows`` says and, with ``untrained``, 2 + W/L F. Memory: six times the stream of the batch,
        and that of up to 2^27 numbers of windows in parallel.
        """
        units, batch, mask = self.units, self.ensemble.tokens[prompts], self.ensemble.mask[prompts]
        together = Together(units.stack, units.stack.context(batch))
        stream, sums = units.stream(together.context), Sums(mask, self.spans, units.stack.dtype)
        record_stream(stream, sums)
        other, turn = self._partner_stream(prompts, mask, sums), self.turns.batch(prompts.start, mask)
        with units.stack.frozen(together.context):
            for layer, starts, _, alone in record_entry_updates(units, together, stream, "frozen", sums):
                record_turned(units, together, stream, layer, starts, alone, turn, sums)
                theirs = other[units.reads[layer]] - other[starts]
                record_exchanged("shuffled", units, together, stream, layer, starts, alone, theirs, sums)
                advance(3 * len(alone))
        for among in self._portions(stream[0].numel()):
            parallel = _Parallel(self, together, stream, among)
            for layer, some, updates, _ in record_entry_updates(units, together, stream, "live", sums, among):
                parallel.add(layer, some, updates)
                advance(len(updates))
            parallel.record_damage(sums, advance)
        if self.forms:
            sums.put("predictions", 1, 0, predicting_positions(batch).sum(1, dtype=torch.float64)[None])
        return sums.tensors | self._matched_sums(batch, mask)

    def _partner_stream(
        self, prompts: slice, mask: Bool[Tensor, "batch pos"], sums: Sums
    ) -> Float[Tensor, "place token d_model"]:
        """Return, for each measured token, the stream at its place in the partner. Cost: 1 F."""
        partner = self.partner[prompts]
        theirs = self.units.stream(self.units.stack.context(self.ensemble.tokens[partner]))
        return theirs[:, sums.owner, partner_places(mask, self.ensemble.mask[partner])[mask]]

    def _matched_sums(self, batch: Tokens, mask: Bool[Tensor, "batch pos"]) -> dict[str, Tensor]:
        """Return what S of the untrained model rests on, its updates matched. Cost: 2 F, and 1/L F a window."""
        if self.matched is None:
            return {}
        units = self.matched
        together = Together(units.stack, units.stack.context(batch))
        stream, sums = units.stream(together.context), Sums(mask, self.spans, units.stack.dtype)
        record_stream(stream, sums)
        with units.stack.frozen(together.context, units.norm_state(together.context)):
            for _ in record_entry_updates(units, together, stream, "frozen", sums):
                pass
        return {f"matched {name}": values for name, values in sums.tensors.items()}

    # --- windows in parallel -----------------------------------------------------------------------------------------

    def _portions(self, size: int) -> Iterator[range]:
        """Yield starts whose windows in parallel fit into memory, where a stream takes ``size`` numbers."""
        n_starts = len(self.units) - 1
        most = max((sum(start == a for a, _ in self.damaged) for start in range(n_starts)), default=0)
        count = n_starts if not most else max(1, _HELD // (most * len(self.forms) * size))
        for first in range(0, n_starts, count):
            yield range(first, min(first + count, n_starts))


class _Parallel:
    """Windows run in parallel on one batch, from a few starts: their streams, and where each enters the rest."""

    def __init__(
        self, recording: Recording, together: Together, stream: Float[Tensor, "place batch pos d_model"], starts: range
    ) -> None:
        self.recording, self.together, self.stream = recording, together, stream
        self.written = {start: stream[start + 1] - stream[start] for start in starts} if recording.damaged else {}
        self.waiting: defaultdict[int, list[tuple[str, int, Stream]]] = defaultdict(list)

    def add(self, layer: int, starts: slice, updates: list[Stream]) -> None:
        """Add what ``layer`` writes on the entry of windows; those that end with it leave for the rest of the model."""
        for start, update in zip(range(starts.start, starts.stop), updates, strict=True):
            if (start, layer) not in self.recording.damaged:
                continue
            self.written[start] = self.written[start] + update
            for form in self.recording.forms:
                share = 1 / (layer + 1 - start) if form == "mean" else 1.0
                x = self.stream[start] + share * self.written[start]
                place, x = self.recording.units.to_layer(layer + 1, x, x - share * update, self.together.context)
                self.waiting[place].append((form, self.recording.spans.row[start, layer], x))

    def record_damage(self, sums: Sums, advance: Callable[..., None]) -> None:
        """Let the rest of the model follow, and record how much worse than the clean run it predicts."""
        tokens = self.together.context.tokens
        entering_at = {layer: [x for _, _, x in entering] for layer, entering in self.waiting.items()}
        finals = self.together.ride(entering_at, advance)
        if not finals:
            return
        finals = [losses.predicted(x, predicting_positions(tokens)) for x in finals]
        measured = losses.by_prompt(self.recording.units.stack, tokens, self.stream[-1], finals)
        advance(READOUT * len(finals))
        windows = [(form, row) for _, entering in sorted(self.waiting.items()) for form, row, _ in entering]
        for (form, row), of_prompts in zip(windows, measured.unbind(1), strict=True):
            for kind, values in zip(("loss", "kl"), of_prompts, strict=True):
                sums.put(f"{kind} {form}", len(self.recording.spans.pairs), row, values[None])


def require_measurable(units: Units, tokens: Tokens, longest: int, batch_size: int, skip_first: bool) -> None:
    """Raise ValueError for what no window can be measured of."""
    if len(units) < 2:
        raise ValueError(f"{units.stack.name} has one layer; a window needs two")
    if longest < 2:
        raise ValueError(
            f"a window has at least two layers: max_length must be 2 to {len(units)} or None, got {longest}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if int(tokens.ensemble(skip_first).sum()) < 2:
        first = ", each prompt's first left out" if skip_first else ""
        raise ValueError(
            f"there are fewer than two tokens to compare in these prompts{first}; give longer or more prompts"
        )
