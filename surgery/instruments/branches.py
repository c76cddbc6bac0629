"""What a layer does differently at a token that is moved: many moves of one prompt in a single run of the layer.

Moves of several tokens would meet in attention, so each needs a prompt of its own. But what a layer writes at a token
depends on that token and on the prompt before it alone. So the moved tokens are appended to the clean prompt: each with
the position of the one it stands for, and attending to what comes before that one, and to itself. A run for every move
becomes one that is longer by a token for every move: ``1 + moves / pos`` instead of ``moves`` layers.

Not every model takes such a mask, and some would not obey it (a bias by distance, a window shorter than the prompt). So
the last token runs along unmoved, and where it does not get the clean run's update, every move is run by itself.

>>> import surgery
>>> from surgery import Stack
>>> from surgery.instruments.ensemble import Ensemble
>>> stack = Stack(surgery.load("babel"))
>>> ensemble = Ensemble(stack.tokens(["p3 pf1 pf4 >other", "o1 p2 >plain"]))
>>> visit = next(iter(ensemble.visits(stack)))
>>> prompt, place = torch.tensor([0, 1]), torch.tensor([[2, 1], [3, 2]])
>>> moved = 1.1 * visit.x[prompt, place]
>>> together, alone = answers(stack, visit, prompt, place, moved), one_by_one(stack, visit, prompt, place, moved)
>>> bool(together.norm() > 0 and torch.allclose(together, alone, atol=1e-5))
True
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.instruments.ensemble import Visit
from surgery.models.engine import Context
from surgery.models.exactness import rerun_tolerance
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens

State = Mapping[str, Float[Tensor, "prompt pos numbers"]]  # of the norms: ``Stack.norm_state``
Moved = Float[Tensor, "move chosen d_model"]


def answers(
    stack: Stack,
    visit: Visit,
    prompt: Int[Tensor, " chosen"],
    place: Int[Tensor, "move chosen"],
    moved: Moved,
    state: State | None = None,
) -> Moved:
    """Return by how much the layer's update changes at each moved token, in float64.

    Every move puts ``moved`` in the place of one token of every chosen prompt, and of no other. With ``state``, norms
    keep the denominators of the clean run. Cost: ``1 + moves / pos`` layers, or ``moves`` where these must run alone.
    """
    together = _together(stack, visit, prompt, place, moved, state)
    return one_by_one(stack, visit, prompt, place, moved, state) if together is None else together


def one_by_one(
    stack: Stack,
    visit: Visit,
    prompt: Int[Tensor, " chosen"],
    place: Int[Tensor, "move chosen"],
    moved: Moved,
    state: State | None = None,
) -> Moved:
    """Return what ``answers`` does, from a run of the whole batch for every move. Cost: ``moves`` layers."""
    with nullcontext() if state is None else stack.frozen(visit.context, dict(state)):
        written = []
        for where, rows in zip(place, moved, strict=True):
            x = visit.x.clone()
            x[prompt, where] = rows.to(x)
            written.append(stack.update(visit.layer, x, visit.context)[prompt, where].double())
    return torch.stack(written) - visit.u[prompt, place].double()


def _together(
    stack: Stack, visit: Visit, prompt: Tensor, place: Tensor, moved: Tensor, state: State | None
) -> Moved | None:
    """Return the answers from one run; None where that is not exact."""
    there = visit.context.tokens.mask[prompt].long()
    last = there.shape[1] - 1 - there.flip(1).argmax(1)  # of the prompt: there a window would show
    branches = torch.cat([place, last.unsqueeze(0)]).T
    context = None if stack.hooks_listen() else _with_branches(visit.context, prompt, branches)
    if context is None:
        return None
    rows = torch.cat([moved, visit.x[prompt, last].unsqueeze(0).to(moved)]).transpose(0, 1)
    x = torch.cat([visit.x[prompt], rows.to(visit.x)], 1)
    with nullcontext() if state is None else _frozen(stack, visit, context, prompt, branches, state):
        written = stack.update(visit.layer, x, context)[:, -branches.shape[1] :]
    clean = visit.u[prompt, last]
    if not (written[:, -1] - clean).abs().max() <= rerun_tolerance(stack) * clean.abs().max():  # nor NaN
        return None
    return written[:, :-1].transpose(0, 1).double() - visit.u[prompt, place].double()


@contextmanager
def _frozen(
    stack: Stack, visit: Visit, context: Context, prompt: Tensor, branches: Tensor, state: State
) -> Iterator[None]:
    """Freeze the norms, at a branch as they are at the token that it stands for."""
    n_prompts = len(visit.x)
    rows = torch.arange(len(prompt), device=prompt.device).unsqueeze(1)
    extended = {}
    for name, numbers in state.items():
        by_prompt = numbers.reshape(n_prompts, -1, numbers.shape[-1])[prompt]  # some layers flatten prompt and pos
        extended[name] = torch.cat([by_prompt, by_prompt[rows, branches]], 1)
        extended[name] = extended[name] if numbers.ndim == 3 else extended[name].flatten(0, 1)
    with stack.frozen(context, extended):
        yield


@torch.no_grad()
def _with_branches(context: Context, prompt: Tensor, branches: Int[Tensor, "chosen branch"]) -> Context | None:
    """Return the chosen prompts with more tokens, which see the prompt before their place; None if the model cannot."""
    tokens, count = Tokens(context.tokens.ids[prompt], context.tokens.mask[prompt]), branches.shape[1]
    n_prompts, length = tokens.ids.shape
    index = torch.arange(length + count, device=prompt.device)
    place = torch.cat([index[:length].expand(n_prompts, -1), branches], 1)
    seen = (index[:length] < place.unsqueeze(2)) & tokens.mask.unsqueeze(1)
    visible = torch.cat([seen, seen.new_zeros(n_prompts, length + count, count)], 2) | torch.eye(len(index)).to(seen)
    mask = torch.zeros_like(visible, dtype=context.x0.dtype).masked_fill(~visible, torch.finfo(context.x0.dtype).min)
    extended = Tokens(tokens.ids.gather(1, place), tokens.mask.gather(1, place))
    try:
        recording = context.engine.record(
            input_ids=extended.ids,
            attention_mask=mask.unsqueeze(1),
            position_ids=tokens.positions.gather(1, place),
            use_cache=False,
        )
    except Exception:  # whatever a model says to a mask of a form that it does not know
        return None
    return Context(extended, context.engine, recording)
