r"""A compiled model drafts, the original verifies: the original's own text, perhaps faster.

The draft writes ``block`` tokens, one after another; the original reads them all in one step and keeps as many as it
would have written itself, and one more that it writes there (Leviathan et al. 2023, arXiv 2211.17192; here greedy).
So what comes out is the original's greedy text, whatever the draft does: a poor one only costs time. A compiled model
is a draft with the original's vocabulary, and no training. The layers that both begin with run once for both, and
their keys and values are kept once (``surgery.compiler.shared_cache``).

Which drafts there are, by the wiring:

* ``":7 {7.attn | 8.attn} {7.mlp | 8.mlp} 9:"``, compiled: fused where that is possible, else taped;
* ``":20"``, the plain early exit (LayerSkip, Elhoushi et al. 2024, arXiv 2404.16710): all of its layers are shared;
* ``":7 9:"``, layers left out (Draft & Verify, Zhang et al. 2023, arXiv 2309.08168).

Identical means: every token is the likeliest one after those before it, as the original computes it when it reads a
block at once. By itself it reads one token a step, and sums in another order; so where two tokens are likeliest to
within rounding (1e-5 of the logits in float32), the two ways may choose differently, as two machines may.

What to expect, and how it is measured: ``surgery.compiler.acceptance``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import TransformerBridge

from surgery.compiler.shared_cache import Ids, Pair, SharedCache
from surgery.models.errors import ModelError
from surgery.models.loading import plain
from surgery.models.stack import Stack
from surgery.rebuild import fuse, tape
from surgery.wiring.value import Wiring

Model = Any  # a TransformerBridge, or a Hugging Face model


@dataclass(frozen=True)
class Drafted:
    """A text that was drafted and verified.

    Attributes: ``ids``, prompt and text; ``kept``, how many drafted tokens each step of the original kept; ``block``,
    how many it was offered at most; ``n_shared``, how many layers ran once for both models.
    """

    ids: Ids
    kept: tuple[int, ...]
    block: int
    n_shared: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that were looked at and kept: the first that is refused ends a step."""
        looked_at = sum(min(kept + 1, self.block) for kept in self.kept)
        return sum(self.kept) / looked_at if looked_at else float("nan")

    @property
    def per_step(self) -> float:
        """Tokens written for every step of the original."""
        return sum(kept + 1 for kept in self.kept) / max(1, len(self.kept))


def generate(
    original: Model,
    draft: "Model | Wiring | str",
    ids: Int[Tensor, "prompt pos"],
    max_new_tokens: int = 32,
    *,
    block: int = 4,
) -> Drafted:
    """Write the original's greedy text after ``ids``, drafted by another model.

    Args:
        original: a bridge (loaded, taped, built), or a Hugging Face model.
        draft: a wiring of the original, or a model of the same vocabulary; what they share is found by comparison.
        block: tokens drafted for a step of the original.

    Nothing stops it but ``max_new_tokens``. Cost: a step of the original for every ``per_step`` tokens, and ``block``
    steps of the draft; shared layers read every token once. What ``pair`` costs comes first: for several texts make the
    pair once and call ``write``.

    Raises as ``pair`` and ``write`` do.

    >>> import surgery
    >>> model = surgery.load("babel")
    >>> ids = model.tokenizer("p3 pf1 >other", return_tensors="pt")["input_ids"]
    >>> drafted = generate(model, ":8 {8.attn | 9.attn} {8.mlp | 9.mlp} 10:", ids, 3)
    >>> drafted.ids.shape[1] - ids.shape[1], drafted.n_shared
    (3, 8)
    """
    return write(pair(original, draft), ids, max_new_tokens, block=block)


def pair(original: Model, draft: "Model | Wiring | str") -> Pair:
    """The parts in which an original and its draft run (``shared_cache.Pair``), for any number of texts.

    Changes that are made to the models later may not be heard. Cost: building the draft where it is a wiring
    (``fuse.together``, ``tape.together``), a comparison of all weights, and a few F on a short prompt.

    Raises ValueError for models of different vocabularies, and a wiring of a model that is no bridge; WiringError for
    no wiring of the original; ModelError for a model without a Hugging Face form.
    """
    if isinstance(draft, str | Wiring):
        if not isinstance(original, TransformerBridge):
            raise ValueError(
                f'"{draft}" is a wiring, and {type(original).__name__} is no bridge: give surgery.load(model) as the '
                "original, or a model as the draft"
            )
        draft = compiled(original, draft)
    return Pair(hugging_face(original), hugging_face(draft))


def compiled(model: TransformerBridge, wiring: "Wiring | str") -> TransformerBridge:
    """The model of a wiring: fused where it has groups that can be, else taped, on the weights of ``model``.

    Raises WiringError for no wiring of this model.
    """
    whole = Stack(model).wiring(wiring)
    if not whole.is_serial:
        try:
            return fuse.together(model, whole)
        except (ModelError, ValueError):  # it is a draft all the same
            pass
    return tape.together(model, whole)


@torch.no_grad()
def write(models: Pair, ids: Int[Tensor, "prompt pos"], max_new_tokens: int = 32, *, block: int = 4) -> Drafted:
    """Write the original's greedy text after ``ids``, as ``generate`` does, with models that are paired already.

    Raises ValueError for more than one prompt, an empty one, and a block below 1.
    """
    if ids.shape[0] != 1 or not ids.shape[1] or block < 1:
        raise ValueError(f"one prompt at a time, of one token or more, in blocks of 1 or more; got {tuple(ids.shape)}")
    whole = ids.to(models.original.model.device)
    cache, stop = SharedCache(models), ids.shape[1] + max_new_tokens
    kept: list[int] = []
    if max_new_tokens > 0:
        whole = torch.cat([whole, _likeliest(cache, models.original, whole, 1)], 1)
    while whole.shape[1] < stop:
        offered = min(block, stop - whole.shape[1])
        drafted = whole
        for _ in range(offered):
            drafted = torch.cat([drafted, _likeliest(cache, models.draft, drafted, 1)], 1)
        own = _likeliest(cache, models.original, drafted, offered + 1)  # after the last token, and every drafted one
        agree = int((own[0, :offered] == drafted[0, -offered:]).cumprod(0).sum())
        whole = torch.cat([whole, own[:, : agree + 1]], 1)
        kept.append(agree)
        cache.forget(whole.shape[1] - 1)
    return Drafted(whole[:, :stop].to(ids.device), tuple(kept), block, models.n_shared)


def _likeliest(cache: SharedCache, part: Any, ids: Ids, count: int) -> Int[Tensor, "1 count"]:
    return cache.logits(part, ids, count).argmax(-1)


def hugging_face(model: Model) -> Any:
    """The Hugging Face model behind a bridge; itself if it is one. Raises ModelError for a bridge without."""
    if not isinstance(model, TransformerBridge):
        return model
    if (twin := plain(model)) is None:
        raise ModelError(
            f"{model.cfg.model_name} has no Hugging Face form, whose cache drafting needs: give a model that "
            "surgery.load made from one"
        )
    return twin
