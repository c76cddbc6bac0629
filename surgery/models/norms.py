"""A norm whose denominator is given instead of computed."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FrozenNorm:
    """A norm whose denominator is given instead of computed.

    A norm is ``A(x) / s(x) + b`` with ``A`` linear and ``s`` the root of mean square (or variance) plus epsilon.
    Which of the two, and ``b``, are determined by running the module on ``probe``, so every variant of RMSNorm and
    LayerNorm is covered: ``norm(0)`` is ``b``; a norm that subtracts the mean ignores an added constant. Frozen, it is
    ``(norm(x) - b) s(x) / s_given + b``.

    Raises:
        ValueError: the module shows no epsilon, or is not a linear map over a root mean square.
    """

    def __init__(self, module: nn.Module, probe: Float[Tensor, "n d_model"]) -> None:
        self.module = module
        self._forward = module.forward
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if eps is None:
            raise ValueError(f"{type(module).__name__} shows no epsilon, so its denominator cannot be frozen exactly")
        self._eps = float(eps)
        shifted, plain, bias = (self._forward(x) for x in (probe + 1, probe, torch.zeros_like(probe)))
        self.centres = torch.allclose(shifted, plain, rtol=1e-3, atol=1e-3 * float((plain - bias).abs().max()))
        self._bias = bias[:1]
        doubled = (self._forward(2 * probe) - bias) * self.scale(2 * probe)
        once = (plain - bias) * self.scale(probe)
        if not torch.allclose(doubled, 2 * once, rtol=1e-3, atol=1e-3 * float(once.abs().max())):
            raise ValueError(
                f"{type(module).__name__} is not a linear map over a root mean square; it cannot be frozen"
            )

    def scale(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """The denominator that the norm uses on ``x``."""
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide.pow(2).mean(-1, keepdim=True) + self._eps).sqrt()

    def with_scale(
        self, x: Float[Tensor, "... d_model"], scale: Float[Tensor, "... 1"]
    ) -> Float[Tensor, "... d_model"]:
        """The norm of ``x`` with ``scale`` as its denominator."""
        return ((self._forward(x) - self._bias) * (self.scale(x) / scale) + self._bias).to(x.dtype)
