"""How long a difference of final streams is in logits, without reading out a word.

With the final norm's denominators kept, most heads are linear: logits are ``W z + b`` of the normed stream z. Then the
squared length of a difference of logits, centred over the vocabulary, is a quadratic form of d_model x d_model numbers,

    |c(y - y')|^2 = (z - z')^T G (z - z'),      G = W^T W - V m m^T,      m the mean of W's V rows,

and a readout of V words is needed for none of it. Heads that bend the logits (soft-capping) have no such form.

>>> from surgery import Stack
>>> from surgery.instruments import known_networks
>>> gram = head_gram(Stack(known_networks.random_network(d_model=16)))
>>> gram.shape
torch.Size([16, 16])
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.instruments.readout import LOGITS_AT_ONCE, final_norm, frozen_head, logits
from surgery.models.stack import Stack

_TRIED = 8  # vectors on which the form is compared with readouts


def head_gram(stack: Stack) -> Float[Tensor, "d_model d_model"] | None:
    """Return G of a model's head, in float64; None for a head that is not linear, or whose matrix is not found.

    It is compared with readouts of random vectors, so what is returned is the model's. Cost: as many readouts as
    d_model. Memory: ``readout.LOGITS_AT_ONCE`` numbers.
    """
    weight = _matrix(stack)
    if weight is None:
        return None
    gram = weight.new_zeros(stack.d_model, stack.d_model, dtype=torch.float64)
    mean = weight.mean(0, dtype=torch.float64)
    with torch.no_grad():
        for rows in weight.split(max(1, LOGITS_AT_ONCE // stack.d_model)):
            centred = (rows.double() - mean).to(torch.promote_types(rows.dtype, torch.float32))
            gram += (centred.T @ centred).double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(_TRIED, stack.d_model, generator=generator).to(stack.device, stack.dtype) for _ in range(2))
    with frozen_head(stack, x):
        apart = (logits(stack, x) - logits(stack, y)).double()
    expected = (apart - apart.mean(-1, keepdim=True)).square().sum(-1)
    return gram if torch.allclose(squares(stack, gram, x, x - y), expected, rtol=20 * stack.tolerance) else None


def squares(
    stack: Stack,
    gram: Float[Tensor, "d_model d_model"],
    clean: Float[Tensor, "row d_model"],
    difference: Float[Tensor, "... row d_model"],
) -> Float[Tensor, "... row"]:
    """Return the squared length, in centred logits, of what a change of ``clean`` by ``difference`` makes.

    The norm keeps the denominators of ``clean``. Cost: d_model^2 multiplications a vector.
    """
    norm = final_norm(stack)
    if norm is not None:
        with torch.no_grad():
            scale = norm.scale(clean)
            zero = torch.zeros_like(difference)
            unit = torch.ones_like(scale).expand(*difference.shape[:-1], 1)
            difference = (norm.with_state(difference, unit) - norm.with_state(zero, unit)).double() / scale.double()
    z = difference.double()
    return torch.linalg.vecdot(z @ gram, z)


def _matrix(stack: Stack) -> Float[Tensor, "d_vocab d_model"] | None:
    """Return the matrix of the module that reads out, if there is one of that shape."""
    module = stack.fastest_engine.module.get_submodule(stack.model.unembed.name)
    for candidate in (module, getattr(module, "original_component", None)):
        weight = getattr(candidate, "weight", None)
        if isinstance(candidate, nn.Module) and isinstance(weight, Tensor) and weight.shape[1:] == (stack.d_model,):
            return weight.detach()
    return None
