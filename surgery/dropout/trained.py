"""Small Babel models that differ in their dropout alone: trained from the same seeds on the same batches.

    model = trained.train(Recipe(rate=0.2, seed=1), "runs/p0.2_1")
    stack = model.stack()               # after all steps: matched steps
    stack = model.stack(loss=1.008)     # when held-out loss first was below this rung: matched loss

Inverted dropout at ``rate`` falls on the MLP's neurons and on the outputs of attention and MLP. It is off whenever the
model is evaluated or returned. Batches and masks are functions of seed and step, so training resumes exactly.

Models of unequal loss are not comparable (one with more dropout learns more slowly), so weights are also kept at every
rung of a ladder of held-out losses (``LADDER``): loss is matched at the lowest rung that all models reached.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import disk
from surgery.corpus import babel, bundled, splits
from surgery.corpus.babel import Babel
from surgery.corpus.splits import Split
from surgery.dropout.stability import Recorder
from surgery.models import loading
from surgery.models.identity import of_module
from surgery.models.scopes import CALL, FORWARD, scope
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.models.weights_hash import tensors_sha256
from surgery.records import checked, tables
from surgery.records.manifest import tokens_hash
from surgery.training import loop as training
from surgery.training.loop import Schedule

RATES, SEEDS = (0.0, 0.1, 0.2, 0.4), (0, 1, 2)
SHARES: tuple[float, ...] = (0.3, 0.4, 0.3)  # of problems with k = 0, 1, 2 steps
LADDER = tuple(round(float(rung), 3) for rung in np.geomspace(1.6, 0.1, 25))
SHIPPED, CONFIRMATION = "dropout/models.safetensors", "dropout/confirmation.csv"
COLUMNS: dict[str, str] = {
    "loss": "held-out loss: nats per token, answers weighing 1, questions a tenth",
    "answers": "held-out cross entropy of answer tokens (nats)",
    **{
        f"exact_{k}": f"share of held-out problems of {k} steps whose whole answer is right" for k in range(len(SHARES))
    },
}


@dataclass(frozen=True)
class Recipe:
    """Everything that a model depends on. Raises ValueError for a rate outside [0, 1)."""

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
class TrainedModel:
    """A model after all its steps, and at every rung of the ladder when its held-out loss first was below it."""

    recipe: Recipe
    weights: Mapping[str, Tensor]
    rungs: Mapping[float, Mapping[str, Tensor]]
    curve: pd.DataFrame

    @property
    def sha256(self) -> str:
        """One hash for its weights after all steps and at every rung."""
        rungs = {f"{rung}/{name}": tensor for rung, weights in self.rungs.items() for name, tensor in weights.items()}
        return tensors_sha256({**self.weights, **rungs})

    def stack(self, loss: float | None = None) -> Stack:
        """The model after all its steps, or at the rung ``loss``. Raises ValueError for a rung that was not reached."""
        if loss is not None and loss not in self.rungs:
            raise ValueError(
                f"{self.recipe.name} was not kept at a loss of {loss}: it reached "
                f"{', '.join(map(str, sorted(self.rungs))) or 'no rung'}"
            )
        module = build(self.recipe)
        module.load_state_dict({n: t.float() for n, t in (self.weights if loss is None else self.rungs[loss]).items()})
        name = self.recipe.name + ("" if loss is None else f" at loss {loss:g}")
        tokenizer = loading.tokenizer_of(str(loading.reference_folder()), loading.REFERENCE)  # the same words
        return Stack(loading.wrap(module, tokenizer, name))


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
    """The problems that all models are trained and evaluated on."""
    return splits.babel(count, heldout, shares=SHARES)


def train(recipe: Recipe, folder: str | Path, *, progress: bool = False) -> TrainedModel:
    """Train, or resume; the folder holds the checkpoint, ``curve.csv`` and the rungs.

    The curve has the columns of ``training.CURVE``, ``COLUMNS`` and, per layer, the variance of the stream that leaves
    it over held-out tokens and the gradient's norm (``variance_0``, ``gradient_0``, ...). Cost: two minutes on a core.

    Raises as ``training.fit`` does, and ValueError for a damaged file of a rung.
    """
    folder, module, problems = disk.folder(folder), build(recipe), data()
    schedule = Schedule(steps=recipe.steps, every=recipe.every, warmup=100, seed=recipe.seed)
    identity = {
        "recipe": asdict(recipe),
        "corpus": tokens_hash(problems.corpus),
        "heldout": tokens_hash(problems.heldout),
        "model": of_module(module),
    }
    task = _Task(module, recipe, problems, folder, json.dumps(identity))
    for rung in LADDER:
        task.kept(rung)  # raises now rather than after the training
    fit = training.fit(task, schedule, folder, identity=identity, columns=_columns(recipe), progress=progress)
    rungs = {rung: task.kept(rung) for rung in LADDER}
    return TrainedModel(recipe, module.state_dict(), {r: w for r, w in rungs.items() if w is not None}, fit.curve)


def matched_loss(models: Iterable[TrainedModel]) -> float:
    """The lowest rung that all models reached. Raises ValueError if there is none."""
    models = list(models)
    common = set.intersection(*(set(model.rungs) for model in models))
    if not common:
        last = max(model.curve["loss"].iloc[-1] for model in models)
        raise ValueError(
            f"no loss of {LADDER[0]:g} or less was reached by all, the worst ended at {last:.2f}: train for more steps"
        )
    return min(common)


def ship(models: Iterable[TrainedModel], file: str | Path) -> None:
    """Write all models into one file, in half precision: after all steps and at their matched loss."""
    models = list(models)
    tensors: dict[str, Tensor] = {}
    loss = matched_loss(models)
    for model in models:
        for kind, weights in (("steps", model.weights), ("loss", model.rungs[loss])):
            tensors |= {f"{model.recipe.name}/{kind}/{name}": tensor.half() for name, tensor in weights.items()}
    header = {
        "loss": loss,
        "recipes": [asdict(model.recipe) for model in models],
        "curves": [model.curve.drop(columns="seconds").round(5).to_dict("list") for model in models],
    }
    disk.folder(Path(file).parent)
    disk.save({Path(file): save(tensors, {"models": json.dumps(header)})})


def load_shipped(file: str | Path | None = None) -> list[TrainedModel]:
    """Load the models of a file that ``ship`` wrote (the bundled ones if not given), each with one rung.

    Raises ValueError for a file without such models.
    """
    path = Path(file) if file is not None else loading.bundled_file(SHIPPED)
    with safe_open(path, framework="pt") as opened:
        if "models" not in (opened.metadata() or {}):
            raise ValueError(
                f"{path} does not hold models of this kind: surgery.dropout.trained.ship writes such files"
            )
        header = json.loads(opened.metadata()["models"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118

    def weights(name: str, kind: str) -> dict[str, Tensor]:
        prefix = f"{name}/{kind}/"
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    recipes = [Recipe(**recipe) for recipe in header["recipes"]]
    return [
        TrainedModel(
            recipe, weights(recipe.name, "steps"), {header["loss"]: weights(recipe.name, "loss")}, pd.DataFrame(curve)
        )
        for recipe, curve in zip(recipes, header["curves"], strict=True)
    ]


def confirmation() -> pd.DataFrame:
    """The bundled measurements of fresh models, ``study.confirm`` of seeds that were not shipped."""
    return tables.read(loading.bundled_file(CONFIRMATION))


def curves(models: Iterable[TrainedModel]) -> pd.DataFrame:
    """Variance of the stream and gradients over training, with dropout off, in the columns of ``stability``.

    The variance of the stream that enters the first layer was not recorded.
    """
    rows = [
        {
            "width": model.recipe.d_model,
            "depth": model.recipe.n_layers,
            "rate": model.recipe.rate,
            "seed": model.recipe.seed,
            "step": int(evaluation["step"]),
            "layer": layer,
            "variance": evaluation.get(f"variance_{layer - 1}", float("nan")),
            "variance_training": float("nan"),
            "gradient": evaluation.get(f"gradient_{layer}", float("nan")),
            "loss": evaluation["answers"],
            "heldout": evaluation["loss"],
        }
        for model in models
        for evaluation in model.curve.to_dict("records")
        for layer in range(model.recipe.n_layers + 1)
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
        with dropout_on(self.model, self.rate, batch.seed):
            sums, weights = _loss(self.model, batch.tokens, batch.weigh)
        return sums[None], weights[None]


@contextmanager
def dropout_on(model: LlamaForCausalLM, rate: float, seed: int) -> Iterator[None]:
    """Context manager: run with dropout on, masks drawn anew at every point from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def drop(x: Tensor) -> Tensor:
        mask = torch.empty(x.shape).bernoulli_(1 - rate, generator=generator)
        return x * (mask / (1 - rate)).to(x)

    with scope() as opened:
        for layer in model.model.layers if rate else ():
            opened.around(layer.mlp.down_proj, FORWARD, lambda inner, x: inner(drop(x)))
            for module in (layer.mlp.down_proj, layer.self_attn.o_proj):
                opened.around(module, CALL, lambda inner, x: drop(inner(x)))
        yield


class _Task:
    """The ``Task`` of ``training.fit``."""

    watched, factors = "loss", (1.0,)

    def __init__(self, module: LlamaForCausalLM, recipe: Recipe, problems: Split, folder: Path, identity: str) -> None:
        self.module, self.recipe, self.data, self.folder, self.identity = module, recipe, problems, folder, identity
        self.student = _Student(module, recipe.rate)
        named = list(module.named_parameters())
        inside = [p.ndim == 2 and ".layers." in name for name, p in named]
        self.matrices = [p for (_, p), matrix in zip(named, inside, strict=True) if matrix]
        self.others = [p for (_, p), matrix in zip(named, inside, strict=True) if not matrix]
        assert problems.weigh is not None
        self.weigh = problems.weigh(problems.corpus)

    @property
    def n_prompts(self) -> int:
        return len(self.data.corpus)

    @property
    def divisible(self) -> bool:
        return not self.recipe.rate  # masks are drawn for a batch as a whole

    def batch(self, prompts: list[int]) -> _Batch:
        ids, mask = self.data.corpus.ids[prompts], self.data.corpus.mask[prompts]
        width = int(mask.sum(1).max())
        seed = np.random.SeedSequence((self.recipe.seed, *prompts)).generate_state(1)[0]
        return _Batch(Tokens(ids[:, :width], mask[:, :width]), self.weigh[prompts][:, :width], int(seed))

    def with_teacher(self, batch: _Batch) -> _Batch:
        return batch

    def evaluate(self) -> dict[str, float]:
        values = scores(self.module, self.data) | self.stability()
        for rung in LADDER:
            if values["loss"] <= rung and self.kept(rung) is None:
                half = {name: tensor.detach().half() for name, tensor in self.module.state_dict().items()}
                disk.save({self._place(rung): checked.pack(half, self.identity)})
        return values

    def kept(self, rung: float) -> dict[str, Tensor] | None:
        """The weights at a rung, None if they were not kept yet or are of an earlier training in the same folder.

        Raises ValueError for a file that is damaged: the training has passed that rung.
        """
        if not self._place(rung).exists():
            return None
        weights, identity = checked.unpack(self._place(rung))
        return weights if identity == self.identity else None

    def _place(self, rung: float) -> Path:
        return self.folder / f"loss_{rung:g}.safetensors"

    def stability(self) -> dict[str, float]:
        """Variance of the stream that leaves each layer, and norm of its gradient, with dropout off."""
        tokens, recorder = self.data.heldout[:64], Recorder(self.module, rate=self.recipe.rate, seed=self.recipe.seed)
        sums, weights = _loss(self.module, tokens, self.weigh_heldout[:64])
        (sums / weights).backward()
        recorder.record(0, tokens)
        self.module.zero_grad(set_to_none=True)
        variance, gradient = recorder.frame["variance"][1:], recorder.frame["gradient"][:-1]
        return {f"variance_{i}": v for i, v in enumerate(variance)} | {
            f"gradient_{i}": g for i, g in enumerate(gradient)
        }

    @cached_property
    def weigh_heldout(self) -> Tensor:
        return splits.weigh_answers(self.data.heldout)


def scores(model: nn.Module, problems: Split) -> dict[str, float]:
    """Evaluate a model on held-out problems: ``COLUMNS``."""
    tokens, answers = problems.heldout, problems.answers
    assert answers is not None
    with torch.no_grad():
        logits = model(input_ids=tokens.ids, use_cache=False).logits
    losses = token_losses(logits, tokens.ids)
    weigh = splits.weigh_answers(tokens)[:, 1:]
    right = torch.from_numpy(babel.exact(logits.argmax(-1).numpy(), tokens.ids.numpy(), answers.numpy()))
    k = _steps_of_heldout(len(tokens))
    return {
        "loss": float((losses * weigh).sum() / weigh.sum()),
        "answers": float(losses[answers[:, 1:]].mean()),
        **{f"exact_{length}": float(right[k == length].float().mean()) for length in range(len(SHARES))},
    }


@cache
def _steps_of_heldout(count: int) -> Int[Tensor, " prompt"]:
    return torch.tensor([problem.k for problem in bundled.problems(count, longest=len(SHARES) - 1)])


def token_losses(
    logits: Float[Tensor, "prompt pos word"], ids: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos-1"]:
    """Cross entropy of every token but the first of each prompt, in nats."""
    predictions = rearrange(logits[:, :-1], "prompt pos word -> prompt word pos")
    return cross_entropy(predictions, ids[:, 1:], reduction="none")


def _loss(
    model: nn.Module, tokens: Tokens, weigh: Float[Tensor, "prompt pos"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    logits = model(input_ids=tokens.ids, use_cache=False).logits
    return (token_losses(logits, tokens.ids) * weigh[:, 1:]).sum(), weigh[:, 1:].sum()


def _columns(recipe: Recipe) -> dict[str, str]:
    variance = "variance of the stream that leaves layer {}, mean over its numbers, over held-out tokens"
    gradient = "norm of the gradient of layer {}'s weights on held-out prompts"
    meanings = {"variance": variance, "gradient": gradient}.items()
    return COLUMNS | {f"{name}_{i}": text.format(i) for name, text in meanings for i in range(recipe.n_layers)}
