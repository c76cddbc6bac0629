"""Series: massive activations, coverage, the rotation null, matched sizes and LayerNorm, on networks and real text.

``rows`` is for ``benchmarks/validity.py``; tests take the small parts. The functions that need a pretrained model take
a stack and prompts, and are run by hand (``python benchmarks/simulations/series.py smollm2 TEXT``).
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery import Stack
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.windows import Reading, Sums, Units, record_entry_updates, record_stream, running_mean
from surgery.models.tokens import Tokens
from surgery.series import say, window
from surgery.stats.bootstrap import interval, ratio, weights
from surgery.stats.sampling import Sampling

ESTIMATE = Sampling(resamples=0)


def scaled(model: TransformerBridge, factor: float, attention: bool = True) -> TransformerBridge:
    """Multiply what the layers of a random network write; without ``attention``, only their MLPs write."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            short = name.replace("._original_component", "")
            if short.endswith("attn.o.weight"):
                weight.mul_(factor * attention)
            elif short.endswith("mlp.fc_out.weight"):
                weight.mul_(factor)
    return model


def random_networks(n_layers: int = 6, seeds: int = 1) -> Iterator[tuple[str, Stack]]:
    """Yield random networks with several activations, norms, update sizes, with and without attention."""
    for seed, act, norm, factor, attention in itertools.product(
        range(seeds), ("relu", "gelu"), ("RMS", "LN"), (0.1, 1.0, 5.0), (True, False)
    ):
        model = known_networks.random_network(n_layers, activation=act, norm=norm, seed=seed)
        yield f"{act} {norm} {factor} {attention} {seed}", Stack(scaled(model, factor, attention))


def null_readings(stacks: Iterator[tuple[str, Stack]]) -> pd.DataFrame:
    """Measure how far random networks read from the nulls, and what the sentences claim: a row per network."""
    tokens, rows = known_networks.tokens(48, 16), []
    fresh = Stack(known_networks.random_network(6, seed=99))
    for name, stack in stacks:
        frame = window.windows(stack, tokens, 3, damage=False, untrained=fresh, sampling=Sampling(resamples=100))
        later = frame[frame["start"] > 0]
        claims = pd.DataFrame([say.sides_of(row) for _, row in later.iterrows()])
        rows.append(
            {
                "network": name,
                "R_over_N": later["R_over_N"].mean(),
                "R_over_rotated": later["R_over_rotated"].mean(),
                "preference": later["preference"].mean(),
                "S": later["S"].mean(),
                "S_excess": later["S_excess"].mean(),
                "displaced": (later["R_over_N_low"] > 1).any(),
                "preferred": claims["preference"].isin(["above", "below"]).any(),
                "excess": claims["S"].isin(["above", "below"]).mean(),
            }
        )
    return pd.DataFrame(rows)


class Subset:
    """Sums of some prompts, with repetition, in place of all."""

    def __init__(self, sums: Sums, prompts: Int[Tensor, " prompt"]) -> None:
        self.sums, self.prompts = sums, prompts

    def __getitem__(self, key: tuple) -> Float[Tensor, " prompt"]:
        return self.sums[key][self.prompts]

    def total(self, *key: Any) -> Float[Tensor, "prompt d_model"]:
        return self.sums.total(*key)[self.prompts]


def coverage(
    stack: Stack,
    tokens: Tokens,
    starts: tuple[int, ...],
    sizes: tuple[int, ...] = (16, 64, 256),
    trials: int = 100,
    *,
    guarded: bool = True,
    draw: Callable[[int, int, int], Float[Tensor, "resample prompt"]] = weights,
) -> pd.DataFrame:
    """Count how often the interval of a sample of prompts holds the value of all of them: S, R/N and kappa.

    Samples are drawn with replacement, so that ``tokens`` are the population. A row per measure, start and size:
    ``covered`` among the ``trusted`` samples, those in which no token decides.
    """
    sampling = Sampling(batch_size=32, skip_massive=guarded)
    ensemble = Ensemble.of(stack, tokens, sampling)
    units, sums = Units.of(stack, "layer"), Sums()
    kept, products = [], {start: [] for start in starts}
    for _, context, mask in ensemble.batches(stack):
        stream = units.stream(context)
        sums.open(mask)
        record_stream(stream, sums)
        with stack.frozen(context):
            for start in starts:
                list(record_entry_updates(units, context, stream, start, 2, "frozen", sums))
                sums.square(stream[start + 1] - stream[start], "written", start, start + 1)
                product = ((stream[start + 1] - stream[start]) * stream[start]).sum(-1).masked_fill(~mask, 0)
                products[start].append(product.sum(1).double())
        kept.append(mask.sum(1))
    for parts in (sums.squares, sums.vectors):
        for key in parts:
            parts[key] = [torch.cat(parts[key])]  # once, for all samples
    inner = {start: torch.cat(parts) for start, parts in products.items()}
    count = torch.cat(kept).double()

    def measures(prompts: Tensor, draws: Tensor) -> dict[tuple[str, int], Tensor]:
        reading, found = Reading(Subset(sums, prompts), draws, units.reads, stack.dtype), {}  # type: ignore[arg-type]
        for start in starts:
            layers = units.after(start, 2)
            weight, entry_read, output = reading.dependence("frozen", start, layers)
            R = running_mean(entry_read, weight)[-1]
            found["S", start] = (R + output[-1]) / 2
            found["R/N", start] = ratio(R, running_mean(reading.displacement(start, layers), weight)[-1])
            x, u = reading.x[start], reading.x[start + 1] - reading.x[start]
            n = draws @ count[prompts]
            covariance = draws @ inner[start][prompts] / n - ((draws @ x) * (draws @ u)).sum(1) / n**2
            found["kappa", start] = -covariance / reading.norm(x, "stream", start) ** 2
        return found

    everyone = torch.arange(len(tokens))
    truth = {key: float(values[0]) for key, values in measures(everyone, draw(len(tokens), 0, 0)).items()}
    rows = []
    for size in sizes:
        hits: dict[tuple[str, int], list[bool]] = {key: [] for key in truth}
        for trial in range(trials):
            prompts = torch.from_numpy(np.random.default_rng((size, trial)).integers(len(tokens), size=size))
            for key, values in measures(prompts, draw(size, 200, trial)).items():
                _, low, high = interval(values)
                hits[key].append(low <= truth[key] <= high)
        rows += [
            {"measure": name, "start": start, "prompts": size, "covered": float(np.mean(values))}
            for (name, start), values in hits.items()
        ]
    return pd.DataFrame(rows).assign(guarded=guarded)


def drawing_all(n_prompts: int, resamples: int, seed: int) -> Float[Tensor, "resample prompt"]:
    """Draw as many prompts as there are: the bootstrap as it was."""
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=resamples)
    return torch.from_numpy(np.vstack([np.ones(n_prompts), draws]))


def chunks(stack: Stack, text: str, length: int, count: int) -> Tokens:
    """Cut a text into prompts of as many tokens each, without overlap."""
    ids = torch.tensor(stack.tokenizer(text)["input_ids"])
    rows = len(ids) // length
    return Tokens.of(ids[: min(rows, count) * length].reshape(-1, length))


if __name__ == "__main__":
    import pydoc_data.topics

    import surgery

    torch.set_num_threads(2)
    opened = Stack(surgery.load(sys.argv[1]))
    manual = "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    prompts = chunks(opened, manual, 24, int(sys.argv[2]))
    starts = tuple(int(start) for start in sys.argv[3:])
    for guarded, draw in ((True, weights), (False, drawing_all)):
        frame = coverage(opened, prompts, starts, guarded=guarded, draw=draw)
        table = frame.pivot_table(index="measure", columns="prompts", values="covered", aggfunc=["mean", "min", "max"])
        print(f"guarded {guarded}, {len(prompts)} prompts\n{table.round(3).to_string()}", flush=True)
