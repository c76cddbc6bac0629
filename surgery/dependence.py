"""What ``surgery.series`` keeps of the activations, per-prompt sums, and how its measures follow from them."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from surgery.stats import Moments

Stream = Float[Tensor, "batch pos d_model"]
Resampled = Float[Tensor, " resample"]


class Sums:
    """Per-prompt sums over the ensemble, by name: all that is kept of a batch's activations.

    The vector sums of x_l, p_l and q_l give those of all updates and differences; squares do not add up: each is
    kept.
    """

    def __init__(self) -> None:
        self.squares: defaultdict[tuple, list[Tensor]] = defaultdict(list)
        self.vectors: defaultdict[tuple, list[Tensor]] = defaultdict(list)

    def open(self, keep: Bool[Tensor, "batch pos"]) -> None:
        """The ensemble of the next batch."""
        self.dropped = ~keep.unsqueeze(-1)
        self.add(keep.sum(1), "count")

    def add(self, per_prompt: Float[Tensor, " batch"] | Int[Tensor, " batch"], *key: Any) -> None:
        self.squares[key].append(per_prompt.double().cpu())

    def square(self, values: Stream, *key: Any) -> None:
        kept = values.masked_fill(self.dropped, 0)
        self.add(torch.linalg.vector_norm(kept, dim=(1, 2), dtype=torch.float64) ** 2, *key)

    def vector(self, values: Stream, *key: Any) -> None:
        self.square(values, *key)
        self.vectors[key].append(values.masked_fill(self.dropped, 0).sum(1, dtype=torch.float64).cpu())

    def __getitem__(self, key: tuple) -> Float[Tensor, " prompt"]:
        return torch.cat(self.squares[key])

    def total(self, *key: Any) -> Float[Tensor, "prompt d_model"]:
        return torch.cat(self.vectors[key])


class Reading:
    """The measures of all windows from one start, under every row of ``draws``: tensors [layer, resample].

    ``layer`` counts the units of a window, layers or sublayers; ``reads`` says where in the stream each of them reads.
    """

    def __init__(
        self, sums: Sums, draws: Float[Tensor, "resample prompt"], reads: Sequence[int], dtype: torch.dtype
    ) -> None:
        self.sums, self.draws, self.reads, self.dtype = sums, draws, reads, dtype
        self.x = [sums.total("stream", place) for place in range(len(reads) + 1)]
        if not all(total.isfinite().all() for total in self.x):
            raise ValueError(f"the stream is not finite on these prompts: its numbers overflow {dtype}")

    def norm(self, total: Float[Tensor, "prompt d_model"], *key: Any) -> Resampled:
        """``n(c(.))`` of the vectors whose squares are under ``key`` and whose sums are ``total``."""
        return Moments(self.sums["count",], total, total, self.sums[key]).norm(self.draws)

    def size(self, *key: Any) -> Resampled:
        """``n(.)``, not centred."""
        return (self.draws @ self.sums[key] / (self.draws @ self.sums["count",])).sqrt()

    def measures(self, start: int, layers: range, damage: bool) -> dict[str, Float[Tensor, "layer resample"]]:
        weight, entry_read, output = self.dependence("frozen", start, layers)
        weight_live, entry_read_live, output_live = self.dependence("live", start, layers)
        displacement, shuffled = self.nulls(start, layers)
        found = {"R": _average(entry_read, weight), "O": output}
        found["S"] = (found["R"] + found["O"]) / 2
        found |= {"R_live": _average(entry_read_live, weight_live), "O_live": output_live}
        found["S_live"] = (found["R_live"] + found["O_live"]) / 2
        found["layernorm_share"] = found["S_live"] - found["S"]
        found["N"] = _average(displacement, weight)
        found["R_over_N"] = torch.where(found["N"] > 0, found["R"] / found["N"], torch.nan)
        found["R_shuffled"] = (
            _average(shuffled, weight) if self.draws.shape[1] > 1 else torch.full_like(output, torch.nan)
        )
        if damage:
            count = self.draws @ self.sums["predictions",]
            for kind, form in itertools.product(("loss", "kl"), ("sum", "mean")):
                nats = [self.draws @ self.sums[kind, form, start, layer + 1] / count for layer in layers]
                found[f"{kind}_parallel_{form}"] = torch.stack(nats)
        return found

    def dependence(self, norms: str, start: int, layers: range) -> tuple[Tensor, Tensor, Tensor]:
        """``w_l`` and ``R_l`` of every layer, and O of the window that ends with it."""
        x, weight, entry_read, output = self.x, [], [], []
        together = torch.zeros_like(x[0])
        for layer in layers:
            update, serial = x[layer + 1] - x[layer], x[layer + 1] - x[start + 1]
            alone = self.sums.total(norms, start, layer)
            together = together + alone
            n_update, n_alone = self.norm(update, "update", layer), self.norm(alone, norms, start, layer)
            n_serial = self.norm(serial, norms, "serial", start, layer)
            n_together = self.norm(together, norms, "together", start, layer)
            entry_read.append(self.norm(update - alone, norms, "effect", start, layer) / (n_update + n_alone))
            output.append(self.norm(serial - together, norms, "error", start, layer) / (n_serial + n_together))
            # Dead is a layer whose writes vary less than the stream they are added to, or the moments, are rounded.
            rounding = torch.finfo(self.dtype).eps * self.size("stream", layer + 1)
            rounding = rounding + 1e-7 * (self.size("update", layer) + self.size(norms, start, layer))
            energy = n_update**2 + n_alone**2
            weight.append(torch.where(energy > rounding**2, energy, 0))
        weights = torch.stack(weight)
        return weights, torch.stack(entry_read), torch.where(weights.cumsum(0) > 0, torch.stack(output), torch.nan)

    def nulls(self, start: int, layers: range) -> tuple[Tensor, Tensor]:
        """``N_l``, and ``R_l`` with the written content shuffled."""
        x, displacement, shuffled = self.x, [], []
        size = {place: self.norm(x[place], "stream", place) for place in (start, *map(self.reads.__getitem__, layers))}
        for layer in layers:
            read = self.reads[layer]
            moved = self.norm(x[read] - x[start], "written", start, layer)
            displacement.append(moved / (size[read] + size[start]))
            alone, other = self.sums.total("frozen", start, layer), self.sums.total("shuffled", start, layer)
            scale = self.norm(other, "shuffled", start, layer) + self.norm(alone, "frozen", start, layer)
            shuffled.append(self.norm(other - alone, "shuffled effect", start, layer) / scale)
        return torch.stack(displacement), torch.stack(shuffled)


def _average(
    values: Float[Tensor, "layer resample"], weights: Float[Tensor, "layer resample"]
) -> Float[Tensor, "layer resample"]:
    """Weighted mean over the layers so far, for the window that ends with each; NaN while all of them are dead."""
    return torch.where(weights > 0, values * weights, 0).cumsum(0) / weights.cumsum(0)
