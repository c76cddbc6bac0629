"""What does opening a model cost? The identity wiring through the Stack against the model's own forward, same batch.

    make bench

Ratios of process time, the runs interleaved, median over rounds with its quartiles: this is about overhead, and
machines are noisy. ``plain`` is the unwrapped Hugging Face model with its fast attention; ``bridge`` is
TransformerLens' forward.
"""

import numpy as np
import pandas as pd
import timing
import torch
import transformers

import surgery
from surgery.models.loading import plain


def models() -> dict[str, transformers.PreTrainedModel]:
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(n_embd=256, n_layer=12, n_head=8, n_positions=256, vocab_size=2048)
    llama = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_attention_heads=8, vocab_size=2048
    )
    return {
        name: transformers.AutoModelForCausalLM.from_config(c) for name, c in {"gpt2": gpt2, "llama": llama}.items()
    }


def compare(stack: surgery.Stack, tokens: torch.Tensor, rounds: int) -> dict[str, float]:
    twin = plain(stack.model)
    runs = {
        "stack": lambda: stack.run(tokens),
        "plain": lambda: twin(tokens, use_cache=False).logits,
        "bridge": lambda: stack.model(tokens, return_type="logits", use_cache=False),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(timing.seconds(run))
    ratios = {other: np.array(times["stack"]) / np.array(times[other]) for other in ("plain", "bridge")}
    row: dict[str, float] = {"plain_milliseconds": 1000 * float(np.median(times["plain"]))}
    for other, ratio in ratios.items():
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        row |= {f"stack/{other}": middle, f"stack/{other} quartiles": f"{low:.3f} to {high:.3f}"}
    return row


def main() -> None:
    rounds = timing.rounds(__doc__)
    stacks = {name: surgery.Stack(surgery.load(model)) for name, model in models().items()}
    stacks["babel"] = surgery.Stack(surgery.load("babel"))
    rows = []
    for name, stack in stacks.items():
        for batch, pos in ((1, 32), (8, 128)) if name != "babel" else ((8, 16), (64, 16)):
            tokens = torch.randint(stack.d_vocab, (batch, pos))
            rows.append({"model": name, "batch": f"{batch} x {pos}", **compare(stack, tokens, rounds)})
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
