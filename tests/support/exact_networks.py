"""Networks whose layers are chosen matrices, and prompts of unequal length: what they read can be worked out."""

import torch
from transformer_lens import TransformerBridge
from transformer_lens.config import TransformerBridgeConfig

from surgery import Stack
from surgery.instruments import known_networks
from surgery.models import building
from surgery.models.tokens import Tokens


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def network(maps, embedding, biases=None, norm=None, d_head=8):
    """Build a model whose layer ``l`` is ``maps[l] x + biases[l]`` exactly (relu(z) - relu(-z) = z, no attention)."""
    n_vocab, d_model = embedding.shape
    config = TransformerBridgeConfig(
        n_layers=len(maps),
        d_model=d_model,
        d_mlp=2 * d_model,
        n_heads=1,
        d_head=d_head,
        n_ctx=32,
        d_vocab=n_vocab,
        act_fn="relu",
        normalization_type=norm,
        positional_embedding_type="rotary",
        dtype=torch.float64,
        seed=0,
        device="cpu",
    )
    with building.quickly():
        model = TransformerBridge.boot_native(config, dtype=torch.float64).eval()
    weight = parameters(model)
    weight["tok_embed.weight"][:] = embedding
    for layer, linear in enumerate(maps):
        weight[f"layers.{layer}.attn.o.weight"][:] = 0
        weight[f"layers.{layer}.mlp.fc_in.weight"][:] = torch.cat([linear, -linear])
        weight[f"layers.{layer}.mlp.fc_out.weight"][:] = torch.cat([torch.eye(d_model), -torch.eye(d_model)], 1)
        if biases is not None:
            weight[f"layers.{layer}.mlp.fc_out.bias"][:] = biases[layer]
    return model


def parameters(model):
    return {name.replace("._original_component", ""): weight for name, weight in model.named_parameters()}


def ou_network(kappas, d_model=16, mean=2.0, seed=0):
    """Build layers ``f(x) = -kappa (x - mean)``, one kappa a layer, and embeddings scattered around the mean."""
    maps = [-kappa * torch.eye(d_model) for kappa in kappas]
    embedding = mean + torch.randn(known_networks.D_VOCAB, d_model, generator=rng(seed))
    return network(maps, embedding, [kappa * mean * torch.ones(d_model) for kappa in kappas])


def ragged(side, seed=0):
    """Return the same 12 prompts of 2 to 13 tokens, padded on one side with different tokens."""
    ids = torch.randint(known_networks.D_VOCAB, (12, 13), generator=rng(seed))
    padded = torch.full((12, 15), 3 if side == "left" else 7)
    mask = torch.zeros(12, 15, dtype=torch.bool)
    for i, length in enumerate(range(2, 14)):
        place = slice(15 - length, 15) if side == "left" else slice(0, length)
        padded[i, place], mask[i, place] = ids[i, :length], True
    return Tokens(padded, mask)


@torch.no_grad()
def attending_network(kappa, sharpness):
    """Write minus kappa times what attention fetches from the marked first token (sharp) or from all so far (0)."""
    value = torch.cat([torch.randn(100, 8, generator=rng()), torch.zeros(100, 1)], 1).double()
    embedding = torch.cat([value, value + torch.eye(9, dtype=torch.float64)[8]])
    model = network([torch.zeros(9, 9)], embedding)
    weight = parameters(model)
    for name in "qkvo":
        weight[f"layers.0.attn.{name}.weight"][:] = 0
        weight[f"layers.0.attn.{name}.bias"][:] = 0
    weight["layers.0.attn.q.bias"][-1] = 1  # the slowest rotary pair: almost no rotation over 8 positions
    weight["layers.0.attn.k.weight"][-1, 8] = sharpness
    weight["layers.0.attn.v.weight"][:] = torch.eye(8, 9)
    weight["layers.0.attn.o.weight"][:] = -kappa * torch.eye(9, 8)
    first = torch.randint(100, (40, 1), generator=rng())
    return Stack(model), torch.cat([100 + first, first.repeat(1, 7)], 1)


@torch.no_grad()
def last_reader(share, norm=None, n_layers=4):
    """Build the mixed network with a head that reads the last subspace alone."""
    model = known_networks.mixed_network(share, n_layers=n_layers, norm=norm, dtype=torch.float64)
    head = next(value for name, value in model.named_parameters() if name.startswith("head"))
    head[:, :-8] = 0
    return model
