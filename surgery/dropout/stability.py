r"""Does dropout make training steadier? Variance of activations and norms of gradients over training steps.

    frame = stability.perceptrons(widths=(32, 64, 128), depths=(1, 2, 4), rates=(0.0, 0.5))
    print(*stability.found(frame), sep="\n")               # each claim: confirmed, refuted or undecided
    stability_figures.draw(frame)

    recorder = stability.Recorder(model, rate=0.1, seed=3)  # the same on a transformer's residual stream
    recorder.note(step, tokens)                             # in your own loop, after backward

What is recorded, in evaluation mode unless it says otherwise (``COLUMNS``):

    variance            mean over the units of a layer of Var over examples, after ReLU
    variance_training   the same with every example's own mask: for a unit with mean c and variance v it is
                        (c^2 + v) / (1 - p) - c^2 where what enters the layer is not dropped, the variance shift
    gradient            norm of the training loss' gradient in the layer's weights, masks and minibatch as trained
    loss, heldout       nats per example (of the stream: per token)

Networks that differ in nothing but the rate share data, first weights, batches and the numbers behind their masks, so
claims rest on differences within a seed. Steady is what varies little over the last half of the steps, by one of three
standard deviations, each judged and named: of log variance, of log variance about a straight line in the step (a
network that is still learning drifts, which is not unsteady), and of log gradient norm. Learning rate and number of
steps are the same for all networks, in the standard parametrisation: how steady wide and narrow networks would be, each
at its own best learning rate, this does not say. Control: ``rate`` 0; dropout is compared at equal held-out loss too.

Sources: variance shift, Li et al. (2018, arXiv 1801.05134); that a difference is small only if its whole interval is,
Schuirmann (1987). The claims are those of the thread behind this project.

>>> frame = perceptrons((4, 8), (1,), (0.0, 0.5), (0, 1), steps=4, every=1, examples=16)
>>> len(found(frame)), len(settled(frame))
(10, 8)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from surgery.dropout.perceptrons import COLUMNS as COLUMNS
from surgery.dropout.perceptrons import NETWORK as NETWORK
from surgery.dropout.perceptrons import perceptrons as perceptrons
from surgery.models.layer_sizes import layer_list
from surgery.models.tokens import Tokens
from surgery.stats import bootstrap as stats

SETTLED = {
    **{name: COLUMNS[name] for name in NETWORK},
    "log_variance": "mean of log variance over the last half of the steps, and over layers, as below",
    "variation": "coefficient of variation of the variance over these steps",
    "variance_spread": "standard deviation of log variance over these steps",
    "variance_jitter": "the same about a straight line in the step: without drift",
    "gradient_spread": "standard deviation of log gradient norm over these steps",
    "heldout": "mean held-out loss over these steps (nats)",
    "converged": "first step at which the held-out loss is at most 5 % above its least",
}
NEGLIGIBLE = 0.05  # of log variance: a change surely below 5 % is none
HARDLY = 0.5  # an effect on a shallow network hardly shows if it is less than this share of the deepest one's
LEAST = 3  # looks in the last half of the steps, for a standard deviation over them


# --- the residual stream ----------------------------------------------------------------------------------------------


class Recorder:
    """The same of a transformer while you train it: call ``note`` now and then, and read ``frame`` at the end.

    It changes neither the model nor any random state: modes are put back module by module, so dropout that was live
    goes on being so, and masks of a look in training mode are its own. Control: a run with ``rate`` 0, same seed.

    Raises ValueError for anything but a plain Hugging Face model, or a rate outside [0, 1).

    >>> from surgery import load, models
    >>> recorder = Recorder(models.plain(load("babel")), rate=0.0)
    >>> recorder.note(0, torch.arange(12).view(2, 6))
    >>> recorder.frame["layer"].tolist() == list(range(13)), bool((recorder.frame["variance"] > 0).all())
    (True, True)
    """

    def __init__(self, model: nn.Module, *, rate: float, seed: int = 0) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"Recorder reads a plain Hugging Face model, got {type(model).__name__}: give "
                "surgery.models.plain(...) of what surgery.load returned, or what a wrapper for several processes holds"
            )
        if not 0 <= rate < 1:
            raise ValueError(f"rate = {rate}: it is the probability of dropping a unit, from 0 (none) to below 1")
        self.model, self.rate, self.seed = model, rate, seed
        self.blocks = list(layer_list(model, model.config.num_hidden_layers))
        self._rows: list[dict[str, Any]] = []

    def note(self, step: int, tokens: "Tokens | Tensor", *, loss: float = float("nan"), training: bool = False) -> None:
        """A row per stream: variance over ``tokens`` (first positions left out), gradient norm per layer as ``.grad``
        has it (after backward, before clipping, unscaled; NaN where there is none), and the loss on ``tokens``, which
        is held out if they are.

        ``loss`` is the training loss, if you want it in the table; ``training`` asks for ``variance_training`` too.
        Cost: 1 F in evaluation mode, and 1 F more with ``training``.

        Raises ValueError for tokens of which none is left.
        """
        tokens = Tokens.of(tokens)
        if not tokens.ensemble().any():
            raise ValueError("every prompt has one token, and first positions are left out: give longer prompts")
        variance, heldout = self._variances(tokens, False)
        noisy = [float("nan")] * len(variance)
        if training:
            device = tokens.ids.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(step * 2**20 + self.seed)
                noisy, _ = self._variances(tokens, True)
        gradients = [*map(_gradient_norm, self.blocks), float("nan")]
        about = self.model.config.hidden_size, len(self.blocks), self.rate, self.seed, step
        for layer, values in enumerate(zip(variance, noisy, gradients, strict=True)):
            self._rows.append(dict(zip(COLUMNS, (*about, layer, *values, loss, heldout), strict=True)))

    @property
    def frame(self) -> pd.DataFrame:
        """What was noted so far (``COLUMNS``); frames of several runs are put together with ``pd.concat``."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def _variances(self, tokens: Tokens, training: bool) -> tuple[list[float], float]:
        """Variance of x_0..x_L and next-token loss of one forward pass."""
        found: list[float] = []
        keep = tokens.ensemble()

        def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(_token_variance(args[0] if args else kwargs["hidden_states"], keep))

        def leaves(_: nn.Module, __: Any, output: Any) -> None:
            found.append(_token_variance(output[0] if isinstance(output, tuple) else output, keep))

        hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in self.blocks]
        hooks.append(self.blocks[-1].register_forward_hook(leaves))
        places = {"position_ids": tokens.positions} if tokens.padded_left else {}
        try:
            with torch.no_grad(), _mode(self.model, training):
                logits = self.model(tokens.ids, attention_mask=tokens.mask.long(), use_cache=False, **places).logits
        finally:
            for hook in hooks:
                hook.remove()
        told = tokens.mask[:, 1:] & tokens.mask[:, :-1]
        return found, float(cross_entropy(logits[:, :-1][told].float(), tokens.ids[:, 1:][told]))


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in one mode; afterwards each in its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, was in modes.items():
            module.training = was


def _token_variance(x: Float[Tensor, "batch pos d_model"], keep: Bool[Tensor, "batch pos"]) -> float:
    return float(x[keep].double().var(0, correction=0).mean())


def _gradient_norm(block: nn.Module) -> float:
    norms = [parameter.grad.float().norm() for parameter in block.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm()) if norms else float("nan")


# --- what it says -----------------------------------------------------------------------------------------------------


def settled(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per training run (``SETTLED``): level and spread over the last half of its steps, mean over layers.

    A layer in which nothing varies, or that has no gradient, has no logarithm at that step, and is left out there.

    Raises ValueError for fewer than three looks in the last half.
    """
    late = frame[frame["step"] >= frame.groupby(NETWORK)["step"].transform("max") / 2]
    looks = int(late.groupby(NETWORK)["step"].nunique().min())
    if looks < LEAST:
        raise ValueError(
            f"the last half of the steps has {looks} look{'s' * (looks != 1)}, a spread over steps needs {LEAST}: look "
            "more often, with a smaller every"
        )
    late = late.assign(log_variance=_log(late["variance"]), log_gradient=_log(late["gradient"]))
    layers = late.groupby([*NETWORK, "layer"])
    found = pd.DataFrame(
        {
            "log_variance": layers["log_variance"].mean(),
            "variation": layers["variance"].std(ddof=0) / layers["variance"].mean(),
            "variance_spread": layers["log_variance"].std(ddof=0),
            "variance_jitter": layers[["step", "log_variance"]].apply(_about_line),
            "gradient_spread": layers["log_gradient"].std(ddof=0),
            "heldout": layers["heldout"].mean(),
        }
    )
    found = found.groupby(NETWORK).mean()
    found["converged"] = pd.Series({key: _converged(part) for key, part in frame.groupby(NETWORK)}, dtype=float)
    return found.reset_index()


def found(frame: pd.DataFrame) -> list[str]:
    """The claims, a sentence each, by the 95 % interval over seeds (Student's t) of differences within a seed.

    Confirmed or refuted where the interval lies on one side; that dropout changes nothing, only where the whole
    interval is below 5 %. Claims about width and depth are judged where there are several. Nothing corrects for the
    number of sentences: where there is nothing, one in twenty says that there is.

    Raises ValueError where no run has ``rate`` 0 or all have, and as ``settled`` does.
    """
    runs = settled(frame)
    rates, widths, depths = (sorted(runs[name].unique().tolist()) for name in ("rate", "width", "depth"))
    if rates[0] != 0 or len(rates) < 2:
        raise ValueError(
            f"dropout is compared with training without it, the rates are {', '.join(f'{p:g}' for p in rates)}: give 0 "
            "and at least one more"
        )
    said = []
    for rate in rates[1:]:
        said += _changes(frame, runs, rate)
    if len(widths) > 1:
        said += [_wider(runs, rate, name) for rate in rates for name in SPREADS if runs[name].notna().any()]
    if len(depths) > 1:
        said.append(_sooner(runs, depths[0], depths[-1]))
        said += [_hardly(runs, rate, name, depths[0], depths[-1]) for rate in rates[1:] for name in SHOWS]
    return said


SPREADS = {
    "variance_spread": "log variance",
    "variance_jitter": "log variance about its drift",
    "gradient_spread": "log gradient norm",
}
SHOWS = {"heldout": "held-out loss, nats", "log_variance": "log variance"}


def _changes(frame: pd.DataFrame, runs: pd.DataFrame, rate: float) -> list[str]:
    """Does dropout change the variance, at equal steps and at equal loss, and is it steadier?"""
    said = []
    for values, where in (
        (effects(runs, rate, "log_variance"), "after as many steps"),
        (_matched(frame, rate), "at equal held-out loss"),
    ):
        mean, low, high = np.exp(stats.t_interval(_by_seed(values)))
        ends = f" [{low:.2f}, {high:.2f}]" if low == low else " (no interval)"
        said.append(
            f"Dropout {rate:g} changes the variance of activations, {where}: {_changed(_by_seed(values))}; {mean:.2f}"
            f"{ends} times that without (geometric mean){_each_depth(values, _changed)}."
        )
    for name, what in (
        ("variation", "coefficient of variation"),
        ("variance_jitter", f"standard deviation of {SPREADS['variance_jitter']}"),
    ):
        values = effects(runs, rate, name)
        said.append(
            f"With dropout {rate:g} the variance is steadier over training: {_falls(_by_seed(values))}; {what} over "
            f"the last half of the steps, with less without: {_text(_by_seed(values))}{_each_depth(values, _falls)}."
        )
    return said


def _wider(runs: pd.DataFrame, rate: float, name: str) -> str:
    wide = runs[runs["rate"] == rate].pivot_table(index="seed", columns="width", values=name).dropna()
    octaves = np.log2(wide.columns.to_numpy(float))
    octaves -= octaves.mean()
    slopes = wide.to_numpy() @ octaves / (octaves @ octaves)
    return (
        f"A wider network trains more stably, {named(rate)}: {_falls(slopes)}; standard deviation of "
        f"{SPREADS[name]} over the last half of the steps, per doubling of the width: {_text(slopes)}."
    )


def _sooner(runs: pd.DataFrame, shallow: int, deep: int) -> str:
    steps = runs[runs["rate"] == 0].pivot_table(index="seed", columns="depth", values="converged")
    steps = steps[[shallow, deep]].dropna()
    difference = (steps[deep] - steps[shallow]).to_numpy()
    return (
        f"A shallower network converges sooner, without dropout: {_falls(-difference)}; the best held-out loss, to 5 "
        f"%, after {steps[shallow].mean():.0f} steps with {counted(shallow)} and {steps[deep].mean():.0f} with "
        f"{counted(deep)}, difference {_text(difference, 0)}."
    )


def _hardly(runs: pd.DataFrame, rate: float, name: str, shallow: int, deep: int) -> str:
    """Is ``|shallow| < HARDLY |deep|``? It is where ``HARDLY deep - shallow`` and ``HARDLY deep + shallow`` have one
    sign, it is not where they have two: so no sign has to be known beforehand, and none is chosen by the data."""
    words, values = list[str](), list[str]()
    for width, part in effects(runs, rate, name).groupby("width"):
        by_depth = part.unstack("depth").reindex(columns=[shallow, deep]).dropna()
        if by_depth.empty:
            continue
        near, far = by_depth[shallow].to_numpy(), by_depth[deep].to_numpy()
        sides = [stats.verdict(*stats.t_interval(HARDLY * far + sign * near)[1:], "+", "-") for sign in (-1, 1)]
        if set(sides) <= {"+", "-"}:
            words.append("confirmed" if sides[0] == sides[1] else "refuted")
        else:
            words.append(next(side for side in sides if side not in "+-"))
        values.append(f"{_text(near)} and {_text(far)} at width {width}")
    word = words[0] if len(set(words)) == 1 else f"undecided, from width to width {', '.join(words) or 'not trained'}"
    return (
        f"With {counted(shallow)} dropout {rate:g} hardly shows, by less than {HARDLY:g} of what it does with "
        f"{counted(deep)}: {word}; with less without, {SHOWS[name]}: {', '.join(values)}."
    )


def effects(runs: pd.DataFrame, rate: float, name: str) -> pd.Series:
    """A column of ``settled`` with dropout minus the same without, by width, depth and seed.

    Raises ValueError where no two runs differ in the rate alone.
    """
    wide = runs.pivot_table(index=["width", "depth", "seed"], columns="rate", values=name)
    wide = wide.reindex(columns=[0.0, rate])
    paired = (wide[rate] - wide[0.0]).dropna()
    if paired.empty:
        raise ValueError(
            f"no run with dropout {rate:g} has one without beside it that it can be compared with: give runs of the "
            "same width, depth and seed"
        )
    return paired


def _matched(frame: pd.DataFrame, rate: float) -> pd.Series:
    """``effects`` on log variance, each run at its first look with a held-out loss that both reach."""
    found = {}
    logs = frame.assign(log_variance=_log(frame["variance"]))
    for key, part in logs[logs["rate"].isin([0, rate])].groupby(["width", "depth", "seed"]):
        curves = [run.groupby("step")[["log_variance", "heldout"]].mean() for _, run in part.groupby("rate")]
        if len(curves) == 2:
            both = max(curve["heldout"].min() for curve in curves)
            without, dropped = (curve.loc[curve["heldout"] <= both, "log_variance"].iloc[0] for curve in curves)
            found[key] = dropped - without
    index = pd.MultiIndex.from_tuples(found, names=["width", "depth", "seed"])
    return pd.Series(list(found.values()), index=index, dtype=float).dropna()


def _about_line(values: pd.DataFrame) -> float:
    """Standard deviation of log variance about its least-squares line in the step."""
    step, y = values.dropna().to_numpy(float).T
    if len(y) < LEAST:
        return float("nan")
    step, y = step - step.mean(), y - y.mean()
    slope = step @ y / (step @ step)
    return float((y - slope * step).std())


def _converged(run: pd.DataFrame) -> float:
    by_step = run.groupby("step")["heldout"].mean()
    return float((by_step <= 1.05 * by_step.min()).idxmax())


def _by_seed(values: pd.Series) -> Float[np.ndarray, " seed"]:
    return values.groupby("seed").mean().to_numpy()


def _each_depth(values: pd.Series, judge: Callable[[Float[np.ndarray, " seed"]], str]) -> str:
    """What ``judge`` says at every depth, where there are several: what all of them average to can hide much."""
    words = [f"{judge(_by_seed(part))} with {counted(int(str(depth)))}" for depth, part in values.groupby("depth")]
    return f"; by depth: {', '.join(words)}" if len(words) > 1 else ""


def _changed(values: Float[np.ndarray, " seed"]) -> str:
    _, low, high = stats.t_interval(values)
    if low > -NEGLIGIBLE and high < NEGLIGIBLE:
        return f"refuted (less than {NEGLIGIBLE:.0%})"
    return stats.verdict(low, high, "confirmed (higher)", "confirmed (lower)")


def _falls(values: Float[np.ndarray, " seed"]) -> str:
    return stats.verdict(*stats.t_interval(values)[1:], "refuted", "confirmed")


def _text(values: Float[np.ndarray, " seed"], digits: int = 3) -> str:
    mean, low, high = stats.t_interval(values)
    return f"{mean:+.{digits}f}" + (f" [{low:+.{digits}f}, {high:+.{digits}f}]" if low == low else "")


def named(rate: float) -> str:
    return f"with dropout {rate:g}" if rate else "without dropout"


def counted(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _log(values: pd.Series) -> pd.Series:
    return np.log(values.where(values > 0))
