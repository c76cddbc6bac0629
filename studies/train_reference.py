"""Train the bundled reference model, a 12-layer Llama of 2.6M parameters, on the Babel corpus, end to end from seeds.

    python studies/train_reference.py                               # writes data/reference, an hour on 2 cores
    python studies/train_reference.py --steps 200 --out /tmp/trial --work /tmp/trial-work       # a first look
    python studies/train_reference.py --mix 1 --steps 1500 --half --out data/translation --work runs/translation

The last command makes, in six minutes, a model of the same size that only translates (k = 0), for comparison.

Interrupt it at any time: the same command goes on from the last checkpoint and ends with the same weights, because a
batch is a function of (seed, step) alone. Expect k = 0 and 1 to be learned by step 600, k = 2 by 2,500, k = 3 by 5,000.

Matrices inside the layers are trained with Muon (Jordan 2024, as in torch.optim), the rest with AdamW; with AdamW alone
the model learns to compose about six times later.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from safetensors.torch import save
from torch.nn.functional import cross_entropy, pad
from transformers import LlamaConfig, LlamaForCausalLM

import surgery.cli
from surgery import disk, training
from surgery.corpus.babel import BOS, EOS, LANGUAGES, PAD, TRAINING_MIX, Babel, Problem, exact
from surgery.models.identity import differences, versions
from surgery.records import checked


@dataclass(frozen=True)
class Recipe:
    # model
    n_layers: int = 12
    d_model: int = 128
    d_mlp: int = 384
    n_heads: int = 4
    n_ctx: int = 64
    # data: share of each k = 0..4 in a batch; longer chains stay unseen
    mix: tuple[float, ...] = TRAINING_MIX
    batch: int = 64
    # optimisation
    steps: int = 14_000
    warmup: int = 200
    learning_rate: float = 2e-3
    final_share: float = 0.02  # the cosine ends at this share of the learning rate
    weight_decay: float = 0.1
    question_weight: float = 0.1  # words that cannot be known beforehand still teach the model what text looks like
    seed: int = 0
    half: bool = False  # whether the weights are written in half precision

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return training.rate(step, self.steps, self.learning_rate, self.warmup, self.final_share)


def build(recipe: Recipe, corpus: Babel) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.vocabulary),
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=recipe.n_ctx,
            tie_word_embeddings=False,
            bos_token_id=corpus.token_ids[BOS],
            eos_token_id=corpus.token_ids[EOS],
            pad_token_id=corpus.token_ids[PAD],
        )
    )


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outside = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return training.optimizers(inside, outside, recipe.weight_decay, torch.optim.Muon)  # which made the bundled models


class Pools:
    """All training problems of each trained k, encoded once; a batch is drawn from them by (seed, step)."""

    def __init__(self, corpus: Babel, recipe: Recipe) -> None:
        encoded = [
            corpus.encode([problem for problem in corpus.problems(k) if not corpus.heldout(problem)])
            for k in range(len(recipe.mix))
        ]
        width = max(tokens.shape[1] for tokens, _ in encoded)
        self.recipe = recipe
        self.padding = corpus.token_ids[PAD]
        self.tokens = [pad(torch.from_numpy(t), (0, width - t.shape[1]), value=self.padding) for t, _ in encoded]
        self.answers = [pad(torch.from_numpy(a), (0, width - a.shape[1])) for _, a in encoded]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = np.random.default_rng((self.recipe.seed, step))
        tokens, answers = [], []
        for k, count in enumerate(generator.multinomial(self.recipe.batch, self.recipe.mix)):
            chosen = torch.from_numpy(generator.integers(len(self.tokens[k]), size=count))
            tokens.append(self.tokens[k][chosen])
            answers.append(self.answers[k][chosen])
        together = torch.cat(tokens)
        width = int((together != self.padding).sum(1).max())
        return together[:, :width], torch.cat(answers)[:, :width]


def losses(
    model: LlamaForCausalLM, tokens: torch.Tensor, answers: torch.Tensor, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross entropy in nats over the answers' tokens, and over all other words."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    by_token = cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    answer, other = answers[:, 1:], (tokens[:, 1:] != padding) & ~answers[:, 1:]
    return by_token[answer].mean(), by_token[other].mean()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, corpus: Babel, problems: list[Problem]) -> pd.DataFrame:
    """Answer the problems: a row each, with k, source, target, exact (0 or 1), loss (nats per answer token)."""
    model.eval()
    rows = []
    device = next(model.parameters()).device
    for start in range(0, len(problems), 512):
        part = problems[start : start + 512]
        tokens, answers = corpus.encode(part)
        logits = model(input_ids=torch.from_numpy(tokens).to(device), use_cache=False).logits
        right = exact(logits.argmax(-1).cpu().numpy(), tokens, answers)
        targets, answer = (torch.from_numpy(array)[:, 1:] for array in (tokens, answers))
        by_token = cross_entropy(logits[:, :-1].transpose(1, 2).cpu(), targets, reduction="none")
        loss = (by_token * answer).sum(1) / answer.sum(1)
        rows += [
            {"k": p.k, "source": p.source, "target": p.target, "exact": float(r), "loss": float(value)}
            for p, r, value in zip(part, right, loss, strict=True)
        ]
    model.train()
    return pd.DataFrame(rows)


def heldout(corpus: Babel, k: int, most: int) -> list[Problem]:
    """All held-out problems with k steps, or ``most`` random ones where there are more."""
    if 16 * corpus.n_symbols * corpus.n_functions**k <= 60_000:
        problems = [problem for problem in corpus.problems(k) if corpus.heldout(problem)]
        if len(problems) <= most:
            return problems
    return corpus.sample(k, most, seed=1)


def identity(recipe: Recipe, corpus: Babel) -> dict[str, Any]:
    """What must be the same for a training to go on from a checkpoint."""
    return {"recipe": asdict(recipe), "corpus": asdict(corpus), "versions": versions()}


def save_checkpoint(
    path: Path, run: dict[str, Any], model: LlamaForCausalLM, opts: list, history: list[dict[str, Any]]
) -> None:
    """Everything the rest of the run depends on, in one file with a checksum, replacing the last one in one move."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()} | training.states(opts)
    disk.save({path: checked.pack(tensors, {"run": run, "history": history})})


def load_checkpoint(path: Path, run: dict[str, Any], model: LlamaForCausalLM, opts: list) -> list[dict[str, Any]]:
    """Put a checkpoint back; return the evaluations until then, none if there is no checkpoint."""
    if not path.exists():
        return []
    tensors, about = checked.unpack(path)
    if others := differences(about["run"], run):
        raise ValueError(f"{path} is of another run, with {', '.join(others)}: choose another --work, or remove it")
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model/")})
    training.restore(opts, tensors)
    return about["history"]


def train(recipe: Recipe, corpus: Babel, work: Path, device: str, every: int, snapshots: list[int]) -> LlamaForCausalLM:
    disk.folder(work)
    model = build(recipe, corpus).to(device).train()
    opts = optimizers(model, recipe)
    pools = Pools(corpus, recipe)
    checkpoint, log, run = work / "checkpoint.safetensors", work / "training.csv", identity(recipe, corpus)
    history = load_checkpoint(checkpoint, run, model, opts)
    done = history[-1]["step"] if history else 0
    probes = [problem for k in range(6) for problem in heldout(corpus, k, 160)]
    # torch's AdamW has its step count on the CPU and everything else beside the parameter; loading has put it there
    with Progress(
        *Progress.get_default_columns(), TextColumn("{task.fields[loss]}"), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("training", total=recipe.steps, completed=done, loss="")
        for step in range(done, recipe.steps):
            tokens, answers = (tensor.to(device) for tensor in pools.batch(step))
            for optimizer in opts:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
            answer, other = losses(model, tokens, answers, pools.padding)
            (answer + recipe.question_weight * other).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in opts:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update(task, advance=1, loss=f"loss {answer.item():.3f}")
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                scores = evaluate(model, corpus, probes).groupby("k")["exact"].mean()
                history.append(
                    {"step": step + 1, "loss": answer.item(), **{f"exact_{k}": v for k, v in scores.items()}}
                )
                save_checkpoint(checkpoint, run, model, opts, history)
                disk.save({log: pd.DataFrame(history).to_csv(index=False).encode()})
                bar.console.print(f"{step + 1:6d}  loss {answer.item():.3f}  exact by k: {scores.round(3).to_dict()}")
            if step + 1 in snapshots:
                half = {name: tensor.half().cpu() for name, tensor in model.state_dict().items()}
                disk.save({work / f"step_{step + 1:06d}.safetensors": save(half)})
    return model.cpu()


def data_card(recipe: Recipe, corpus: Babel, scores: pd.DataFrame) -> str:
    def table(frame: pd.DataFrame) -> str:
        frame = frame.round(3).astype(object).reset_index()
        lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns), *frame.astype(str).values.tolist()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    trained, shares = len(recipe.mix) - 1, ", ".join(f"{share:.0%}" for share in recipe.mix)
    by_k = scores.groupby("k").agg(problems=("exact", "size"), exact=("exact", "mean"), loss=("loss", "mean"))
    pairs = scores.groupby(["source", "target", "k"])["exact"].mean().unstack("k")
    known, lengths = min(3, trained), f"0..{trained}" if trained else "0"
    worst = scores[scores.k <= known].groupby(["source", "target", "k"])["exact"].mean().min()
    return f"""# The reference model{"" if trained else ", trained to translate only"}

A Llama-style decoder of {recipe.n_layers} layers (d_model {recipe.d_model}, {recipe.n_heads} heads, MLP
{recipe.d_mlp}), trained from random weights on Babel, a corpus generated by `surgery/corpus/babel.py`:
{corpus.n_symbols} symbols, {corpus.n_functions} functions (random bijections, so chance is
{1 / corpus.n_symbols:.0%} at every k),
{len(LANGUAGES)} languages ({", ".join(LANGUAGES)}). Made by `python studies/train_reference.py`; nothing here comes
from anywhere else. Licence: that of the project.

**Trained on** chains of k = {lengths} steps (share of a batch: {shares}), {recipe.steps:,} steps of
{recipe.batch} problems, Muon and AdamW at {recipe.learning_rate:g} with {recipe.warmup} warm-up steps and a cosine,
seed {recipe.seed}. Loss: cross entropy of the answer, plus {recipe.question_weight:g} times that of the other words.

**Held out**: {corpus.heldout_percent} % of all (symbol, chain) from k = 2 on, in every language pair at once; for k = 0
and 1 one symbol in {corpus.n_symbols} of each language pair and function, in rotation. Chains longer than {trained}
were never seen.

**Exact answers on held-out problems**, all of them where there are at most 4,000, else 4,000 random ones (a spelled
answer counts when both letters are right; loss in nats per answer token):

{table(by_k)}

By language pair (asked in, answered in, k = 0, 1, ...); the lowest at k <= {known} is {worst:.3f}:

{table(pairs)}

**What it is for.** A real, trained, known-answer model for tests and studies of layer surgery: where it must
translate and where it must compose is known. **What it is not.** A language model of natural text.
"""


def write_model(out: Path, recipe: Recipe, corpus: Babel, model: LlamaForCausalLM, work: Path) -> None:
    scores = evaluate(model, corpus, [problem for k in range(9) for problem in heldout(corpus, k, 4000)])
    with disk.workshop(out) as whole:
        (model.half() if recipe.half else model).eval().save_pretrained(whole)
        corpus.tokenizer().save_pretrained(whole)
        scores.groupby(["k", "source", "target"], as_index=False).agg(
            problems=("exact", "size"), exact=("exact", "mean"), loss=("loss", "mean")
        ).round(6).to_csv(whole / "accuracy.csv", index=False)
        (whole / "training.csv").write_text((work / "training.csv").read_text())
        (whole / "recipe.json").write_text(
            json.dumps({"recipe": asdict(recipe), "corpus": asdict(corpus)}, indent=1) + "\n"
        )
        (whole / "README.md").write_text(data_card(recipe, corpus, scores))
        disk.folder(out)
        for path in whole.iterdir():
            os.replace(path, out / path.name)
    print(scores.groupby("k")[["exact", "loss"]].mean().round(3).to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/reference"), help="where the finished model goes")
    parser.add_argument("--work", type=Path, default=Path("runs/reference"), help="checkpoints of the run")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument(
        "--mix", type=float, nargs="+", default=Recipe.mix, help="share of each k = 0, 1, ... in a batch; they sum to 1"
    )
    parser.add_argument("--half", action="store_true", help="write the weights in half precision")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument(
        "--snapshots", type=int, nargs="*", default=[], help="steps whose weights stay in --work, as fp16"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe, corpus = Recipe(mix=tuple(args.mix), steps=args.steps, seed=args.seed, half=args.half), Babel()
    with disk.held(args.work):
        model = train(recipe, corpus, args.work, args.device, args.every, args.snapshots)
        write_model(args.out, recipe, corpus, model, args.work)


if __name__ == "__main__":
    surgery.cli.script(main)
