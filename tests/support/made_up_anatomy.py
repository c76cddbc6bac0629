"""Networks whose parts are known: layers of one kind up to a boundary, of another behind it."""

import torch

from support.exact_networks import parameters
from surgery.instruments import known_networks


@torch.no_grad()
def three_parts(shares, gains=None, width=6, seed=0):
    """A constructed network whose layer ``l`` reads ``shares[l]`` of its input from the layer before, ``gains[l]`` as
    large as usual (``calibration.mixed_network``, one share a layer)."""
    sizes = {"n_layers": len(shares), "width": width, "seed": seed, "dtype": torch.float64}
    model = known_networks.parallel_network(**sizes)
    weights = parameters(model)
    donors = {share: parameters(known_networks.mixed_network(share, **sizes)) for share in set(shares)}
    for layer, share in enumerate(shares):
        name = f"layers.{layer}.mlp.fc_in.weight"
        weights[name][:] = donors[share][name]
        weights[f"layers.{layer}.mlp.fc_out.weight"][:] *= 1.0 if gains is None else gains[layer]
    return model
