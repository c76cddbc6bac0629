"""Small Babel models that differ in their dropout alone: trained from the same seeds on the same batches.

    made = dropout_models.train(Recipe(rate=0.2, seed=1), "runs/p0.2_1")
    stack = made.stack()                # after all steps: matched steps
    stack = made.stack(loss=1.008)      # when held-out loss first was below this rung: matched loss

Inverted dropout at ``rate`` on the MLP's neurons and on what attention and MLP write into the stream, off whenever the
model is looked at or given out. Batches and masks are functions of seed and step, so training resumes exactly.

Models of unequal loss are not comparable (one with more dropout learns more slowly), so weights are kept at every rung
of a ladder of held-out losses (``LADDER``) as well: the lowest that all models reached is where loss is matched.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from surgery.corpus import babel, bundled, splits
from surgery.corpus.babel import Babel
from surgery.corpus.splits import Split
from surgery.dropout.stability import Recorder
from surgery.models import loading as models
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.records import tables
from surgery.training import loop as training
from surgery.training.loop import Schedule

RATES, SEEDS = (0.0, 0.1, 0.2, 0.4), (0, 1, 2)
SHARES = (0.3, 0.4, 0.3)  # of problems with k = 0, 1, 2 steps
LADDER = tuple(round(float(rung), 3) for rung in np.geomspace(1.6, 0.1, 25))
SHIPPED = "dropout/models.safetensors"
COLUMNS = {
    "loss": "held-out loss: nats a token, answers weighing 1, questions a tenth",
    "answers": "held-out cross entropy of answer tokens (nats)",
    **{
        f"exact_{k}": f"share of held-out problems of {k} steps whose whole answer is right" for k in range(len(SHARES))
    },
}


@dataclass(frozen=True)
class Recipe:
    """All that a model depends on."""

    rate: float = 0.0
    seed: int = 0
    steps: int = 1500
    every: int = 50
    n_layers: int = 6
    d_model: int = 48
    d_mlp: int = 192
    n_heads: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"a dropout rate is 0 or more and below 1, got {self.rate}")

    @property
    def name(self) -> str:
        return f"p{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class Trained:
    """A model after all its steps and, by rung of the ladder, when its held-out loss first was below."""

    recipe: Recipe
    weights: Mapping[str, Tensor]
    rungs: Mapping[float, Mapping[str, Tensor]]
    curve: pd.DataFrame

    def stack(self, loss: float | None = None) -> Stack:
        """Opened. Raises ValueError for a rung that was not reached."""
        if loss is not None and loss not in self.rungs:
            raise ValueError(
                f"{self.recipe.name} was not kept at a loss of {loss}: it reached "
                f"{', '.join(map(str, sorted(self.rungs))) or 'no rung'}"
            )
        module = build(self.recipe)
        module.load_state_dict({n: t.float() for n, t in (self.weights if loss is None else self.rungs[loss]).items()})
        name = self.recipe.name + ("" if loss is None else f" at loss {loss:g}")
        tokenizer = models.tokenizer_of(str(models.reference_folder()), models.REFERENCE)  # the same words
        return Stack(models.wrap(module, tokenizer, name))


def build(recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model of a recipe."""
    corpus = Babel()
    config = LlamaConfig(
        vocab_size=len(corpus.vocabulary),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=corpus.token_ids[babel.BOS],
        eos_token_id=corpus.token_ids[babel.EOS],
        pad_token_id=corpus.token_ids[babel.PAD],
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


@cache
def data(count: int = 40_000, heldout: int = 360) -> Split:
    """What they learn from and are judged on."""
    return splits.babel(count, heldout, shares=SHARES)


def train(recipe: Recipe, folder: str | Path, *, progress: bool = False) -> Trained:
    """Train or go on; the folder holds the checkpoint, ``curve.csv`` and the rungs. Raises as ``training.fit``.

    The curve has the columns of ``training.CURVE``, ``COLUMNS`` and, per layer, the variance of the stream that leaves
    it over held-out tokens and the gradient's norm (``variance_0``, ``gradient_0``, ...). Cost: two minutes on a core.
    """
    folder, module = tables.folder(folder), build(recipe)
    schedule = Schedule(steps=recipe.steps, every=recipe.every, warmup=100, seed=recipe.seed)
    task = _Task(module, recipe, data(), folder)
    done = training.fit(
        task, schedule, folder, identity={"recipe": asdict(recipe)}, columns=_columns(recipe), progress=progress
    )
    rungs = {float(path.stem.split("_")[1]): load_file(path) for path in folder.glob("loss_*.safetensors")}
    return Trained(recipe, module.state_dict(), rungs, done.curve)


def matched(made: Iterable[Trained]) -> float:
    """The lowest rung that all of them reached. Raises ValueError if there is none."""
    made = list(made)
    common = set.intersection(*(set(one.rungs) for one in made))
    if not common:
        last = max(one.curve["loss"].iloc[-1] for one in made)
        raise ValueError(
            f"no loss of {LADDER[0]:g} or less was reached by all, the worst ended at {last:.2f}: train for more steps"
        )
    return min(common)


def ship(made: Iterable[Trained], file: str | Path) -> None:
    """All of them in one file, in half precision: after all steps and at their matched loss."""
    made = list(made)
    tensors: dict[str, Tensor] = {}
    loss = matched(made)
    for one in made:
        for kind, weights in (("steps", one.weights), ("loss", one.rungs[loss])):
            tensors |= {f"{one.recipe.name}/{kind}/{name}": tensor.half() for name, tensor in weights.items()}
    described = {
        "loss": loss,
        "recipes": [asdict(one.recipe) for one in made],
        "curves": [one.curve.drop(columns="seconds").round(5).to_dict("list") for one in made],
    }
    tables.folder(Path(file).parent)
    tables.save({Path(file): save(tensors, {"models": json.dumps(described)})})


def shipped(file: str | Path | None = None) -> list[Trained]:
    """The bundled models, after all steps and at one rung. Raises ValueError for a file without them."""
    path = Path(file) if file is not None else models.bundled_file(SHIPPED)
    with safe_open(path, framework="pt") as opened:
        if "models" not in (opened.metadata() or {}):
            raise ValueError(f"{path} does not hold models of this kind: dropout_models.ship writes such files")
        said = json.loads(opened.metadata()["models"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def weights(name: str, kind: str) -> dict[str, Tensor]:
        begin = f"{name}/{kind}/"
        return {key.removeprefix(begin): tensor for key, tensor in tensors.items() if key.startswith(begin)}

    recipes = [Recipe(**recipe) for recipe in said["recipes"]]
    return [
        Trained(
            recipe, weights(recipe.name, "steps"), {said["loss"]: weights(recipe.name, "loss")}, pd.DataFrame(curve)
        )
        for recipe, curve in zip(recipes, said["curves"], strict=True)
    ]


def curves(made: Iterable[Trained]) -> pd.DataFrame:
    """Variance of the stream and gradients over training, without dropout, in the columns of ``stability``; what enters
    the first layer was not noted."""
    rows = [
        {
            "width": one.recipe.d_model,
            "depth": one.recipe.n_layers,
            "rate": one.recipe.rate,
            "seed": one.recipe.seed,
            "step": int(look["step"]),
            "layer": layer,
            "variance": look.get(f"variance_{layer - 1}", float("nan")),
            "variance_training": float("nan"),
            "gradient": look.get(f"gradient_{layer}", float("nan")),
            "loss": look["answers"],
            "heldout": look["loss"],
        }
        for one in made
        for look in one.curve.to_dict("records")
        for layer in range(one.recipe.n_layers + 1)
    ]
    return pd.DataFrame(rows)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    tokens: Tokens
    weigh: Float[Tensor, "prompt pos"]
    seed: int  # of its masks

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tokens.ids.shape)

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.mask.sum())


class _Student(nn.Module):
    def __init__(self, model: LlamaForCausalLM, rate: float) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def forward(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        with dropping(self.model, self.rate, batch.seed):
            sums, weights = _loss(self.model, batch.tokens, batch.weigh)
        return sums[None], weights[None]


@contextmanager
def dropping(model: LlamaForCausalLM, rate: float, seed: int) -> Iterator[None]:
    """Within it the model runs with dropout, masks drawn anew at every point from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def dropped(x: Tensor) -> Tensor:
        mask = torch.empty(x.shape).bernoulli_(1 - rate, generator=generator)
        return x * (mask / (1 - rate)).to(x)

    with ExitStack() as hooked:
        for layer in model.model.layers if rate else ():
            neurons, outputs = layer.mlp.down_proj, (layer.mlp.down_proj, layer.self_attn.o_proj)
            handles = [neurons.register_forward_pre_hook(lambda _, args: (dropped(args[0]),))]
            handles += [module.register_forward_hook(lambda _, args, output: dropped(output)) for module in outputs]
            for handle in handles:
                hooked.callback(handle.remove)
        yield


class _Task:
    """As ``training.fit`` wants it."""

    watched, factors = "loss", (1.0,)

    def __init__(self, module: LlamaForCausalLM, recipe: Recipe, learned: Split, folder: Path) -> None:
        self.module, self.recipe, self.data, self.folder = module, recipe, learned, folder
        self.student = _Student(module, recipe.rate)
        named = list(module.named_parameters())
        inside = [p.ndim == 2 and ".layers." in name for name, p in named]
        self.matrices = [p for (_, p), matrix in zip(named, inside, strict=True) if matrix]
        self.others = [p for (_, p), matrix in zip(named, inside, strict=True) if not matrix]
        assert learned.weigh is not None
        self.weigh = learned.weigh(learned.corpus)

    @property
    def n_prompts(self) -> int:
        return len(self.data.corpus)

    def batch(self, prompts: list[int]) -> _Batch:
        ids, mask = self.data.corpus.ids[prompts], self.data.corpus.mask[prompts]
        width = int(mask.sum(1).max())
        seed = np.random.SeedSequence((self.recipe.seed, *prompts)).generate_state(1)[0]
        return _Batch(Tokens(ids[:, :width], mask[:, :width]), self.weigh[prompts][:, :width], int(seed))

    def taught(self, batch: _Batch) -> _Batch:
        return batch

    def look(self) -> dict[str, float]:
        found = judged(self.module, self.data) | self.stability()
        reached = [rung for rung in LADDER if found["loss"] <= rung]
        for path in (self.folder / f"loss_{rung:g}.safetensors" for rung in reached):
            if not path.exists():
                half = {name: tensor.detach().half().contiguous() for name, tensor in self.module.state_dict().items()}
                tables.save({path: save(half)})
        return found

    def stability(self) -> dict[str, float]:
        """Per layer the variance of the stream that leaves it and the gradient's norm, without dropout."""
        tokens, recorder = self.data.heldout[:64], Recorder(self.module, rate=self.recipe.rate, seed=self.recipe.seed)
        sums, weights = _loss(self.module, tokens, self.weigh_heldout[:64])
        (sums / weights).backward()
        recorder.note(0, tokens)
        self.module.zero_grad(set_to_none=True)
        variance, gradient = recorder.frame["variance"][1:], recorder.frame["gradient"][:-1]
        return {f"variance_{i}": v for i, v in enumerate(variance)} | {
            f"gradient_{i}": g for i, g in enumerate(gradient)
        }

    @cached_property
    def weigh_heldout(self) -> Tensor:
        return splits.weigh_answers(self.data.heldout)


def judged(model: nn.Module, learned: Split) -> dict[str, float]:
    """``COLUMNS`` of a model on held-out problems."""
    tokens, answers = learned.heldout, learned.answers
    assert answers is not None
    with torch.no_grad():
        logits = model(input_ids=tokens.ids, use_cache=False).logits
    each = cross_entropy(logits[:, :-1].transpose(1, 2), tokens.ids[:, 1:], reduction="none")
    weigh = splits.weigh_answers(tokens)[:, 1:]
    right = torch.from_numpy(babel.exact(logits.argmax(-1).numpy(), tokens.ids.numpy(), answers.numpy()))
    k = torch.tensor([problem.k for problem in bundled.problems(len(tokens), longest=len(SHARES) - 1)])
    return {
        "loss": float((each * weigh).sum() / weigh.sum()),
        "answers": float(each[answers[:, 1:]].mean()),
        **{f"exact_{length}": float(right[k == length].float().mean()) for length in range(len(SHARES))},
    }


def _loss(
    model: nn.Module, tokens: Tokens, weigh: Float[Tensor, "prompt pos"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    logits = model(input_ids=tokens.ids, use_cache=False).logits
    each = cross_entropy(logits[:, :-1].transpose(1, 2), tokens.ids[:, 1:], reduction="none")
    return (each * weigh[:, 1:]).sum(), weigh[:, 1:].sum()


def _columns(recipe: Recipe) -> dict[str, str]:
    variance = "variance of the stream that leaves layer {}, mean over its numbers, over held-out tokens"
    gradient = "norm of the gradient of layer {}'s weights on held-out prompts"
    each = {"variance": variance, "gradient": gradient}.items()
    return COLUMNS | {f"{name}_{i}": text.format(i) for name, text in each for i in range(recipe.n_layers)}
