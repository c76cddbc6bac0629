r"""What dropout does, exactly: identities that hold over all masks, and whether a model still has it on.

A unit ``x_i`` is kept with probability ``1 - p`` and then divided by it (inverted dropout), ``m_i x_i / (1 - p)``.

* Its expectation stays ``x_i``, and ``y = sum_i w_i m_i x_i / (1 - p)`` gets ``Var(y) = p / (1 - p) sum_i w_i^2
  x_i^2`` (``output_variance``).
* A unit of mean c and variance v over the data has variance ``(c^2 + v) / (1 - p) - c^2`` in training and v in
  testing: a shift that norms after it learn the wrong side of (``training_variance``, ``chain``; X. Li et al. 2018,
  arXiv 1801.05134).
* The normalised geometric mean of a softmax layer over all ``2^n`` masks is that layer with nothing dropped
  (``geometric_mean``; Baldi and Sadowski 2013). Their arithmetic mean is another, and through more than one layer
  neither is exact: ``surgery.dropout.mask_ensemble`` measures how far off.
* Masks are drawn anew for every position of every prompt. A dropped unit passes no gradient back at that position,
  and its incoming weights get none from there; from the positions where it was kept they get theirs in the same step.
  So no weight sits a step out, unless the mask is ``shared``: then those of a dropped unit do.

``live`` finds what is random in a model as it stands, ``require_off`` refuses to go on with it: every measure of this
package is about the model in evaluation mode.

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
CHAIN = {
    "layer": "layers passed",
    "training": "variance of a unit with dropout before every layer (mean over units)",
    "testing": "the same with dropout off",
    "shift": "training / testing",
}


def masks(n: int, p: float = 0.5) -> tuple[Bool[Tensor, "mask unit"], Float[Tensor, " mask"]]:
    """All ``2^n`` masks of ``n`` units (True is kept) and their probabilities, in float64.

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
    """``p / (1 - p) sum_i w_i^2 x_i^2``: over masks, of a weighted sum of dropped units. Its mean is that without.

    >>> output_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), 0.5)
    tensor(13.)
    """
    return _odds(p) * (weights * x).square().sum(-1)


def training_variance(
    mean: Float[Tensor, "*unit"], variance: Float[Tensor, "*unit"], p: float
) -> Float[Tensor, "*unit"]:
    """``(c^2 + v) / (1 - p) - c^2``, over data and masks, of a dropped unit whose variance in testing is v.

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
    """How the variance shift grows through linear layers with dropout before each: a row per layer (``CHAIN``), exact.

    ``mean`` and ``covariance`` are those of what enters the first.

    >>> turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    >>> chain([turn, turn], torch.zeros(2), torch.eye(2), 0.5)["shift"].tolist()
    [2.0, 4.0]
    """
    mean, training, testing, rows = mean.double(), covariance.double(), covariance.double(), []
    for layer, linear in enumerate(map(Tensor.double, maps), 1):
        dropped = training + (training_variance(mean, training.diagonal(), p) - training.diagonal()).diag()
        mean, training, testing = linear @ mean, linear @ dropped @ linear.T, linear @ testing @ linear.T
        with_, without = (float(found.diagonal().mean()) for found in (training, testing))
        rows.append((layer, with_, without, with_ / without if without else float("nan")))
    return pd.DataFrame(rows, columns=list(CHAIN))


def geometric_mean(
    weights: Float[Tensor, "outcome unit"],
    x: Float[Tensor, " unit"],
    p: float,
    bias: Float[Tensor, " outcome"] | None = None,
) -> Float[Tensor, " outcome"]:
    """Over all masks, the normalised geometric mean of ``softmax(W (m x) / (1 - p) + b)``: ``softmax(W x + b)``.

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
    """Over all masks, the mean of ``softmax(W (m x) / (1 - p) + b)``: what averaging samples comes to. It is not the
    scaled layer; see ``geometric_mean``.

    >>> W, x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([0.5, 1.0])
    >>> [[round(float(q), 3) for q in found] for found in (arithmetic_mean(W, x, 0.4), (W @ x).softmax(0))]
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
    """Names of all that is still random in a model: a bridge (its plain twin too, under ``twin: ``) or a Hugging Face
    model.

    By structure: dropout modules in training mode, and modules in training mode that keep a rate of their own (as
    ``attention_dropout`` of attention, ``layerdrop`` of a decoder). By running: the model runs twice from other torch
    seeds, and a module that makes something else of the same input is named, whether it has dropout in it, reads a rate
    from the config or has random hooks on it. In the second run every module gets and hands on what it did in the
    first, so each is judged by itself. Modes, weights and torch's generators stay as they were. Cost: 2 F on two short
    prompts, the twin the same.

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
    """Raise ValueError, with names and what to type, unless nothing in ``model`` is random (``live``)."""
    found = live(model)
    if not found:
        return
    inside = [name for name in found if not name.startswith("twin: ")]
    hooked = [name for name in inside if ".hook_" in name]
    typing = ["model.eval()"] if len(inside) > len(hooked) else []
    typing += ["surgery.models.plain(model).eval()"] if len(found) > len(inside) else []
    typing += ["model.reset_hooks()"] if hooked else []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise ValueError(f"still random: {', '.join(found[:3])}{more}. Type {' and '.join(typing)} first")


def _live(module: nn.Module, n_vocab: int) -> list[str]:
    shown = set(_structure(module)) | set(_running(module, n_vocab))
    return list(dict.fromkeys(_plain_name(name, one) for name, one in module.named_modules() if name in shown))


def _plain_name(name: str, module: nn.Module) -> str:
    return str(module.name) if isinstance(module, HookPoint) else name.replace("._original_component", "")


def _structure(module: nn.Module) -> Iterator[str]:
    for name, one in module.named_modules():
        if not one.training:
            continue
        own = [value for key, value in vars(one).items() if "drop" in key and isinstance(value, float)]
        rates = [one.p] if isinstance(one, nn.modules.dropout._DropoutNd) else own  # noqa: SLF001
        if any(rate > 0 for rate in rates):
            yield name


def _running(module: nn.Module, n_vocab: int) -> list[str]:
    ids = torch.randint(n_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    ids = ids.to(next(module.parameters()).device)
    first: dict[tuple[str, str], list[Any]] = {}
    found: dict[str, None] = {}
    calling: list[str] = []

    def same(key: tuple[str, str], value: Any, source: str) -> Any:
        """In the second run what was there in the first, if that was something else: then ``source`` is random."""
        if seed == 0:
            first.setdefault(key, []).append(tree_map(_copied, value))
        elif first.get(key) and _differ(before := first[key].pop(0), value):
            found[source] = None
            return before
        return None  # as it is: an equal copy would count as an edit to the bridge

    def enter(name: str) -> Callable[..., Any]:
        def fn(_: nn.Module, args: Any, kwargs: Any) -> Any:
            calling.append(name)
            return same((name, "given"), (args, kwargs), calling[-2] if len(calling) > 1 else name)

        return fn

    def leave(name: str) -> Callable[..., Any]:
        return lambda _, args, output: same((calling.pop(), "gives"), output, name)

    with torch.no_grad(), torch.random.fork_rng(), ExitStack() as listening:
        for name, one in module.named_modules():
            listening.callback(one.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            listening.callback(one.register_forward_hook(leave(name)).remove)
        for seed in (0, 1):
            torch.manual_seed(seed)
            module(input_ids=ids, use_cache=False)
    return list(found)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _differ(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return any(
        isinstance(a, Tensor) and (a.shape != b.shape or not torch.allclose(a, b, equal_nan=True)) for a, b in pairs
    )


def _odds(p: float) -> float:
    return probability(p) / (1 - p)
