"""A scan of a real model against the plain loop over whole models, in float32 and in bf16, and where its time goes.

    python benchmarks/real_models.py --model smollm2 --probes arithmetic --count 48

All repeated spans, one thread, process time; the ways run in turns, and medians over the rounds are given. The plain
loop does what others do: for every wiring the layer list of the Hugging Face model is rebuilt, a padded batch of 32
prompts goes through the whole model, and logits are taken at every position. It is timed on a few wirings spread over
all and scaled by the layers that they run; its readout, once a wiring, is scaled by their number.

``over floor`` is the time of a scan over the least that it could take: the layer executions that remain, on the tokens
that must run, at the best measured time of a token in a full call; and the readouts at the best measured time of one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

import surgery
from surgery import scan
from surgery.corpus import probes
from surgery.corpus.probes import Encoded
from surgery.instruments import readout
from surgery.models.half_precision import HalfLayers, layers_of
from surgery.models.loading import plain
from surgery.scan import execution, schedule
from surgery.scan.packing import Inputs
from surgery.scan.scores import Scorer
from surgery.wiring.families import every_repeat

BATCH = 32  # prompts of the plain loop
SAMPLED = 8  # wirings that it is timed on


class Clock:
    """Process time spent in functions while they are watched, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def watching(self, **functions: tuple[Any, str]) -> Iterator[None]:
        patches = [
            patch.object(owner, name, self._timed(label, getattr(owner, name)))
            for label, (owner, name) in functions.items()
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()

    def _timed(self, label: str, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[label] = self.seconds.get(label, 0.0) + time.process_time() - start
            return result

        return timed


@torch.no_grad()
def loop(stack: surgery.Stack, wirings: list, encoded: Encoded) -> tuple[float, np.ndarray]:
    """Seconds of the plain loop for all wirings, and the log-likelihoods of those that it ran, [sampled, row]."""
    model, ids, mask = plain(stack.model), encoded.tokens.ids, encoded.tokens.mask
    base = model.base_model
    row, types, head = base.layers, getattr(base.config, "layer_types", None), model.lm_head.forward
    in_head, in_layers, executions, found = 0.0, 0.0, 0, []

    def timed_head(x: torch.Tensor) -> torch.Tensor:
        nonlocal in_head
        start = time.process_time()
        logits = head(x)
        in_head += time.process_time() - start
        return logits

    sampled = sample(wirings)
    try:
        model.lm_head.forward = timed_head
        for index in sampled:
            layers, start, before = wirings[index].layers, time.process_time(), in_head
            base.layers = torch.nn.ModuleList(row[layer] for layer in layers)
            base.config.num_hidden_layers = len(layers)
            if types:
                base.config.layer_types = [types[layer] for layer in layers]
            loglik = []
            for part in torch.arange(len(ids)).split(BATCH):
                logits = model(input_ids=ids[part], attention_mask=mask[part].long(), use_cache=False).logits
                began = time.process_time()
                log_p = logits[:, :-1].log_softmax(-1).gather(2, ids[part, 1:, None])[..., 0]
                right = logits[:, :-1].argmax(-1) == ids[part, 1:]
                scored = encoded.scored[part, 1:]
                loglik.append((log_p * scored).sum(1))
                (right | ~scored).all(1)
                in_head += time.process_time() - began
            in_layers += time.process_time() - start - (in_head - before)
            executions += len(layers)
            found.append(torch.cat(loglik).double().numpy())
    finally:
        base.layers, base.config.num_hidden_layers = row, len(row)
        if types:
            base.config.layer_types = types
        del model.lm_head.forward
    seconds = in_layers / executions * schedule.naive_executions(wirings) + in_head / len(sampled) * len(wirings)
    return seconds, np.array(found)


def sample(wirings: list) -> list[int]:
    return np.linspace(0, len(wirings) - 1, SAMPLED).round().astype(int).tolist()


def floor(stack: surgery.Stack, wirings: list, encoded: Encoded, precision: str) -> float:
    """The least seconds that a scan could take: what must run, at the best times of a layer and of the readout."""
    layers, total = layers_of(stack, precision), 0.0
    executions = schedule.simulate(wirings).executions
    portions = execution.portions(stack, encoded, wirings=wirings)
    for part in portions:
        inputs = Inputs.of(part)
        group = max(1, 1024 // inputs.tokens.ids.numel())
        context = stack.context(inputs.tokens.ids.repeat(group, 1))
        best = min(seconds(partial(layers.execute, "3", context.x0, context)) for _ in range(4))
        total += executions * best * int(inputs.tokens.mask.sum()) / context.tokens.ids.numel()
    x = torch.randn(readout.at_once(stack), stack.d_model)
    head = min(seconds(lambda: stack.readout(x)) for _ in range(4)) / len(x)
    return total + head * len(wirings) * sum(len(Inputs.of(part).places) for part in portions)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def scanned(stack: surgery.Stack, wirings: list, encoded: Encoded, precision: str) -> tuple[dict, pd.DataFrame]:
    """The seconds of a scan, in all and by part, and its rows."""
    clock, start = Clock(), time.process_time()
    runner = type(stack) if precision == "float32" else HalfLayers
    with clock.watching(layers=(runner, "execute"), head=(readout, "logits"), scores=(Scorer, "tables")):
        frame = scan.run(stack, wirings, encoded, precision=precision)
    whole = time.process_time() - start
    parts = {
        "layers": clock.seconds["layers"],
        "readout": clock.seconds["head"],
        "statistics": clock.seconds["scores"] - clock.seconds["head"],
    }
    return {"whole": whole, **parts, "rest": whole - sum(parts.values())}, frame


def ranked(exact: pd.DataFrame, half: pd.DataFrame) -> str:
    """How well a scan in bf16 ranks the wirings: rank correlation of mean gains, and how many of the ten best."""
    gains = [
        rows.query("metric == 'loglik'").assign(gain=lambda table: table["value"] - table["baseline"])
        for rows in (exact, half)
    ]
    means = [table.groupby("wiring")["gain"].mean().drop(":", errors="ignore") for table in gains]
    both = len(set(means[0].nlargest(10).index) & set(means[1].nlargest(10).index))
    away = (gains[1]["gain"] - gains[0]["gain"]).abs()
    return (
        f"bf16 beside float32: rank correlation of mean gains {means[0].corr(means[1], method='spearman'):.4f}, "
        f"{both} of the ten best, mean gains differ by {(means[1] - means[0]).abs().median():.4f} nats in the median "
        f"wiring and {(means[1] - means[0]).abs().max():.2f} in the worst, single probes by {away.median():.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--probes", default="arithmetic", help="a built-in set, or a .txt or .jsonl file of text")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--every", type=int, default=1, help="scan only every so many of the repeated spans")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stack = surgery.Stack(surgery.load(args.model))
    asked = (
        probes.named(args.probes, args.count, 7)
        if args.probes in probes.NAMES
        else probes.text(args.probes, args.count, 64)
    )
    encoded, wirings = asked.encode(stack), list(every_repeat(stack.n_layers))[:: args.every]
    portions = [Inputs.of(part).tokens for part in execution.portions(stack, encoded, wirings=wirings)]
    runs, padded = sum(int(part.mask.sum()) for part in portions), sum(part.ids.numel() for part in portions)
    print(f"{encoded.tokens.ids.numel():,} tokens with padding; {runs:,} run in {len(portions)} portions ({padded:,})")
    print(scan.plan(stack, wirings, encoded), flush=True)
    loops, results, floors, worst = [], {"float32": [], "bf16": []}, {}, 0.0
    for _ in range(args.rounds):
        took, loglik = loop(stack, wirings, encoded)
        loops.append(took)
        for precision, taken in results.items():
            below = floor(stack, wirings, encoded, precision)
            taken.append(scanned(stack, wirings, encoded, precision))
            below = min(below, floor(stack, wirings, encoded, precision))
            floors[precision] = min(below, floors.get(precision, below))
        values = (
            results["float32"][-1][1]
            .query("metric == 'loglik'")
            .pivot(index="wiring", columns="prompt", values="value")
        )
        right = np.array(encoded.choice) == 0
        for expected, index in zip(loglik[:, right], sample(wirings), strict=True):
            worst = max(worst, float(np.abs(values.loc[str(wirings[index])].to_numpy() - expected).max()))
        print(
            f"plain loop {took:.0f} s, scan " + ", ".join(f"{k} {v[-1][0]['whole']:.0f} s" for k, v in results.items()),
            flush=True,
        )
    rows = []
    for precision, taken in results.items():
        ratios = sorted(took / times["whole"] for took, (times, _) in zip(loops, taken, strict=True))
        middle = {name: statistics.median(times[name] for times, _ in taken) for name in taken[0][0]}
        rows.append(
            {
                "scan in": precision,
                "plain loop, s": round(statistics.median(loops)),
                "scan, s": round(middle["whole"]),
                "faster": f"{statistics.median(ratios):.1f} [{ratios[0]:.1f}, {ratios[-1]:.1f}]",
                "over floor": round(min(times["whole"] for times, _ in taken) / floors[precision], 2),
            }
            | {f"{name}, %": round(100 * middle[name] / middle["whole"], 1) for name in list(middle)[1:]}
        )
    print(pd.DataFrame(rows).to_string(index=False))
    print(ranked(*(taken[-1][1] for taken in results.values())))
    print(f"largest difference of a log-likelihood from the plain loop, float32: {worst:.0e} nats")


if __name__ == "__main__":
    main()
