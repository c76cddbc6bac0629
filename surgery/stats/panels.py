r"""Does a panel ``y[unit, time]`` revert to a mean? Every estimator is a function of its second moments.

A panel follows many units (tokens, series, coordinates of a vector) through the same times (layers). Its model is

    y_{t+1} = phi y_t + (1 - phi) mu + shock,        T transitions, T + 1 times,

an Ornstein-Uhlenbeck process seen at even times: ``0 < phi < 1`` reverts, 1 is a random walk, above 1 explodes. ``mu``
may be the same for all units or each unit's own ("unit effects"). What all estimators need is

    G[s, t] = sum over units (and coordinates) of y_s y_t, each time's mean removed               (``gram``)

so they work on a stream whose sums are all that was kept, and on a batch of resamples: leading dimensions of G are
batch dimensions. T always counts transitions.

========================  ==========================================================================================
``pooled``                one line through all transitions: right without unit effects, biased towards 1 with them
``within``                each unit about its own mean: biased towards reversion by ``nickell``, -0.216 at T = 12 and
                          phi = 0.95; ``bracket`` is both, and the truth lies between
``nickell_corrected``     that bias taken back by inverting the formula; it assumes shocks of even size
``half_panel``            that bias taken back by halving the panel; assumes little, needs long panels
``variance_ratio``        how far the stream gets in q steps beside steps that do not know each other
========================  ==========================================================================================

**The control.** Shocks that grow from time to time are not what the formulas assume, and a random walk then does not
read 1. ``random_walk(G)`` is the matrix of a random walk with the variances of the very panel, so that the null value
of any estimator ``f`` is ``f(random_walk(G))``; ``harris_tzavalis`` simulates the spread around it. Units that are not
independent make every interval too narrow: ``pesaran_cd`` shows that, and ``by`` of ``sandwich`` corrects it.

Sources: S. Nickell (1981); G. Dhaene and K. Jochmans (2015); R. Harris and E. Tzavalis (1999); M. H. Pesaran (2004);
A. Lo and C. MacKinlay (1988), whose variance ratio is changed here so that it survives growing increments; S. Bond
(2002) for the bracket; L. Jaeckel (1972) for the infinitesimal jackknife. How well all of this works on simulated
panels: ``surgery.stats.ou.recovery``.

>>> y = simulate(0.8, 4000, 12, effects=2.0)
>>> G = gram(y)
>>> [round(value.item(), 2) for value in (*bracket(G), nickell_corrected(within(G), 12))]
[0.63, 0.92, 0.81]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from surgery.stats.drift import NEGLIGIBLE

Second = Float[Tensor, "... time time"]
Values = Float[Tensor, "..."]
Estimator = Callable[[Tensor], Tensor]

HIGHEST = 1.5  # phi is searched from here ...
LOWEST = -0.999  # ... to here
FEW = 64  # units up to which standard errors leave each out in turn
DECIDES = 0.25  # a share of the second moment from which on one unit decides what is said of all


def gram(y: Float[Tensor, "unit time *d_model"], by: Int[Tensor, " unit"] | None = None) -> Float[Tensor, "..."]:
    """Return second moments ``[time, time]`` of a panel about each time's mean (of each coordinate), summed over units.

    With ``by``, the group of every unit, return those of every group about the mean of all: ``[group, time, time]``,
    which add up to the whole. Resampling them takes the means as known, an error of one part in the number of groups.

    Raises ValueError for a panel of one time, or one that is not finite.
    """
    if y.shape[1] < 2 or not y.isfinite().all():
        raise ValueError(f"a panel has two times or more, all finite, got {tuple(y.shape)}: leave out other units")
    rows = rearrange(y.double(), "unit time ... -> unit time (...)")
    rows = rows - rows.mean(0)
    if by is None:
        flat = rearrange(rows, "unit time coordinate -> time (unit coordinate)")
        return flat @ flat.T
    products = rows @ rows.mT
    return products.new_zeros(int(by.max()) + 1, *products.shape[1:]).index_add_(0, by, products)


# --- estimators of phi ------------------------------------------------------------------------------------------------


def pooled(G: Second, weights: Float[Tensor, " transition"] | None = None) -> Values:
    """Fit every ``y_{t+1}`` on ``y_t`` at once by least squares; NaN where nothing varies.

    ``weights`` of the transitions, such as one over each shock's variance; a single 1 is the cross-section of that
    transition, the ``1 - kappa`` of ``surgery.reversion``.

    >>> y = simulate(0.5, 2000, 12)
    >>> round(pooled(gram(y)).item(), 2)
    0.5
    """
    T = transitions(G, 1)
    return _slope(G, torch.eye(T).to(G) if weights is None else weights.to(G).diag())


def within(G: Second) -> Values:
    """Fit the same with an intercept for every unit ("fixed effects"): biased by ``nickell``, however many units."""
    return _slope(G, _residual(transitions(G, 2), 1).to(G))


def bracket(G: Second) -> tuple[Values, Values]:
    """Return ``within`` and ``pooled``, biased to either side: a panel with unit effects lies between (Bond 2002)."""
    return within(G), pooled(G)


def nickell(phi: float | Values, T: int, start: str = "stationary") -> Values:
    """Return the bias of ``within`` with many units and ``T`` transitions (Nickell 1981): ``-3 / (T + 1)`` at phi = 1.

    With shocks of even size and every unit begun in its ``stationary`` distribution or at its own mean (``zero``),
    which is not the same thing except at phi = 1. Written as polynomials in phi, so there is nothing special about 1;
    above it the stationary formula goes on smoothly but describes no start that exists, and ``zero`` is the one to use.

    >>> [round(nickell(phi, 12).item(), 3) for phi in (0.5, 0.95, 1.0)]
    [-0.134, -0.216, -0.231]
    """
    if T < 2 or start not in ("stationary", "zero"):
        raise ValueError(f"two transitions or more, start stationary or zero, got T={T} and start={start!r}")
    phi = torch.as_tensor(phi, dtype=torch.float64)
    lag = torch.arange(1, T, device=phi.device)
    powers = phi.unsqueeze(-1) ** (lag - 1)
    sums = powers.cumsum(-1)
    score = -((T - lag) * powers).sum(-1) / T
    if start == "stationary":
        return score / (2 / T * ((T - lag) * sums).sum(-1) / (1 + phi))
    return score / (((T - lag) * powers.square()).sum(-1) - sums.square().sum(-1) / T)


def nickell_corrected(phi_within: float | Values, T: int, start: str = "stationary") -> Values:
    """Return the phi at which ``within`` reads ``phi_within``: the inverse of ``phi + nickell(phi, T)``, by bisection.

    That function rises all the way, through 1 as well; NaN where it has no root between -0.999 and 1.5. Differentiable,
    so that ``sandwich`` gives its standard error.

    >>> round(nickell_corrected(1 - 3 / 13, 12).item(), 6)
    1.0
    """
    target = torch.as_tensor(phi_within, dtype=torch.float64)

    def reading(phi: Tensor) -> Tensor:
        return phi + nickell(phi, T, start)

    with torch.no_grad():
        low, high = torch.full_like(target, LOWEST), torch.full_like(target, HIGHEST)
        inside = (reading(low) <= target) & (target <= reading(high))
        for _ in range(50):
            middle = (low + high) / 2
            above = reading(middle) > target
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        rise = (reading(high + 1e-5) - reading(high - 1e-5)) / 2e-5
        missing = reading(high)
    return torch.where(inside, high + (target - missing) / rise, torch.nan)  # the last step carries the derivative


def half_panel(G: Second) -> Values:
    """Return ``within`` less its change when the panel is cut in two: ``2 phi - (phi_1 + phi_2) / 2``.

    Takes back the part of the bias that falls as 1/T, whatever its formula; what is left is large until T is several
    times the memory ``1 / (1 - phi)``, -0.02 at T = 12 and phi = 0.95. With odd T the mean over both ways to cut.
    Source: Dhaene and Jochmans (2015). Raises ValueError for fewer than 4 transitions.
    """
    T = transitions(G, 4)
    cuts = (T // 2, T - T // 2)
    halves = [within(part) for cut in cuts for part in (G[..., : cut + 1, : cut + 1], G[..., cut:, cut:])]
    return 2 * within(G) - sum(halves, torch.zeros_like(halves[0])) / 4


# --- what a random walk would have ------------------------------------------------------------------------------------


def increments(G: Second) -> Float[Tensor, "... transition"]:
    """Return the second moment of every increment ``y_{t+1} - y_t``."""
    level = G.diagonal(dim1=-2, dim2=-1)
    return level[..., 1:] + level[..., :-1] - 2 * G.diagonal(offset=1, dim1=-2, dim2=-1)


def random_walk(G: Second) -> Second:
    """Return the second moments of the random walk that starts and steps as this panel does: steps that know nothing.

    ``G0[s, t] = G[0, 0] +`` the increments' moments up to the earlier of the two. ``f(random_walk(G))`` is what any
    estimator ``f`` reads when nothing reverts, with shocks as uneven as they are; compare ``f(G)`` with it.

    >>> G = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    >>> random_walk(G).tolist()
    [[1.0, 1.0], [1.0, 3.0]]
    """
    reached = torch.cat([G[..., :1, 0], G[..., :1, 0] + increments(G).cumsum(-1)], -1)
    times = torch.arange(G.shape[-1], device=G.device)
    return reached[..., torch.minimum(times.unsqueeze(0), times.unsqueeze(1))]


def variance_ratio(G: Second, start: int, q: int) -> Values:
    """Return ``E|y_{a+q} - y_a|^2 / sum_k E|u_{a+k}|^2``: how far q steps from a lead beside steps that know nothing.

    1: uncorrelated steps, below 1 they take each other back, above 1 they go on in the same direction; from 0 to q. Lo
    and MacKinlay (1988) divide by q times the variance of one step, which is wrong when steps grow; this does not mind.

    Raises ValueError for steps that the panel does not have.
    """
    T = transitions(G, 1)
    if q < 1 or start < 0 or start + q > T:
        raise ValueError(f"{q} steps from {start}, of {T} transitions: choose start >= 0, q >= 1, start + q <= {T}")
    stop = start + q
    moved = G[..., stop, stop] + G[..., start, start] - 2 * G[..., start, stop]
    steps = increments(G)[..., start:stop].sum(-1)
    return torch.where(steps > 0, moved / steps, torch.nan)


# --- tests and standard errors ----------------------------------------------------------------------------------------


def sandwich(
    estimator: Estimator, y: Float[Tensor, "*panel unit time"], by: Int[Tensor, " unit"] | None = None
) -> tuple[Values, Values]:
    """Return a differentiable function of ``G``, and its standard error over units, or over groups ``by`` of units.

    The infinitesimal jackknife: a unit's influence is what its own products add along the estimator's gradient. Nothing
    is assumed of the shocks. One backward pass, whatever the number of units; NaN for a single unit. Of few units (or
    groups) it is too small, as the gradient forgets that a unit pulled the estimate to itself, so up to ``FEW`` each is
    left out in turn instead (the jackknife; Quenouille 1956, Tukey 1958): with 8 units, intervals of t times the error
    hold the truth in 94 to 96 % instead of 88 to 94 %. Units must be alike: where ``unit_share`` says that one decides,
    no interval is right.

    >>> value, error = sandwich(within, simulate(0.5, 500, 12))
    >>> bool(abs(value - (0.5 + nickell(0.5, 12))) < 3 * error)
    True
    """
    rows = y.double() - y.double().mean(-2, keepdim=True)
    n = rows.shape[-2] if by is None else int(by.max()) + 1
    if 1 < n <= FEW:
        return _jackknife(estimator, rows, torch.arange(n, device=rows.device) if by is None else by, n)
    with torch.enable_grad():
        G = (rows.mT @ rows).requires_grad_()
        value = estimator(G)
        (gradient,) = torch.autograd.grad(value.sum(), G)
    influence = ((rows @ gradient) * rows).sum(-1)
    if by is not None:
        influence = influence.new_zeros(*influence.shape[:-1], n).index_add_(-1, by, influence)
    scale = n / (n - 1) if n > 1 else math.nan
    return value.detach(), (scale * influence.square().sum(-1)).sqrt()


def _jackknife(estimator: Estimator, rows: Tensor, by: Tensor, n: int) -> tuple[Values, Values]:
    """Return the estimate and its standard error from leaving out every group of (centred) rows in turn."""
    G, left = rows.mT @ rows, []
    for group in range(n):
        own = rows[..., by == group, :]
        total, rest = own.sum(-2), rows.shape[-2] - own.shape[-2]  # the others have a mean of their own
        left.append(estimator(G - own.mT @ own - total.unsqueeze(-1) * total.unsqueeze(-2) / rest).detach())
    deleted = torch.stack(left, -1)
    spread = (deleted - deleted.mean(-1, keepdim=True)).square().sum(-1)
    return estimator(G).detach(), ((n - 1) / n * spread).sqrt()


def unit_share(y: Float[Tensor, "unit time *d_model"]) -> float:
    """Return the largest share of a panel's increments, squared, that one unit has: 1 / units if all are alike.

    Above ``DECIDES`` one unit decides what every estimator and test here says, and no interval and no p is right. NaN
    where nothing moves.

    >>> y = simulate(1.0, 100, 12)
    >>> y[3] *= 500
    >>> round(unit_share(y), 2)
    0.99
    """
    rows = rearrange(y.double(), "unit time ... -> unit time (...)")
    moved = (rows - rows.mean(0)).diff(dim=1).square().sum((1, 2))
    return float(moved.max() / moved.sum()) if moved.sum() > 0 else math.nan


@dataclass(frozen=True)
class UnitRoot:
    """The result of ``harris_tzavalis``; small p speaks for reversion, p near 1 for explosion."""

    effects: str
    phi: float  # the estimate that belongs to these effects
    phi_null: float  # its median over simulated random walks
    statistic: float  # (phi - null mean) / standard deviation, both by the table's formula
    p_table: float  # of the statistic, one-sided: normal, many units, shocks of even size
    p: float  # share of the simulated random walks with a phi as low; NaN where one unit decides
    n_units: int
    T: int
    unit_share: float = math.nan  # of the increments, squared; NaN if the panel is not given


def harris_tzavalis(
    panel: Float[Tensor, "unit time"] | tuple[float, int, int],
    effects: str = "none",
    *,
    shocks: Float[Tensor, " transition"] | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> UnitRoot:
    """Test for a random walk with many units and few times; p by table and by simulation.

    ``effects``: ``none`` (``pooled``), ``unit`` (``within``) or ``trend`` (an intercept and a trend for every unit).
    ``panel`` is y, or ``(phi, n_units, T)`` if that estimate is all there is. Simulated walks have this many units, the
    second moments of y's start and increments, or, if given, of ``shocks`` (in any unit; even, and begun at 0, without
    y). The table assumes even shocks; where they grow believe ``p`` only. Units have to be independent: for tokens of
    prompts that is fewer than there are tokens. They have to be alike as well: where one has more than ``DECIDES`` of
    the increments (``unit_share``) p and p_table are NaN, as such a panel is no larger than that unit.

    Walks are not drawn one by one: their second moments have a Wishart distribution, so a million units cost no more
    than ten. Source: Harris and Tzavalis (1999), T = transitions; with ``none`` the variance of the start is added to
    their formula. Raises ValueError for other effects, fewer than 2 units, or too few transitions.

    >>> test = harris_tzavalis(simulate(1.0, 200, 12), "unit")
    >>> round(test.phi_null, 2), 0.05 < test.p < 0.95, round(abs(test.p - test.p_table), 1)
    (0.77, True, 0.0)
    """
    orders = {"none": 0, "unit": 1, "trend": 2}
    if effects not in orders:
        raise ValueError(f"effects are none, unit or trend, got {effects!r}")
    order = orders[effects]
    start, share = 0.0, math.nan
    if isinstance(panel, tuple):
        phi, n, T = panel
        metric = _residual(T, order)
        shocks = torch.ones(T) if shocks is None else shocks
    else:
        n, T = len(panel), panel.shape[1] - 1
        G, metric = gram(panel), _residual(T, order)
        phi, share = float(_slope(G, metric)), unit_share(panel)
        steps = increments(G)
        start = float(G[0, 0]) * (1.0 if shocks is None else float(shocks.sum() / steps.sum()))
        shocks = steps if shocks is None else shocks
    if n < 2 or order + 2 > T or shocks.shape != (T,):
        raise ValueError(
            f"effects={effects} need 2 units, {order + 2} transitions and a shock's variance for each, got {n} units, "
            f"T={T} and {len(shocks)} variances"
        )
    if not 0 < float(shocks.sum()) < math.inf or not math.isfinite(start):
        raise ValueError("nothing moves in this panel, or shocks are not variances: leave out units that stay the same")
    variances = torch.cat([torch.tensor([start]).double(), shocks.double().cpu()])
    simulated = _slope(_walks(variances, n - 1, draws, seed), metric)
    mean, variance = {
        "none": (1.0, 1 / (T * (T - 1) / 2 + T * start / float(shocks.mean()))),
        "unit": (1 - 3 / (T + 1), 3 * (17 * T**2 - 20 * T + 17) / (5 * (T - 1) * (T + 1) ** 3)),
        "trend": (
            1 - 15 / (2 * (T + 2)),
            15 * (193 * T**2 - 728 * T + 1147) / (112 * (T + 2) ** 3 * max(T - 2, 1)),
        ),
    }[effects]
    statistic = (phi - mean) / math.sqrt(variance / n)
    p = (1 + int((simulated <= phi).sum())) / (1 + draws) if math.isfinite(phi) else math.nan
    trusted = not share > max(DECIDES, 3 / n)  # of few units one may well have a third
    p, p_table = (p, _below(statistic)) if trusted else (math.nan, math.nan)
    return UnitRoot(effects, phi, float(simulated.median()), statistic, p_table, p, n, T, share)


def pesaran_cd(residuals: Float[Tensor, "unit time"]) -> tuple[float, float]:
    """Test whether units are dependent: Pesaran's CD, ``sqrt(2 T / (N (N - 1)))`` times all correlations, and its p.

    Standard normal if they are independent; two-sided p. All pairs at the cost of one sum: ``(|sum of standardised
    rows|^2 - N) / 2``. Give residuals from which no time's mean was taken: if it was they correlate by construction,
    and CD is near ``-sqrt(T / 2)``. Units that do not vary are left out; NaN with fewer than two. Pesaran (2004).

    >>> noise = simulate(0.0, 300, 12)
    >>> pesaran_cd(noise)[1] > 0.05, pesaran_cd(noise + 0.5 * noise[0])[1] < 0.001
    (True, True)
    """
    rows = residuals.double()
    centred = rows - rows.mean(-1, keepdim=True)
    length = centred.norm(dim=-1, keepdim=True)
    varies = length.squeeze(-1) > NEGLIGIBLE * rows.norm(dim=-1)
    n, times = int(varies.sum()), rows.shape[1]
    if n < 2:
        return math.nan, math.nan
    pairs = (float((centred / length)[varies].sum(0).square().sum()) - n) / 2
    statistic = math.sqrt(2 * times / (n * (n - 1))) * pairs
    return statistic, 2 * _below(-abs(statistic))


# --- panels made up ---------------------------------------------------------------------------------------------------


def simulate(
    phi: float,
    n_units: int,
    T: int,
    *,
    effects: float = 0.0,
    sigma: float = 1.0,
    start: str = "stationary",
    seed: int = 0,
) -> Float[Tensor, "unit time"]:
    """Make a panel of known phi: units with normal shocks (s.d. ``sigma``) about means of their own (s.d. ``effects``).

    Every unit starts in its ``stationary`` distribution or at its mean (``zero``); a random walk (phi = 1) and an
    explosive panel have no stationary one and start at the mean.

    >>> simulate(1.05, n_units=3, T=12).shape
    torch.Size([3, 13])
    """
    if start not in ("stationary", "zero"):
        raise ValueError(f"start is stationary or zero, got {start!r}")
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((T + 2, n_units)))
    x = sigma * noise[0] / math.sqrt(1 - phi**2) if start == "stationary" and abs(phi) < 1 else torch.zeros(n_units)
    path = [x.double()]
    for shock in noise[1:-1]:
        path.append(phi * path[-1] + sigma * shock)
    return torch.stack(path, 1) + effects * noise[-1].unsqueeze(1)


def transitions(G: Second, least: int) -> int:
    """Return T of a matrix of second moments. Raises ValueError if that is fewer than ``least``."""
    T = G.shape[-1] - 1
    if least > T:
        raise ValueError(f"this takes {least} transitions or more, the panel has {T}: follow it through more times")
    return T


def _slope(G: Second, metric: Float[Tensor, "transition transition"]) -> Values:
    """Regress the next value on the present one, both measured by ``metric`` over times; NaN where nothing varies."""
    metric = metric.to(G)
    x = G[..., :-1, :-1]
    square = (metric * x).sum((-2, -1))
    rest = square > NEGLIGIBLE * x.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(rest, (metric * G[..., :-1, 1:]).sum((-2, -1)) / square, torch.nan)


def _residual(T: int, order: int) -> Float[Tensor, "transition transition"]:
    """Return the projection that removes the mean (order 1), or mean and trend (2), from a series of T."""
    basis = torch.linalg.qr(torch.arange(T).double().unsqueeze(1) ** torch.arange(order)).Q
    return torch.eye(T).double() - basis @ basis.T


def _walks(variances: Float[Tensor, " time"], degrees: int, draws: int, seed: int) -> Float[Tensor, "draw time time"]:
    """Draw second moments of random walks by Bartlett's decomposition: ``variances`` of the start and every step."""
    generator, n = np.random.default_rng(seed), len(variances)
    factor = np.tril(generator.standard_normal((draws, n, n)), -1)
    free = np.maximum(degrees - np.arange(n), 0)
    factor[:, np.arange(n), np.arange(n)] = np.sqrt(generator.chisquare(np.maximum(free, 1), (draws, n)))
    factor[:, :, free == 0] = 0
    path = (torch.from_numpy(factor) * variances.sqrt().unsqueeze(1)).cumsum(1)
    return path @ path.mT


def _below(z: float) -> float:
    """Return the probability that a standard normal number lies below ``z``."""
    return math.erfc(-z / math.sqrt(2)) / 2
