"""Does ``anatomy.crossing`` find boundaries that damage shows, and none where layers only drift?

Damages of every swap of two layers, on sixteen texts: independent of each other, a rough field over both layers, or of
layers that lie on a line that speeds up and slows down smoothly; as they are, and times a ratio where they cross two
boundaries drawn at random.
"""

from collections.abc import Iterator

import numpy as np

from surgery.anatomy import crossing

POINT = "crossing"
ANY = (1, 2, 3, 4)  # boundaries, looked for at once
KINDS = ("independent", "rough field", "smooth drift")


def damage(
    n_layers: int, kind: str, ratio: float, seed: int
) -> tuple[np.ndarray, list[tuple[int, int]], tuple[int, int]]:
    """Damages [text, swap], the swaps, and the boundaries."""
    generator = np.random.default_rng((seed, n_layers, KINDS.index(kind)))
    spans = crossing.pairs(n_layers)
    index = np.array(spans)
    size = np.exp(0.5 * generator.standard_normal(n_layers))
    if kind == "smooth drift":
        noise = generator.standard_normal(n_layers + 6)
        place = np.exp(0.5 * np.convolve(noise, np.ones(7) / 7**0.5, "valid")).cumsum()
        mean = np.log1p(np.abs(place[index[:, 0]] - place[index[:, 1]]))
    elif kind == "rough field":
        apart = np.abs(index[:, None] - index[None]).sum(-1)
        root = np.linalg.cholesky(0.8 * np.exp(-apart / 6) + 0.2 * np.eye(len(spans)))
        mean = np.exp(0.5 * root @ generator.standard_normal(len(spans)))
    else:
        mean = generator.lognormal(0, 0.5, len(spans))
    low = int(generator.integers(3, n_layers - 5))
    high = int(generator.integers(low + 3, n_layers - 2))
    across = crossing.crosses(spans, (low, high), "swap")
    mean = mean * size[index].prod(1) * np.where(across, ratio, 1)
    return mean * generator.lognormal(0, 0.3, (16, len(spans))), spans, (low, high)


def rows(quick: bool = False) -> Iterator[dict]:
    for n_layers, count in ((12, 60), (18, 24), (30, 5)):
        count = 6 if quick else count
        for kind in KINDS:
            for ratio in (1.0, 1.5, 3.0):
                found, right, any_number = [], [], []
                for seed in range(count):
                    damages, spans, at = damage(n_layers, kind, ratio, seed)
                    row = crossing.parts(damages, spans, "swap", n_layers, min_size=3, draws=99, seed=seed)
                    found.append(row["shown"])
                    places = crossing.boundaries(row["parts"])
                    right.append(max(abs(place - true) for place, true in zip(places, at)) <= 1)
                    if n_layers < 30:
                        of_any = crossing.parts(
                            damages, spans, "swap", n_layers, counts=ANY, min_size=3, draws=99, seed=seed
                        )
                        any_number.append(of_any["shown"])
                base = {"point": POINT, "before": "not there"}
                said = f"{kind}, {n_layers} layers"
                if any_number:
                    yield base | {
                        "case": f"any number of parts claimed, {ratio:g} times across two boundaries, {said}",
                        "nominal": 0.05 if ratio == 1 else "high",
                        "after": round(np.mean(any_number), 2),
                    }
                if ratio == 1:
                    yield base | {
                        "case": f"boundaries claimed, {said}",
                        "nominal": 0.05,
                        "after": round(np.mean(found), 2),
                    }
                else:
                    case = f"found, {ratio:g} times across, {said}"
                    yield base | {"case": case, "nominal": "high", "after": round(np.mean(found), 2)}
                    if ratio == 3:
                        both = np.mean(np.array(right)[np.array(found)]) if any(found) else float("nan")
                        case = f"... of these both within a layer, {said}"
                        yield base | {"case": case, "nominal": "high", "after": round(float(both), 2)}
