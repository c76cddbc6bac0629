"""Series: massive activations, coverage, the rotation null, matched sizes and LayerNorm, on networks and real text.

``rows`` is for ``benchmarks/validity.py``; tests take the small parts. The functions that need a pretrained model take
a stack and prompts, and are run by hand (``python benchmarks/simulations/series.py smollm2 TEXT``).
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery import Stack
from surgery.instruments import known_networks
from surgery.instruments.ensemble import Ensemble
from surgery.instruments.together import Together
from surgery.instruments.windows import (
    Reading,
    Spans,
    Sums,
    Units,
    merged,
    record_entry_updates,
    record_stream,
    running_mean,
)
from surgery.models.tokens import Tokens
from surgery.reversion import kappa
from surgery.series import say, window
from surgery.stats.bootstrap import interval, ratio, weights
from surgery.stats.sampling import Sampling

ESTIMATE = Sampling(resamples=0)

# Read before on the same networks: S while the mean that a LayerNorm subtracts was not frozen, by constructed network,
# and the change of R_shuffled with the size of batches when prompts were exchanged within a batch only.
LAYERNORM_BEFORE = {"parallel": ".02 to .15", "serial": ".65 to .99"}
BATCHES_BEFORE = 0.14
ROGUE_BEFORE = "89 % (Gemma 3)"  # tokens left out when whole dimensions are large and each token is judged by itself

# On SmolLM2-135M-Instruct (Q4_1, float32), by hand. Coverage: this file on 480 chunks of 24 tokens of Python's manual,
# layers 3, 9 and 20, 100 samples each, so that the mean over layers has a standard error of about .02. The others: 24
# stories of 200 letters, 1,178 tokens, with ``skip_massive=False`` and as it is; S and R/N are of a layer and the next.
SMOLLM2 = "SmolLM2-135M"
MANUAL = {"S": (0.940, 0.950, 0.953), "R/N": (0.940, 0.923, 0.917), "kappa": (0.937, 0.943, 0.913)}
STORIES = {
    "kappa of layer 9": (0.224, 0.015),
    "S of layers 10 and 11": (0.738, 0.419),
    "R/N of layers 3 and 4": (4.17, 2.16),
}
REAL_TEXT = [
    {
        "point": "massive activations",
        "case": f"{case}, {SMOLLM2}",
        "nominal": "not of 29 tokens",
        "before": old,
        "after": new,
    }
    for case, (old, new) in STORIES.items()
] + [
    {
        "point": "few prompts",
        "case": f"coverage of {name}, {SMOLLM2}, 16, 64 and 256 prompts",
        "nominal": "0.90 to 0.98",
        "before": "0.09 to 0.27 with one massive token" if name == "R/N" else "not measured",
        "after": ", ".join(f"{share:.2f}" for share in covered),
    }
    for name, covered in MANUAL.items()
]


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


def one_batch(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the sums of batches as if they were one, so that prompts can be drawn from all of them."""
    sums = merged(parts)
    batches = torch.repeat_interleave(torch.arange(sums["batch"].numel()), sums["batch"][0])
    for name in [name for name in sums if name.endswith(" base")]:
        base, vectors = sums[name], name.replace(" base", " sum")
        sums[vectors] = sums[vectors].double() + sums["count"].unsqueeze(-1) * base[:, batches]
        sums[name] = torch.zeros_like(base[:, :1])
    return {name: values for name, values in sums.items() if name != "batch"}


def subset(sums: dict[str, Tensor], prompts: Int[Tensor, " prompt"]) -> dict[str, Tensor]:
    """Sums of some prompts, with repetition, in place of all."""
    chosen = {name: values if name.endswith(" base") else values[:, prompts] for name, values in sums.items()}
    return chosen | {"batch": torch.tensor([[len(prompts)]])}


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
    units, spans, batches = Units.of(stack, "layer"), Spans.of(stack.n_layers, 2), []
    kept, products = [], {start: [] for start in starts}
    for _, context, mask in ensemble.batches(stack):
        together, stream, sums = Together(stack, context), units.stream(context), Sums(mask, spans, stack.dtype)
        record_stream(stream, sums)
        with stack.frozen(context):
            for start in starts:
                among, x = range(start, start + 1), sums.x
                list(record_entry_updates(units, together, stream, "frozen", sums, among))
                sums.squares("written", start + 1, slice(start, start + 1), (x[start + 1] - x[start])[None])
                product = ((stream[start + 1] - stream[start]) * stream[start]).sum(-1).masked_fill(~mask, 0)
                products[start].append(product.sum(1).double())
        batches.append(sums.tensors)
        kept.append(mask.sum(1))
    joined = one_batch(batches)
    inner = {start: torch.cat(parts) for start, parts in products.items()}
    count = torch.cat(kept).double()

    def measures(prompts: Tensor, draws: Tensor) -> dict[tuple[str, int], Tensor]:
        reading, found = Reading(subset(joined, prompts), spans, draws, units.reads, stack.dtype), {}
        for start in starts:
            layers = units.after(start, 2)
            weight, entry_read, output = reading.dependence("frozen", start, layers)
            R = running_mean(entry_read, weight)[-1]
            found["S", start] = (R + output[-1]) / 2
            found["R/N", start] = ratio(R, running_mean(reading.displacement(start, layers), weight)[-1])
            x, u = reading.x[start], reading.x[start + 1] - reading.x[start]
            n = draws @ count[prompts]
            covariance = draws @ inner[start][prompts] / n - (x * u).sum(1)
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


def rows(quick: bool = False) -> list[dict]:
    """Every simulation of networks, and what runs on real text have read; a few minutes in full."""
    networks = itertools.islice(random_networks(), 2 if quick else None)
    read = null_readings(networks)
    return [
        *_guard(),
        *_rotation(read),
        *_sizes(read),
        *_layernorm(2 if quick else 8),
        *_intervals(200 if quick else 2000),
        *_batches(),
        *REAL_TEXT,
    ]


def _row(point: str, case: str, nominal: object, before: object, after: object) -> dict:
    return {"point": point, "case": case, "nominal": nominal, "before": before, "after": after}


def _range(values: pd.Series) -> str:
    low, high = (f"{end:.2f}" for end in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def massive_network(times: float, share: float = 0.02) -> Stack:
    """Build a random network without attention in which some tokens carry a number ``times`` the median magnitude."""
    model = scaled(known_networks.random_network(4, norm=None, seed=1), 1, attention=False)
    if times:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "tok_embed" in name:
                    weight[:: round(1 / share), 3] = times * weight.abs().median()
    return Stack(model)


def _guard() -> list[dict]:
    """S and kappa with massive tokens, against those without; tokens left out for a dimension that is always large."""
    tokens, found = known_networks.tokens(48, 16), {}
    tokens[:, 0] = 1
    for name, times, guarded in (("clean", 0, True), ("after", 500, True), ("before", 500, False)):
        stack, sampling = massive_network(times), Sampling(resamples=0, skip_massive=guarded)
        windows = window.windows(stack, tokens, 2, damage=False, sampling=sampling)
        layers = kappa.layers(stack, tokens, nulls=False, causal=False, sampling=sampling)
        found[name] = {"S": windows["S"], "kappa": layers["kappa"], "n": int(windows["n_massive"][0])}
    point = "massive activations"
    planted = int(torch.isin(tokens[:, 1:], torch.arange(0, known_networks.D_VOCAB, 50)).sum())
    table = [
        _row(
            point,
            f"{name} of some {place} moves by, 2 % of tokens at 500 times the median",
            0,
            *(f"{(found[when][name] - found['clean'][name]).abs().max():.3f}" for when in ("before", "after")),
        )
        for name, place in (("S", "window"), ("kappa", "layer"))
    ]
    table.append(_row(point, "tokens of these left out", planted, 0, found["after"]["n"]))
    rogue = massive_network(500, share=1)
    dropped = Ensemble.of(rogue, tokens).n_massive
    table.append(_row(point, "tokens left out, one dimension large in all", 0, ROGUE_BEFORE, dropped))
    return table


def _rotation(read: pd.DataFrame) -> list[dict]:
    """What the displacement and the rotation say of random networks, and of ones that were built to prefer."""
    point, n = "serial or displaced", len(read)
    claims = (int(read[name].sum()) for name in ("displaced", "preferred"))
    table = [
        _row(
            point, f"R over its null, {n} random networks", 1, _range(read["R_over_N"]), _range(read["R_over_rotated"])
        ),
        _row(point, f"preference, {n} random networks", 1, "not measured", _range(read["preference"])),
        _row(point, f"random networks of {n} said to prefer", 0, *claims),
    ]
    tokens = known_networks.tokens(24, 10)
    for name, nominal in (("parallel", 0), ("linear", 1), ("serial", "above 1")):
        stack = Stack(getattr(known_networks, f"{name}_network")())
        frame = window.windows(stack, tokens, damage=False, sampling=ESTIMATE).query("start > 0")
        before, after = _range(frame["R_over_N"]), _range(frame["preference"])
        table.append(_row(point, f"preference of constructed {name} layers", nominal, f"R/N {before}", after))
    return table


def _sizes(read: pd.DataFrame) -> list[dict]:
    """S of random networks by the size of their updates, and against others with updates of that size."""
    scale = read["network"].str.split().str[2]
    table = [
        _row(
            "size of updates",
            f"S of random networks, updates scaled by {size}",
            "excess 0",
            f"S {_range(of['S'])}",
            f"{of['S_excess'].min():+.2f} to {of['S_excess'].max():+.2f}",
        )
        for size, of in read.groupby(scale)
    ]
    case = f"random networks of {len(read)} in which a window is said to be more or less serial"
    before = "not asked"
    return [*table, _row("size of updates", case, 0, before, int((read["excess"] > 0).sum()))]


def _layernorm(seeds: int) -> list[dict]:
    """S of constructed networks with LayerNorm: with writes that have no mean, and with any writes."""
    tokens, table = known_networks.tokens(24, 10), []
    for name, nominal in (("parallel", 0), ("serial", 1)):
        build, readings = getattr(known_networks, f"{name}_network"), {"no": [], "a": []}
        for seed in range(seeds):
            for mean, values in readings.items():
                model = build(norm="LN", seed=seed)
                if mean == "a":
                    plain = dict(build(seed=seed).named_parameters())
                    with torch.no_grad():
                        for key, weight in model.named_parameters():
                            if key in plain:
                                weight.copy_(plain[key])
                frame = window.windows(Stack(model), tokens, damage=False, sampling=ESTIMATE)
                values += frame["S"].tolist()
        before = LAYERNORM_BEFORE[name]
        for mean, values in readings.items():
            case = f"S of {name} layers behind a LayerNorm, writes with {mean} mean"
            right = "up to 1" if name == "serial" and mean == "a" else nominal
            table.append(_row("LayerNorm", case, right, before, _range(pd.Series(values).abs())))
    return table


def _intervals(trials: int) -> list[dict]:
    """How often the interval of a mean over few prompts holds the truth."""
    table = []
    for name, draw_prompts in (
        ("normal", lambda generator, n: generator.normal(size=n)),
        ("skewed (exponential)", lambda generator, n: generator.exponential(size=n) - 1),
    ):
        for n in (8, 16, 64):
            covered = []
            for draw in (drawing_all, weights):
                hits = []
                for trial in range(trials):
                    values = torch.from_numpy(draw_prompts(np.random.default_rng((n, trial)), n))
                    _, low, high = interval(draw(n, 200, trial) @ values / n)
                    hits.append(low <= 0 <= high)
                covered.append(f"{np.mean(hits):.3f}")
            table.append(
                _row("few prompts", f"coverage of the interval of a mean, {name}, {n} prompts", 0.95, *covered)
            )
    return table


def _batches() -> list[dict]:
    """By how much R_shuffled moves with the size of batches."""
    stack, tokens = Stack(known_networks.random_network(4)), known_networks.tokens(24, 10)
    readings = [
        window.windows(stack, tokens, damage=False, sampling=Sampling(resamples=0, batch_size=size))["R_shuffled"]
        for size in (1, 5, 24)
    ]
    moved = max(float((reading - readings[-1]).abs().max()) for reading in readings)
    return [
        _row("batches", "R_shuffled moves with the size of batches by", 0, f"up to {BATCHES_BEFORE}", f"{moved:.2f}")
    ]


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
