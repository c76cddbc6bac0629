"""What the anatomy says of networks and paths whose parts are known: how often it is right, and how often it is not.

Networks: random ones whose middle third writes 40 times as quietly or as loudly as their ends; random ones without
parts; ones whose ends read the entry and whose middle reads the layer before; uniform ones in which only the sizes of
updates differ between ends and middle. Paths: features that drift and have no blocks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from surgery import Sampling, Stack, anatomy
from surgery.anatomy import ends_against_middle
from surgery.instruments import known_networks
from surgery.models.tokens import Tokens
from surgery.stats import changepoints

FAMILIES = ("lens",) * 2 + ("growth", "size", "kappa", "influence") + ("cka",) * 12
DRIFTS = ("line", "curve", "walk", "reverting", "noise", "sigmoid", "exponential")
TOKENS = known_networks.tokens(32, 10)
SAMPLING = Sampling(resamples=60)
POOLED = dict.fromkeys(DRIFTS, "0.00") | {"sigmoid": "0.07"}  # what one p of all features pooled called blocks
UNIFORM = (0.1, 0.3, 0.6, 0.9, None)  # shares of mixed networks; None is a random network


def thirds(ends: float, middle: float, n_layers: int) -> list[float]:
    """One number per layer: that of the ends, and that of the middle third."""
    third = n_layers // 3
    return [ends] * third + [middle] * (n_layers - 2 * third) + [ends] * third


@torch.no_grad()
def scaled(gains: Sequence[float], seed: int) -> Stack:
    """A random network whose layer ``l`` writes ``gains[l]`` times what it would."""
    model = known_networks.random_network(len(gains), seed=seed, norm=("RMS", None)[seed % 2])
    for layer, gain in enumerate(gains):
        _scale(model, layer, gain)
    return Stack(model)


@torch.no_grad()
def sized(shares: Sequence[float] | None, sizes: Sequence[float], seed: int) -> Stack:
    """A mixed network (random if ``shares`` is None) whose updates spread ``sizes[l]`` times as far as its embedding.

    Layer ``l`` of a mixed network reads ``shares[l]`` of its input from the layer before.
    """
    n_layers = len(sizes)
    if shares is None:
        model = known_networks.random_network(n_layers, seed=seed, dtype=torch.float64, norm=("RMS", None)[seed % 2])
    else:
        model = known_networks.mixed_network(shares, n_layers, 6, seed=seed, dtype=torch.float64)
    stack = Stack(model)
    context = stack.context(Tokens.of(TOKENS))
    x = context.x0
    embedding = _spread(x)
    for layer, size in enumerate(sizes):
        update = stack.update(layer, x, context)
        factor = size * embedding / _spread(update)
        _scale(model, layer, factor)
        x = x + factor * update
    return Stack(model)


def drifting(kinds: Sequence[str], n_layers: int, generator: np.random.Generator) -> Float[np.ndarray, "layer feature"]:
    """Features without blocks: every family drifts in one of these ways, with a little noise."""
    t, columns = np.linspace(-1, 1, n_layers), {}
    for family in dict.fromkeys(FAMILIES):
        kind = generator.choice(kinds)
        columns[family] = [_drift(kind, t, generator) for _ in range(FAMILIES.count(family))]
    path = np.stack([column for members in columns.values() for column in members], 1)
    return path + 0.1 * generator.normal(size=path.shape)


def places(stack: Stack, drifts: int = 99) -> tuple[float, tuple[int, ...]]:
    """p of three parts, and where the evidence that shows them most clearly puts them."""
    features = anatomy.features(stack, TOKENS, sampling=Sampling(resamples=0))
    table = anatomy.detectors(features, min_size=3, drifts=drifts).sort_values("excess", kind="stable").tail(2)
    return float(table["p_adjusted"].iloc[0]), tuple(table["layer"].astype(int))


def told(shares: Sequence[float] | None, sizes: Sequence[float], seed: int) -> str:
    """The verdict on the ends of a network whose parts are thirds."""
    n_layers = len(sizes)
    profile = ends_against_middle.measure(sized(shares, sizes, seed), TOKENS, sampling=SAMPLING)
    return ends_against_middle.verdict(ends_against_middle.ends(profile, [(n_layers // 3, n_layers - n_layers // 3)]))


def located(shares: Sequence[float] | None, sizes: Sequence[float], seed: int) -> str:
    """The same with the boundaries found, not given."""
    found = anatomy.locate(sized(shares, sizes, seed), TOKENS, sampling=SAMPLING)
    return str(found.ends["verdict"][0])


def rows(quick: bool = False) -> list[dict]:
    """Every simulation; the figures before are of the code that pooled all features, read R/N and asked chance."""
    return [*_parts(1 if quick else 12), *_drifts(5 if quick else 100), *_ends(1 if quick else 3)]


def _parts(seeds: int) -> list[dict]:
    result = []
    for name, gain in (("quieter", 1 / 40), ("louder", 40.0)):
        found = [places(scaled(thirds(1.0, gain, n), seed)) for seed in range(seeds) for n in (12,)]
        right = sum(p < 0.05 and abs(np.subtract(cut, (4, 8))).max() <= 1 for p, cut in found)
        shown = sum(p < 0.05 for p, _ in found)
        result += [
            _row(f"a middle 40 times {name} is found", "all", "0 of 12", f"{shown} of {seeds}"),
            _row(f"its boundaries are right within a layer: {name}", "all", "0 of 12", f"{right} of {seeds}"),
        ]
    for n_layers in (12, 18):
        false = [places(scaled([1.0] * n_layers, 100 + seed))[0] < 0.05 for seed in range(seeds)]
        result.append(
            _row(f"random networks of {n_layers} layers have parts", "<= .05", "0.00", f"{np.mean(false):.2f}")
        )
    return result


def _drifts(count: int) -> list[dict]:
    """Nothing may be found, and no agreement, in features that only drift."""
    result = []
    for kind in DRIFTS:
        generator, found, agreed = np.random.default_rng(1), [], []
        for seed in range(count):
            features = anatomy.Features(FAMILIES, drifting([kind], 12, generator)[None])
            path = features.standardised[0]
            tests = changepoints.drift_test(path, FAMILIES, min_size=3, draws=99, seed=seed)
            found.append(tests["p_adjusted"].min() < 0.05)
            agreed.append((anatomy.agreement(features, 3, 99, seed)["p_drift"] < 0.025).any())
        result += [
            _row(f"parts in features that drift: {kind}", "<= .05", POOLED[kind], f"{np.mean(found):.2f}"),
            _row(f"detectors agree on them: {kind}", "<= .05", ".8 to 1.0", f"{np.mean(agreed):.2f}"),
        ]
    return result


def _ends(seeds: int) -> list[dict]:
    result = []
    for n_layers in (12, 18):
        sizes, sizes_reversed = thirds(0.3, 0.9, n_layers), thirds(0.9, 0.3, n_layers)
        for name, judge in (("given", told), ("found", located)):
            words = [judge(thirds(0.1, 0.6, n_layers), sizes, seed) for seed in range(seeds)]
            case = f"ends at .1, middle at .6 with three times the updates, {n_layers} layers, boundaries {name}"
            result.append(_row(case, "all supported", "0 of 3", f"{words.count('supported')} of {seeds}"))
        words = [
            told(share and [share] * n_layers, some, seed)
            for share in UNIFORM
            for some in (sizes, sizes_reversed)
            for seed in range(seeds)
        ]
        wrong = 1 - words.count("undecided") / len(words)
        result.append(_row(f"uniform networks, sizes differ, {n_layers} layers", "<= .05", "0.00", f"{wrong:.2f}"))
    return result


def _row(case: str, nominal: str, before: object, after: object) -> dict:
    return {"point": "anatomy", "case": case, "nominal": nominal, "before": before, "after": after}


def _scale(model, layer: int, factor: float) -> None:
    for name, weight in model.named_parameters():
        plain = name.replace("._original_component", "")
        if plain.startswith((f"layers.{layer}.attn.o.", f"layers.{layer}.mlp.fc_out.")):
            weight *= factor


def _spread(x: Float[torch.Tensor, "prompt pos d_model"]) -> float:
    return float(x[:, 1:].flatten(0, 1).std(0).norm())


def _drift(kind: str, t: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noise, slope = generator.normal(size=len(t)), generator.normal()
    if kind == "line":
        return slope * t
    if kind == "curve":
        return np.polynomial.polynomial.polyval(t, generator.normal(size=4))
    if kind == "walk":
        return (0.3 * slope + noise).cumsum() / 2
    if kind == "reverting":
        for layer in range(1, len(t)):
            noise[layer] = 0.7 * (noise[layer - 1] + noise[layer])
        return noise
    if kind == "sigmoid":
        return np.tanh(t * generator.uniform(0.5, 2) + 0.3 * slope)
    return np.exp(t * generator.uniform(0.5, 2) * np.sign(slope)) if kind == "exponential" else noise
