"""Prompts of uneven lengths, and a harvest of them that kills itself."""

import torch

from surgery.models.tokens import Tokens

LENGTHS = [3, 9, 1, 6, 14, 2, 8, 5, 11, 4]


def corpus(side: str = "right", d_vocab: int = 96, lengths=LENGTHS, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[i, place], mask[i, place] = torch.randint(4, d_vocab, (length,), generator=generator), True
    return Tokens(ids, mask)


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[2])
from support import ragged_tokens as t
from surgery import Stack
from surgery.instruments import known_networks
from surgery.training import harvest as harvesting
own, calls = harvesting._stored, []
def stored(*args):
    calls.append(0)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*args)
harvesting._stored = stored
torch.set_num_threads(1)
harvesting.harvest(Stack(known_networks.random_network(n_layers=4)), t.corpus(), 1, 3, sys.argv[1], shard_tokens=20)
"""
