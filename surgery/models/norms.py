"""A norm whose denominator, and mean, are given instead of computed."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.models.scopes import FORWARD, own


class FrozenNorm:
    """A norm whose denominator, and mean, are given instead of computed.

    A norm is ``A(x) / s(x) + b`` with ``A`` linear and ``s`` the root of mean square (or variance) plus epsilon.
    Which of the two, and ``b``, are determined by running the module on ``probe``, so every variant of RMSNorm and
    LayerNorm is covered: ``norm(0)`` is ``b``; a norm that subtracts the mean ignores an added constant. Frozen, it is
    ``(norm(x) - b) s(x) / s_given + b``.

    The mean is one more number that every layer moves and every later one reads. LayerNorm is ``g (x - mean(x)) / s(x)
    + b`` with a gain ``g`` a dimension, so with a given mean it gains ``g (mean(x) - mean_given) / s_given``.

    Attributes: ``module``; ``device``, where its weights are; ``forward``, its own computation; ``centres``, whether it
    subtracts the mean.

    Raises:
        ValueError: the module is not a linear map over a root mean square.
    """

    def __init__(self, module: nn.Module, probe: Float[Tensor, "n d_model"]) -> None:
        self.module = module
        self.device = next(module.parameters(), probe).device  # layers may lie on several
        probe = probe.to(self.device)
        self.forward = own(module, FORWARD)  # not a frozen one, where norms are frozen already
        shifted, plain, bias = (self.forward(x) for x in (probe + 1, probe, torch.zeros_like(probe)))
        self.centres = torch.allclose(shifted, plain, rtol=1e-3, atol=1e-3 * float((plain - bias).abs().max()))
        self._bias = bias[:1]
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        self._eps = self._measured_epsilon(probe) if eps is None else float(eps)
        doubled = (self.forward(2 * probe) - bias) * self.scale(2 * probe)
        once = (plain - bias) * self.scale(probe)
        if not torch.allclose(doubled, 2 * once, rtol=1e-3, atol=1e-3 * float(once.abs().max())):
            raise ValueError(
                f"{type(module).__name__} is not a linear map over a root mean square; it cannot be frozen"
            )

        self._gain = self._measured_gain(probe, once) if self.centres else None

    def _measured_gain(
        self, probe: Float[Tensor, "n d_model"], read: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, " d_model"] | None:
        """The gain of every dimension, from what the norm reads of ``probe``; None where ``A`` mixes dimensions."""
        centred = probe - probe.mean(-1, keepdim=True)
        gain = (read * centred).sum(0) / centred.square().sum(0)
        fits = torch.allclose(gain * centred, read, rtol=1e-3, atol=1e-3 * float(read.abs().max()))
        return gain.detach() if fits else None

    def _measured_epsilon(self, probe: Float[Tensor, "n d_model"]) -> float:
        """The epsilon of a norm that does not show it, from how it shrinks vectors of about its size.

        With ``m`` the mean square, ``norm(x) - b`` is ``A x / sqrt(m + eps)``: where halving it takes a vector with
        ``m = eps / 3``, large vectors show ``A``, and the ratio of the two gives ``eps``.
        """
        square = (
            (probe - probe.mean(-1, keepdim=True) if self.centres else probe).double().pow(2).mean(-1, keepdim=True)
        )
        unit = probe / square.sqrt().to(probe.dtype)
        whole = (self.forward(1e4 * unit) - self._bias).detach().double().norm(dim=-1)
        found = 0.0
        for exponent in range(-14, 0):
            size = 10.0**exponent  # the mean square of a smaller vector
            share = ((self.forward(size**0.5 * unit) - self._bias).detach().double().norm(dim=-1) / whole).mean()
            if 0.3 < share < 0.95:
                found = float(size * (share**-2 - 1))
        return found

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """The denominator that the norm uses on ``x``."""
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide.pow(2).mean(-1, keepdim=True) + self._eps).sqrt()

    def state(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... numbers"]:
        """What the norm computes of ``x``: the denominator and, where it subtracts it, the mean."""
        scale = self.scale(x)
        return scale if self._gain is None else torch.cat([scale, x.mean(-1, keepdim=True).to(scale)], -1)

    def with_state(
        self, x: Float[Tensor, "... d_model"], state: Float[Tensor, "... numbers"]
    ) -> Float[Tensor, "... d_model"]:
        """The norm of ``x`` with the denominator and, if ``state`` has it, the mean of another stream."""
        scale = state[..., :1]
        result = (self.forward(x) - self._bias) * (self.scale(x) / scale) + self._bias
        if state.shape[-1] == 2 and self._gain is not None:
            result = result + self._gain * ((x.mean(-1, keepdim=True) - state[..., 1:]) / scale)
        return result.to(x.dtype)
