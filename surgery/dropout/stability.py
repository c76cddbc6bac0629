r"""Does dropout make training steadier? Variance of activations and norms of gradients over training steps.

    frame = perceptrons.perceptrons(widths=(32, 64, 128), depths=(1, 2, 4), rates=(0.0, 0.5))
    print(*say.stability(frame), sep="\n")                  # each claim: confirmed, refuted or undecided
    draw.stability(frame)

    recorder = stability.Recorder(model, rate=0.1, seed=3)  # the same on a transformer's residual stream
    recorder.record(step, tokens)                           # in your own loop, after backward

The recorded quantities, in evaluation mode unless stated otherwise (``COLUMNS``):

    variance            mean over the units of a layer of Var over examples, after ReLU
    variance_training   the same with a mask for every example: for a unit with mean c and variance v it is
                        (c^2 + v) / (1 - p) - c^2 where the layer's input is not dropped, the variance shift
    gradient            norm of the training loss' gradient in the layer's weights, masks and minibatch as trained
    loss, heldout       nats per example (of the stream: per token)

Networks that differ only in the rate share data, first weights, batches and the random numbers behind their masks, so
claims rest on differences within a seed. Training is steady if little varies over the last half of the steps, by one of
three standard deviations, each judged and named: of log variance, of log variance about a straight line in the step (a
network that is still learning drifts, which is not unsteadiness), and of log gradient norm. Learning rate and number of
steps are the same for all networks, in the standard parametrisation: this does not tell how steady wide and narrow
networks would be, each at its own best learning rate. Control: ``rate`` 0; dropout is compared at equal held-out loss
too.

Sources: variance shift, Li et al. (2018, arXiv 1801.05134); a difference is small only if its whole interval is small,
Schuirmann (1987). The claims are those of the thread behind this project.

>>> from surgery.dropout.perceptrons import perceptrons
>>> frame = perceptrons((4, 8), (1,), (0.0, 0.5), (0, 1), steps=4, every=1, examples=16)
>>> len(run_statistics(frame))
8
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from surgery.dropout.perceptrons import COLUMNS, NETWORK, require_rate
from surgery.models.layer_sizes import layer_list
from surgery.models.scopes import CALL, FORWARD, Scope, scope
from surgery.models.tokens import Tokens
from surgery.stats.bootstrap import t_interval, verdict

RUN_STATISTICS: dict[str, str] = {
    **{name: COLUMNS[name] for name in NETWORK},
    "log_variance": "mean of log variance over the last half of the steps, and over layers, as below",
    "variation": "coefficient of variation of the variance over these steps",
    "variance_spread": "standard deviation of log variance over these steps",
    "variance_jitter": "the same about a straight line in the step: without drift",
    "gradient_spread": "standard deviation of log gradient norm over these steps",
    "heldout": "mean held-out loss over these steps (nats)",
    "converged": "first step at which the held-out loss is at most 5 % above its least",
}
NEGLIGIBLE = 0.05  # of log variance: a change whose whole interval is below 5 % is none
HARDLY = 0.5  # an effect hardly shows on a shallow network if it is less than this share of that on the deepest
LEAST = 3  # evaluations in the last half of the steps, for a standard deviation over them
SPREADS = {
    "variance_spread": "log variance",
    "variance_jitter": "log variance about its drift",
    "gradient_spread": "log gradient norm",
}
EFFECTS = {"heldout": "held-out loss, nats", "log_variance": "log variance"}


# --- the residual stream ----------------------------------------------------------------------------------------------


class Recorder:
    """Records the same of a transformer while you train it: call ``record`` regularly, and read ``frame`` at the end.

    It changes neither the model nor any random state: modes are restored module by module, so live dropout stays live,
    and an evaluation in training mode draws its own masks. Control: a run with ``rate`` 0 and the same seed.

    Raises ValueError for anything but a plain Hugging Face model, or a rate outside [0, 1).

    >>> from surgery import load, models
    >>> recorder = Recorder(models.plain(load("babel")), rate=0.0)
    >>> recorder.record(0, torch.arange(12).view(2, 6))
    >>> recorder.frame["layer"].tolist() == list(range(13)), bool((recorder.frame["variance"] > 0).all())
    (True, True)
    """

    def __init__(self, model: nn.Module, *, rate: float, seed: int = 0) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"Recorder reads a plain Hugging Face model, got {type(model).__name__}: give "
                "surgery.models.plain(...) of what surgery.load returned, or what a wrapper for several processes holds"
            )
        require_rate(rate)
        self.model, self.rate, self.seed = model, rate, seed
        self.blocks = list(layer_list(model, model.config.num_hidden_layers))
        self._rows: list[dict[str, Any]] = []

    def record(
        self, step: int, tokens: "Tokens | Tensor", *, loss: float = float("nan"), training: bool = False
    ) -> None:
        """Add a row per layer: variance of the stream, gradient norm and loss.

        Variance and loss are those on ``tokens`` (first positions left out), held out if they are; the gradient is
        ``.grad`` (after backward, before clipping, unscaled; NaN where there is none). ``loss`` is the training loss,
        if you want it in the table; ``training`` adds ``variance_training``. Cost: 1 F in evaluation mode, and 1 F more
        with ``training``.

        Raises ValueError for prompts of one token each.
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
        run = self.model.config.hidden_size, len(self.blocks), self.rate, self.seed, step
        for layer, values in enumerate(zip(variance, noisy, gradients, strict=True)):
            self._rows.append(dict(zip(COLUMNS, (*run, layer, *values, loss, heldout), strict=True)))

    @property
    def frame(self) -> pd.DataFrame:
        """The rows so far (``COLUMNS``); concatenate the frames of several runs with ``pd.concat``."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def _variances(self, tokens: Tokens, training: bool) -> tuple[list[float], float]:
        """Variance of x_0..x_L and next-token loss of one forward pass."""
        variances: list[float] = []
        keep = tokens.ensemble()

        def enters(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            variances.append(_token_variance(args[0] if args else kwargs["hidden_states"], keep))
            return inner(*args, **kwargs)

        def leaves(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            variances.append(_token_variance(output[0] if isinstance(output, tuple) else output, keep))
            return output

        places = {"position_ids": tokens.positions} if tokens.padded_left else {}
        with scope() as opened, torch.no_grad():
            for block in self.blocks:
                opened.around(block, FORWARD, enters)
            opened.around(self.blocks[-1], CALL, leaves)
            _set_mode(opened, self.model, training)
            logits = self.model(tokens.ids, attention_mask=tokens.mask.long(), use_cache=False, **places).logits
        predicted = tokens.mask[:, 1:] & tokens.mask[:, :-1]
        loss = cross_entropy(logits[:, :-1][predicted].float(), tokens.ids[:, 1:][predicted])
        return variances, float(loss)


def _set_mode(opened: Scope, model: nn.Module, training: bool) -> None:
    """Put all modules into one mode until the scope closes; then each is in its own again."""
    modes = {module: module.training for module in model.modules()}

    def put_back() -> None:
        for module, was in modes.items():
            module.training = was

    opened.undoing(put_back)
    model.train(training)


def _token_variance(x: Float[Tensor, "batch pos d_model"], keep: Bool[Tensor, "batch pos"]) -> float:
    return float(x[keep].double().var(0, correction=0).mean())


def _gradient_norm(block: nn.Module) -> float:
    norms = [parameter.grad.float().norm() for parameter in block.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm()) if norms else float("nan")


# --- statistics of training runs --------------------------------------------------------------------------------------


def run_statistics(frame: pd.DataFrame) -> pd.DataFrame:
    """Level and spread over the last half of the steps, mean over layers: a row per training run, ``RUN_STATISTICS``.

    A layer without variance or gradient at a step has no logarithm, and is left out there.

    Raises ValueError for fewer than three evaluations in the last half.
    """
    late = frame[frame["step"] >= frame.groupby(NETWORK)["step"].transform("max") / 2]
    count = int(late.groupby(NETWORK)["step"].nunique().min())
    if count < LEAST:
        raise ValueError(
            f"the last half of the steps has {count} evaluation{'s' * (count != 1)}, a spread over steps needs "
            f"{LEAST}: give a smaller every"
        )
    late = late.assign(log_variance=_log(late["variance"]), log_gradient=_log(late["gradient"]))
    layers = late.groupby([*NETWORK, "layer"])
    by_layer = pd.DataFrame(
        {
            "log_variance": layers["log_variance"].mean(),
            "variation": layers["variance"].std(ddof=0) / layers["variance"].mean(),
            "variance_spread": layers["log_variance"].std(ddof=0),
            "variance_jitter": layers[["step", "log_variance"]].apply(_about_line),
            "gradient_spread": layers["log_gradient"].std(ddof=0),
            "heldout": layers["heldout"].mean(),
        }
    )
    runs = by_layer.groupby(NETWORK).mean()
    runs["converged"] = pd.Series({key: _converged(part) for key, part in frame.groupby(NETWORK)}, dtype=float)
    return runs.reset_index()


def effects(runs: pd.DataFrame, rate: float, name: str) -> pd.Series:
    """A column of ``run_statistics`` with dropout minus the same without, by width, depth and seed.

    Raises ValueError where no two runs differ in the rate alone.
    """
    wide = runs.pivot_table(index=["width", "depth", "seed"], columns="rate", values=name)
    wide = wide.reindex(columns=[0.0, rate])
    paired = (wide[rate] - wide[0.0]).dropna()
    if paired.empty:
        raise ValueError(
            f"no run with dropout {rate:g} has one without dropout to be compared with: give runs of the "
            "same width, depth and seed"
        )
    return paired


def effects_at_equal_loss(frame: pd.DataFrame, rate: float) -> pd.Series:
    """``effects`` on log variance where both runs first have a held-out loss that both reach."""
    differences = {}
    logs = frame.assign(log_variance=_log(frame["variance"]))
    for key, part in logs[logs["rate"].isin([0, rate])].groupby(["width", "depth", "seed"]):
        curves = [run.groupby("step")[["log_variance", "heldout"]].mean() for _, run in part.groupby("rate")]
        if len(curves) == 2:
            both = max(curve["heldout"].min() for curve in curves)
            without, dropped = (curve.loc[curve["heldout"] <= both, "log_variance"].iloc[0] for curve in curves)
            differences[key] = dropped - without
    index = pd.MultiIndex.from_tuples(differences, names=["width", "depth", "seed"])
    return pd.Series(list(differences.values()), index=index, dtype=float).dropna()


def share_of_effect(shallow: Float[np.ndarray, " seed"], deep: Float[np.ndarray, " seed"]) -> str:
    """Is ``|shallow| < HARDLY |deep|``, by intervals over seeds? In one word.

    It is where ``HARDLY deep - shallow`` and ``HARDLY deep + shallow`` have the same sign, and it is not where they
    have opposite signs: so no sign has to be known beforehand, and none is chosen by the data.

    >>> share_of_effect(np.array([0.0, 0.1, 0.0]), np.array([1.0, 1.1, 1.0]))
    'confirmed'
    """
    sides = [verdict(*t_interval(HARDLY * deep + sign * shallow)[1:], "+", "-") for sign in (-1, 1)]
    if set(sides) <= {"+", "-"}:
        return "confirmed" if sides[0] == sides[1] else "refuted"
    return next(side for side in sides if side not in "+-")


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
    if not np.isfinite(by_step).all():  # diverged: it has no best
        return float("nan")
    return float((by_step <= 1.05 * by_step.min()).idxmax())


def _log(values: pd.Series) -> pd.Series:
    return np.log(values.where(values > 0))
