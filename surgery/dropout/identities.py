r"""Exact identities of dropout over all masks, and a check whether a model still has dropout on.

A unit ``x_i`` is kept with probability ``1 - p`` and then divided by it (inverted dropout), ``m_i x_i / (1 - p)``.

* Its expectation stays ``x_i``, and ``y = sum_i w_i m_i x_i / (1 - p)`` gets ``Var(y) = p / (1 - p) sum_i w_i^2
  x_i^2`` (``output_variance``).
* A unit of mean c and variance v over the data has variance ``(c^2 + v) / (1 - p) - c^2`` in training and v in
  testing: a shift, so that norms after it learn statistics that do not hold in testing (``training_variance``,
  ``chain``; X. Li et al. 2018, arXiv 1801.05134).
* The normalised geometric mean of a softmax layer over all ``2^n`` masks is that layer with nothing dropped
  (``geometric_mean``; Baldi and Sadowski 2013). Their arithmetic mean differs, and through more than one
  layer neither is exact: ``surgery.dropout.mask_ensemble`` measures how far off.
* Masks are drawn anew for every position of every prompt. A dropped unit passes no gradient back at that position,
  and its incoming weights get none from there, but they do from the positions where it was kept. So every weight is
  updated in every step, unless the mask is ``shared``: then the weights of a dropped unit are not.

``live`` lists what is random in a model as it is, ``require_off`` raises if anything is: every measure of this package
is about the model in evaluation mode.

>>> kept, share = masks(2, 0.25)
>>> kept.int().tolist(), share.tolist()
([[0, 0], [1, 0], [0, 1], [1, 1]], [0.0625, 0.1875, 0.1875, 0.5625])
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from transformer_lens import TransformerBridge
from transformer_lens.hook_points import HookPoint

from surgery.hooks import probability
from surgery.models.loading import plain

MOST_UNITS = 16  # 65536 masks
CHAIN: dict[str, str] = {
    "layer": "layers passed",
    "training": "variance of a unit with dropout before every layer (mean over units)",
    "testing": "the same with dropout off",
    "shift": "training / testing",
}


def masks(n: int, p: float = 0.5) -> tuple[Bool[Tensor, "mask unit"], Float[Tensor, " mask"]]:
    """List all ``2^n`` masks of ``n`` units (True is kept) with their probabilities, in float64.

    Raises ValueError for n outside 1 to ``MOST_UNITS`` and p outside [0, 1).
    """
    if not 1 <= n <= MOST_UNITS:
        raise ValueError(f"all masks are listed for 1 to {MOST_UNITS} units, not for {n}: draw some with hooks.dropout")
    kept = (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).bool()
    count = kept.sum(1).double()
    return kept, (1 - probability(p)) ** count * p ** (n - count)


def output_variance(
    weights: Float[Tensor, "*output unit"], x: Float[Tensor, " unit"], p: float
) -> Float[Tensor, "*output"]:
    """Variance over masks of a weighted sum of dropped units, ``p / (1 - p) sum_i w_i^2 x_i^2``.

    The mean of the sum over masks is its value without dropout.

    >>> output_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), 0.5)
    tensor(13.)
    """
    return _odds(p) * (weights * x).square().sum(-1)


def training_variance(
    mean: Float[Tensor, "*unit"], variance: Float[Tensor, "*unit"], p: float
) -> Float[Tensor, "*unit"]:
    """Variance over data and masks, ``(c^2 + v) / (1 - p) - c^2``, of a dropped unit of mean c and variance v.

    >>> training_variance(torch.tensor(1.0), torch.tensor(0.0), 0.5)  # a constant varies
    tensor(1.)
    """
    return (mean.square() + variance) / (1 - probability(p)) - mean.square()


def chain(
    maps: Sequence[Float[Tensor, "output unit"]],
    mean: Float[Tensor, " unit"],
    covariance: Float[Tensor, "unit unit"],
    p: float,
) -> pd.DataFrame:
    """The exact variance shift through linear layers with dropout before each: a row per layer (``CHAIN``).

    ``mean`` and ``covariance`` are those of the input to the first layer.

    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> chain([turn, turn], torch.zeros(2), torch.eye(2), 0.5)["shift"].tolist()
    [2.0, 4.0]
    """
    mean, training, testing, rows = mean.double(), covariance.double(), covariance.double(), []
    for layer, linear in enumerate(map(Tensor.double, maps), 1):
        dropped = training + (training_variance(mean, training.diagonal(), p) - training.diagonal()).diag()
        mean, training, testing = linear @ mean, linear @ dropped @ linear.T, linear @ testing @ linear.T
        noisy, still = (float(covariance.diagonal().mean()) for covariance in (training, testing))
        rows.append((layer, noisy, still, noisy / still if still else float("nan")))
    return pd.DataFrame(rows, columns=list(CHAIN))


def geometric_mean(
    weights: Float[Tensor, "outcome unit"],
    x: Float[Tensor, " unit"],
    p: float,
    bias: Float[Tensor, " outcome"] | None = None,
) -> Float[Tensor, " outcome"]:
    """Normalised geometric mean over all masks of ``softmax(W (m x) / (1 - p) + b)``; it equals ``softmax(W x + b)``.

    >>> W, x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([0.5, 1.0])
    >>> bool((geometric_mean(W, x, 0.4) - (W.double() @ x.double()).softmax(0)).abs().max() < 1e-12)
    True
    """
    log_p, share = _over_masks(weights, x, p, bias)
    return (share @ log_p).softmax(-1)


def arithmetic_mean(
    weights: Float[Tensor, "outcome unit"],
    x: Float[Tensor, " unit"],
    p: float,
    bias: Float[Tensor, " outcome"] | None = None,
) -> Float[Tensor, " outcome"]:
    """Mean over all masks of ``softmax(W (m x) / (1 - p) + b)``, the limit of averaging samples.

    It is not the scaled layer; see ``geometric_mean``.

    >>> W, x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([0.5, 1.0])
    >>> [[round(float(q), 3) for q in mean] for mean in (arithmetic_mean(W, x, 0.4), (W @ x).softmax(0))]
    [[0.704, 0.296], [0.881, 0.119]]
    """
    log_p, share = _over_masks(weights, x, p, bias)
    return share @ log_p.exp()


def _over_masks(
    weights: Float[Tensor, "outcome unit"], x: Float[Tensor, " unit"], p: float, bias: Float[Tensor, " outcome"] | None
) -> tuple[Float[Tensor, "mask outcome"], Float[Tensor, " mask"]]:
    kept, share = masks(len(x), p)
    logits = (kept * x.double() / (1 - p)) @ weights.double().T
    return (logits if bias is None else logits + bias.double()).log_softmax(-1), share


def live(model: nn.Module) -> list[str]:
    """Names of all modules of a model that are still random.

    The model is a bridge (its plain twin is checked too, under ``twin: ``) or a Hugging Face model. By structure:
    dropout modules in training mode, and modules in training mode with a rate of their own (as ``attention_dropout`` of
    attention, ``layerdrop`` of a decoder). By running: the model runs twice from different torch seeds, and a module
    whose output differs for the same input is named, whether it contains dropout, reads a rate from the config or has
    random hooks. In the second run every module gets and passes on the values of the first, so each is judged by
    itself. Modes, weights and torch's generators do not change. Cost: 2 F on two short prompts, the same for the twin.

    >>> import surgery
    >>> live(surgery.load("babel"))
    []
    """
    if not isinstance(model, TransformerBridge):
        config: Any = model.config
        return _live(model, config.get_text_config().vocab_size)
    twin = plain(model)
    beside = [] if twin is None else [f"twin: {name}" for name in _live(twin, model.cfg.d_vocab)]
    return _live(model.original_model, model.cfg.d_vocab) + beside


def require_off(model: nn.Module) -> None:
    """Raise ValueError if anything in ``model`` is random (``live``); the message names it and says what to type."""
    names = live(model)
    if not names:
        return
    inside = [name for name in names if not name.startswith("twin: ")]
    hooked = [name for name in inside if ".hook_" in name]
    calls = ["model.eval()"] if len(inside) > len(hooked) else []
    calls += ["surgery.models.plain(model).eval()"] if len(names) > len(inside) else []
    calls += ["model.reset_hooks()"] if hooked else []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise ValueError(f"still random: {', '.join(names[:3])}{more}. Type {' and '.join(calls)} first")


def _live(module: nn.Module, n_vocab: int) -> list[str]:
    random = set(_structure(module)) | set(_running(module, n_vocab))
    return list(dict.fromkeys(_plain_name(name, part) for name, part in module.named_modules() if name in random))


def _plain_name(name: str, module: nn.Module) -> str:
    return str(module.name) if isinstance(module, HookPoint) else name.replace("._original_component", "")


def _structure(module: nn.Module) -> Iterator[str]:
    """Yield modules in training mode with a rate above 0."""
    for name, part in module.named_modules():
        if not part.training:
            continue
        own = [value for key, value in vars(part).items() if "drop" in key and isinstance(value, float)]
        rates = [part.p] if isinstance(part, nn.modules.dropout._DropoutNd) else own  # noqa: SLF001
        if any(rate > 0 for rate in rates):
            yield name


def _running(module: nn.Module, n_vocab: int) -> list[str]:
    """Modules whose output differs between two runs from different torch seeds."""
    ids = torch.randint(n_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(module.parameters()).device)
    first: dict[tuple[str, str], list[Any]] = {}
    random: dict[str, None] = {}
    calling: list[str] = []

    def replay(key: tuple[str, str], value: Any, source: str) -> Any:
        """Return the value of the first run if the second differs, and note that ``source`` is random."""
        if seed == 0:
            first.setdefault(key, []).append(tree_map(_copy, value))
        elif first.get(key) and _differ(before := first[key].pop(0), value):
            random[source] = None
            return before
        return None  # as it is: an equal copy would count as an edit to the bridge

    def enter(name: str) -> Callable[..., Any]:
        def fn(_: nn.Module, args: Any, kwargs: Any) -> Any:
            calling.append(name)
            return replay((name, "input"), (args, kwargs), calling[-2] if len(calling) > 1 else name)

        return fn

    def leave(name: str) -> Callable[..., Any]:
        return lambda _, args, output: replay((calling.pop(), "output"), output, name)

    with torch.no_grad(), torch.random.fork_rng(), ExitStack() as listening:
        for name, part in module.named_modules():
            listening.callback(part.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            listening.callback(part.register_forward_hook(leave(name)).remove)
        for seed in (0, 1):
            torch.manual_seed(seed)
            module(input_ids=ids, use_cache=False)
    return list(random)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _differ(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return any(
        isinstance(a, Tensor) and (a.shape != b.shape or not torch.allclose(a, b, equal_nan=True)) for a, b in pairs
    )


def _odds(p: float) -> float:
    return probability(p) / (1 - p)
