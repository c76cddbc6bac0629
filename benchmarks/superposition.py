"""A sweep of toy models of superposition, all trained at once, beside a loop over single ones.

`loop` is what one would write: a module of its own for every cell, torch's autograd and Adam; `ours alone` is
`superposition.training` of one cell. Both train a few of the cells, spread over the sweep, as many steps as all cells
take together, and what they took is scaled up to 250 cells. Same examples, same noise, and the weights are compared.

    python benchmarks/superposition.py [--rounds 15] [--threads 1]
"""

import numpy as np
import torch
from timing import rounds, seconds
from torch import Tensor

from surgery.dropout import toy_model

STEPS, SAMPLE = 100, 10


def alone(sparsity, rate, seed, n_features=20, n_hidden=5, steps=5000, batch=64, decay=0.7, lr=0.01):
    """One model by autograd: W and b."""
    generator = torch.Generator().manual_seed(int(seed))
    spread = (2 / (n_features + n_hidden)) ** 0.5
    w = torch.nn.Parameter(spread * torch.randn(n_hidden + 1, n_features, generator=generator)[:-1])
    b = torch.nn.Parameter(torch.zeros(n_features))
    optimiser = torch.optim.Adam([w, b], lr=lr)
    importance = toy_model.importance(n_features, decay)
    for step in range(steps):
        uniform = torch.rand(batch, n_features + n_hidden, generator=generator)
        x = ((uniform[:, :n_features] - sparsity) / (1 - sparsity)).relu()
        hidden = x @ w.T * (uniform[:, n_features:] >= rate) / (1 - rate)
        loss = (importance * (x - (hidden @ w + b).relu()) ** 2).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimiser.step()
    return w.detach(), b.detach()


def together(cells: Tensor, steps: int, batch: int) -> Tensor:
    """W of all cells (rows of sparsity, rate, seed)."""
    for w, _ in toy_model.training(cells[:, 0], cells[:, 1], cells[:, 2].long(), steps=steps, batch=batch):
        return w
    raise AssertionError


def compare(batch: int, times: int) -> tuple[float, list[tuple[float, float]], float]:
    """Milliseconds a step of the sweep, ratios to it by round (loop, ours alone), largest difference of weights."""
    axes = (toy_model.SPARSITIES, toy_model.RATES, toy_model.SEEDS)
    cells = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float32) for axis in axes))
    sample = cells[torch.linspace(0, len(cells) - 1, SAMPLE).long()]
    swept = together(cells, STEPS, batch)[torch.linspace(0, len(cells) - 1, SAMPLE).long()]
    single = torch.stack([alone(*cell.tolist(), steps=STEPS, batch=batch)[0] for cell in sample])
    took, ratios = [], []
    for _ in range(times):
        sweep = seconds(lambda: together(cells, STEPS, batch))
        loop = seconds(lambda: [alone(*cell.tolist(), steps=STEPS, batch=batch) for cell in sample])
        ours = seconds(lambda: [together(cell[None], STEPS, batch) for cell in sample])
        scale = len(cells) / SAMPLE / sweep
        took.append(1000 * sweep / STEPS)
        ratios.append((scale * loop, scale * ours))
    return float(np.median(took)), ratios, float((swept - single).abs().max())


def main() -> None:
    times = rounds(__doc__)
    print("batch  sweep, ms a step  loop / sweep           ours alone / sweep     largest difference of weights")
    for batch in (64, 256):
        took, ratios, difference = compare(batch, times)
        quartiles = np.quantile(np.array(ratios), [0.5, 0.25, 0.75], axis=0).T
        said = "  ".join(f"{mid:6.1f} [{low:.1f}, {high:.1f}]".ljust(21) for mid, low, high in quartiles)
        print(f"{batch:5}  {took:16.2f}  {said}  {difference:.1e}")
    whole = seconds(toy_model.sweep)
    print(
        f"\nThe whole sweep, 250 cells of 5,000 steps with 40 evaluations of the cells without dropout: {whole:.0f} s"
    )


if __name__ == "__main__":
    main()
