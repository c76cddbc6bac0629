"""Models built as systems of known reliability: layers in series, independent layers, and a backup."""

import torch

from support.exact_networks import network, parameters
from surgery import Stack

N_VOCAB = 8


TOKENS = (torch.arange(24).unsqueeze(1) + torch.arange(8)) % N_VOCAB  # every token is followed by the next one


@torch.no_grad()
def build_system(reads, writes, scored, rectified=()):
    """Build a model whose layer ``l`` adds ``reads[l]`` (a sum of subspaces with signs) to the subspace ``writes[l]``.

    The token is one-hot in subspace 0; the logit of the token that comes next is what the ``scored`` subspaces hold.
    """
    n_spaces = max(*writes, *scored) + 1
    one_hot, maps = torch.eye(N_VOCAB, dtype=torch.float64), []
    for read, write in zip(reads, writes, strict=True):
        linear = torch.zeros(n_spaces * N_VOCAB, n_spaces * N_VOCAB, dtype=torch.float64)
        for space, sign in read.items():
            block = linear[write * N_VOCAB : (write + 1) * N_VOCAB, space * N_VOCAB : (space + 1) * N_VOCAB]
            block += sign * one_hot
        maps.append(linear)
    model = network(maps, torch.cat([one_hot, torch.zeros(N_VOCAB, (n_spaces - 1) * N_VOCAB)], 1))
    weight = parameters(model)
    for layer in rectified:
        weight[f"layers.{layer}.mlp.fc_out.weight"][:, n_spaces * N_VOCAB :] = 0  # relu(z) without - relu(-z)
    weight["head.weight"][:] = 0
    for space in scored:
        weight["head.weight"][:, space * N_VOCAB : (space + 1) * N_VOCAB] = one_hot.roll(1, 0)
    return Stack(model)


SERIES = dict(reads=[{0: 1}, {1: 1}, {2: 1}], writes=[1, 2, 3], scored=[3])


INDEPENDENT = dict(reads=[{0: 1}] * 3, writes=[1, 2, 3], scored=[1, 2, 3])


BACKUP = dict(reads=[{0: 1}, {0: 1, 1: -1}], writes=[1, 1], scored=[1], rectified=[0, 1])  # writes what is missing


HALF_BACKUP = BACKUP | {"reads": [{0: 1}, {0: 1, 1: -0.5}]}  # writes all of its own, less half of what is there
