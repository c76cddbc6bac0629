"""Freeze both ends of a model and train a fresh middle on the activations between them.

    pairs = graft.latents(stack, data.corpus, 4, 9, "latents")           # once: what enters and leaves layers 4 to 8
    grown = graft.train(stack, pairs, data.stop, "runs/graft", depth=5)  # a new middle, from random weights
    surgery.series.windows(surgery.Stack(grown.model), data.heldout)    # a model like any other

The middle of a model maps the stream ``x_start`` that enters it to ``x_stop`` that leaves it. A fresh one of any depth
and width learns that from stored pairs: its target is the update ``u = x_stop - x_start``, its loss

    E |W (u_hat - u)|^2 / E |W (u - E u)|^2,

the unexplained share of a whitened update. ``W`` divides each dimension, or each principal component, by its standard
deviation, with a floor; a token whose update is far larger than usual counts as ``cap`` times the usual. Cross entropy,
or the divergence from the original's logits, both through the frozen decoder, can be added. Layers before and behind
never change, which is proved bit for bit. Blockwise distillation of this kind is an old idea (Li et al.
2019, arXiv 1911.13053; Xu et al. 2020, 2002.02925; Bercovich et al. 2024, 2411.19146); what this adds is a ledger, from
which its cost can be read against that of training the whole.

Controls: the same run on cross entropy alone (``Objective(latent=0.0, cross_entropy=1.0)``), the whole model from
random weights (``fit(..., parts="all")``), and the maps of ``surgery.graft.linear_maps``, at equal operations.
"""

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformer_lens import TransformerBridge

from surgery.corpus.splits import Weigh
from surgery.graft.parts import PARTS as PARTS
from surgery.instruments import fidelity, massive
from surgery.models.identity import refuse_hooks
from surgery.models.loading import plain, wrap
from surgery.models.stack import Context, Stack
from surgery.models.tokens import Tokens
from surgery.models.transfers import send
from surgery.models.weights_hash import tensors_sha256
from surgery.rebuild import layout
from surgery.records import manifest
from surgery.stats.drift import NEGLIGIBLE
from surgery.stats.sampling import Sampling
from surgery.training import loop
from surgery.training.activations import Batch, Latents, Moments, Pairs
from surgery.training.harvest import harvest as latents
from surgery.training.ledger import Ledger
from surgery.training.loop import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Graft", "Objective", "Schedule", "Task", "fit", "heal", "latents", "train"]


@dataclass(frozen=True)
class Objective:
    """What the middle learns: factors of the three terms of the loss, and how updates are whitened."""

    latent: float = 1.0  # unexplained share of the whitened update
    kl: float = 0.0  # KL(original || student), nats per weighted token, through the decoder
    cross_entropy: float = 0.0  # nats per weighted token, through the decoder
    whiten: str = "std"  # std, principal or none
    floor: float = 0.1  # smallest standard deviation, as a fraction of the median over dimensions
    cap: float = 9.0  # largest weight of one token's |W (u - E u)|^2, in multiples of the mean

    def __post_init__(self) -> None:
        if min(self.factors) < 0 or not any(self.factors):
            raise ValueError(f"latent, kl and cross_entropy are factors of 0 or more, not all 0, got {self.factors}")
        if self.whiten not in ("std", "principal", "none"):
            raise ValueError(f"whiten is std, principal or none, got {self.whiten!r}")
        if self.floor < 0 or not self.cap > 0:
            raise ValueError(f"floor is 0 or more and cap above 0 (inf: no cap), got {self.floor} and {self.cap}")

    @property
    def factors(self) -> tuple[float, float, float]:
        """Factors of the terms, in the order in which the student returns them."""
        return self.latent, self.kl, self.cross_entropy

    @property
    def reads_out(self) -> bool:
        """Whether logits are needed, and so the layers behind the middle."""
        return self.kl > 0 or self.cross_entropy > 0


@dataclass(frozen=True)
class Graft:
    """A trained model and the record of its training."""

    stack: Stack
    span: tuple[int, int]  # the middle, counted in the model's own layers
    curve: pd.DataFrame  # see training.CURVE and fidelity.COLUMNS
    ledger: Ledger
    parameters: int = 0  # how many numbers were trained
    stopped_early: bool = False

    @property
    def model(self) -> TransformerBridge:
        return self.stack.model


@dataclass(frozen=True)
class _Batch(Batch):
    """A batch with the weight of every token as a prediction target."""

    weights: Float[Tensor, "prompt pos"] = field(kw_only=True)


def train(
    teacher: Stack,
    pairs: Latents,
    heldout: Tokens,
    folder: str | Path,
    *,
    depth: int | None = None,
    d_mlp: int | None = None,
    n_heads: int | None = None,
    d_model: int | None = None,
    old: float = 0.0,
    objective: Objective = Objective(),
    schedule: Schedule = Schedule(),
    **options: Any,
) -> Graft:
    """Train a new middle in place of layers ``pairs.start`` to ``pairs.stop - 1`` on stored activations.

    The middle has ``depth`` layers of MLP width ``d_mlp`` and ``n_heads`` heads, with a stream of ``d_model`` between
    them; what is not given is as in the old one. ``old`` is the share of the old weights it starts from: 0 random
    weights, 1 the old ones, between them a mix (Ash and Adams 2020, 1910.08475) whose random part is drawn with
    ``schedule.seed``. ``options`` are those of ``fit``.

    ``folder`` gets ``curve.csv`` and ``checkpoint.safetensors`` as training goes on, and in the end ``model``, which
    ``surgery.load`` opens (and transformers too, where the middle has the other layers' sizes); TransformerLens' own
    models have no such form.

    Cost: 6 operations per weight of the middle and token, less what the gradient of the middle's input would take; with
    ``kl`` or ``cross_entropy`` about 4 more per weight of the decoder. The teacher is not proved again, the student
    once. Raises as ``fit`` and ``layout.middle`` do.

    >>> import tempfile
    >>> from surgery.instruments import known_networks
    >>> teacher, folder = Stack(known_networks.mixed_network(0.5)), tempfile.mkdtemp()
    >>> tokens = Tokens.of(known_networks.tokens(16, 8))
    >>> pairs = latents(teacher, tokens[:12], 1, 3, f"{folder}/latents")
    >>> grown = train(teacher, pairs, tokens[12:], f"{folder}/run", schedule=Schedule(steps=2, batch=4, every=1))
    >>> grown.span, grown.curve["step"].tolist()
    ((1, 3), [0, 1, 2])
    """
    sizes: dict[str, Any] = {"d_mlp": d_mlp, "n_heads": n_heads, "d_model": d_model}
    rows = layout.middle(teacher.n_layers, pairs.start, pairs.stop, depth, old=old, **sizes)
    student = layout.build_stack(teacher, rows, schedule.seed)
    span = (pairs.start, pairs.start + len(rows) - (teacher.n_layers - pairs.stop + pairs.start))
    graft = fit(teacher, student, span, pairs, heldout, folder, objective=objective, schedule=schedule, **options)
    accelerator = options.get("accelerator")
    if (accelerator is None or accelerator.is_main_process) and plain(graft.model) is not None:
        _keep(graft.stack, Path(folder) / "model")
    return graft


def _keep(stack: Stack, place: Path) -> None:
    """Save a trained model, unless it lies there already; one of an earlier training gives way to it."""
    card = place / "README.md"
    if card.is_file() and stack.sha256 in card.read_text(encoding="utf-8"):
        return
    if place.exists():
        shutil.rmtree(place)
    layout.save(stack, place)


def heal(
    teacher: Stack,
    grown: Graft,
    pairs: Latents,
    heldout: Tokens,
    folder: str | Path,
    *,
    parts: str = "junction",
    objective: Objective = Objective(latent=0.0, kl=1.0),
    schedule: Schedule = Schedule(steps=200, learning_rate=5e-4),
    **options: Any,
) -> Graft:
    """Train a copy of a graft with the decoder's first layer (``junction``) or everything (``all``) unfrozen too.

    Its ledger goes on from the graft's, with lines of its own for this phase. Raises as ``fit`` does.
    """
    copy = layout.build_stack(grown.stack, [layout.Row(layer) for layer in range(grown.stack.n_layers)])
    return fit(
        teacher,
        copy,
        grown.span,
        pairs,
        heldout,
        folder,
        parts=parts,
        objective=objective,
        schedule=schedule,
        phase="healing",
        spent=grown.ledger,
        **options,
    )


def fit(
    teacher: Stack,
    student: TransformerBridge | Stack,
    span: tuple[int, int],
    pairs: Latents,
    heldout: Tokens,
    folder: str | Path,
    *,
    parts: str = "middle",
    objective: Objective = Objective(),
    schedule: Schedule = Schedule(),
    weigh: Weigh | None = None,
    answers: Bool[Tensor, "prompt pos"] | None = None,
    phase: str = "training",
    spent: Ledger | None = None,
    watched: str | None = None,
    accelerator: "Accelerator | None" = None,
    progress: bool = False,
) -> Graft:
    """Train ``parts`` of ``student`` in place; its middle is ``span``, counted in its own layers.

    ``middle`` and ``junction`` (the middle and the layer behind it) start from the stored ``x_start``, ``all`` (from
    the embedding to the head) from the tokens. ``weigh`` gives the weight of every token as a prediction target for
    ``kl`` and ``cross_entropy`` (default: 1 each); ``answers`` marks the tokens of ``heldout`` that ``fidelity`` scores
    as answers. ``heldout`` are prompts to stop by, such as ``Split.stop``: the curve is of them, and ``watched`` is the
    number that early stopping goes by (default: ``unexplained_whitened`` where nothing is read out, else
    ``cross_entropy``). Report on others: what was chosen by prompts is better on these than it is. Called again with
    the same arguments and the student in its first state, it goes on where it was stopped; see ``training.fit``. A
    ``student`` that is a Stack is not proved again.

    Raises:
        ValueError: as ``training.fit``; activations of another model, or damaged; a model in half precision.
        OSError: the folder cannot be written, or the disk is full.
    """
    if parts not in PARTS:
        raise ValueError(f"parts is {', '.join(PARTS)}, got {parts!r}")
    if parts == "junction" and not objective.reads_out:
        raise ValueError(
            "the layer behind the middle learns from kl or cross_entropy only: give one of them, or parts='middle'"
        )
    if teacher.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{teacher.name} is in {teacher.dtype}, which training would round away: open it with "
            "dtype=torch.float32; Schedule(precision='bf16') computes in half precision"
        )
    stack = student if isinstance(student, Stack) else Stack(student)
    for model in (teacher, stack):
        refuse_hooks(model, "a training that can be resumed")
    pairs.require(teacher)
    pairs.verify()
    sample = pairs.batch(range(min(16, pairs.n_prompts)))
    massive.warn_of_updates((sample.x_stop - sample.x_start)[sample.tokens.mask], pairs.start, pairs.stop)
    reads = objective.reads_out or parts == "all"
    if parts == "all" and objective.latent:
        objective = replace(objective, latent=0.0)
    task = Task(
        teacher,
        stack,
        span,
        parts,
        pairs,
        heldout,
        objective,
        weigh or _equal_weights,
        answers,
        watched or ("cross_entropy" if reads else "unexplained_whitened"),
    )
    weights = (weigh or _equal_weights)(heldout)  # what a function does is told by what it gives
    marked = torch.empty(0) if answers is None else answers
    identity = {
        "parts": parts,
        "span": list(span),
        "objective": asdict(objective),
        "latents": pairs.source,
        "heldout": manifest.tokens_hash(heldout),
        "watched": task.watched,
        "weigh and answers": tensors_sha256({"weigh": weights, "answers": marked}),
    }
    uses_activations = parts != "all" or objective.kl > 0  # else only the tokens
    before = pairs.ledger(teacher, schedule) if spent is None and uses_activations else spent
    training = loop.fit(
        task,
        schedule,
        Path(folder),
        phase=phase,
        identity=identity,
        spent=before,
        accelerator=accelerator,
        columns=fidelity.COLUMNS,
        manifest=manifest.manifest(teacher, heldout, seed=schedule.seed, folder=str(folder), phase=phase),
        progress=progress,
    )
    parameters = sum(parameter.numel() for parameter in task.matrices + task.others)
    return Graft(_synchronised(stack), span, training.curve, training.ledger, parameters, training.stopped_early)


class _Student(nn.Module):
    """The model under training, as a function from a batch to sum and weight of every term of the loss."""

    def __init__(
        self, stack: Stack, span: tuple[int, int], objective: Objective, whole: bool, scale: "_Scale | None"
    ) -> None:
        super().__init__()
        self.model = plain(stack.model) or stack.model.original_model
        self.objective, self.whole = objective, whole
        self._stack, self._span, self._scale = [stack], span, scale  # a list hides the bridge from named_parameters

    def forward(self, batch: _Batch) -> tuple[Float[Tensor, " term"], Float[Tensor, " term"]]:
        stack, (start, stop), tokens = self._stack[0], self._span, batch.pairs.tokens
        terms: list[tuple[Tensor, Tensor]] = []
        if self.whole:
            terms.append(_nothing(batch))
            logits: Tensor | None = stack.run(tokens, ":", grad=True)
        else:
            context = stack.context(tokens)
            x = stack.execute(f"{start}:{stop}", batch.pairs.x_start, context, grad=True)
            terms.append(_nothing(batch) if self._scale is None else self._scale.unexplained(x, batch.pairs))
            logits = decode(stack, stop, x, context, grad=True) if self.objective.reads_out else None
        weights = batch.weights[:, 1:]
        if batch.logits is not None and logits is not None:
            log_p, log_q = (log_softmax(scores[:, :-1].float(), -1) for scores in (batch.logits, logits))
            divergence = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            terms.append(((divergence * weights).sum(), weights.sum()))
        else:
            terms.append(_nothing(batch))
        if self.objective.cross_entropy and logits is not None:
            loss = cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens.ids[:, 1:], reduction="none")
            terms.append(((loss * weights).sum(), weights.sum()))
        else:
            terms.append(_nothing(batch))
        sums, totals = zip(*terms)
        return torch.stack(sums), torch.stack(totals)


@dataclass(frozen=True)
class _Scale:
    """The whitening of updates, and the usual size of a whitened one."""

    mean: Float[Tensor, " d_model"]
    matrix: Float[Tensor, "d_model d_model"]
    usual: float  # E |W (u - E u)|^2
    cap: float

    @classmethod
    def of(cls, moments: Moments, objective: Objective, device: torch.device) -> "_Scale":
        covariance = moments.uu
        if objective.whiten == "std":
            variance, axes = covariance.diagonal(), torch.eye(len(covariance), dtype=covariance.dtype)
        elif objective.whiten == "principal":
            variance, axes = torch.linalg.eigh(covariance)
        else:
            variance, axes = torch.ones(len(covariance)), torch.eye(len(covariance), dtype=covariance.dtype)
        deviation = variance.clamp(min=0).sqrt()
        varying = deviation[variance > NEGLIGIBLE * variance.max()]  # dimensions that the middle writes at all
        matrix = axes / deviation.clamp(min=objective.floor * float(varying.median())).clamp(min=1e-12)
        usual = float((matrix.T @ covariance @ matrix).trace())
        return cls(moments.mean_u.float().to(device), matrix.float().to(device), usual, objective.cap)

    def unexplained(self, x: Float[Tensor, "prompt pos d_model"], pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Sum over tokens of the whitened error of ``x`` over the usual size, and sum of the tokens' weights."""
        u = pairs.x_stop - pairs.x_start
        size = ((u - self.mean) @ self.matrix).pow(2).sum(-1) / self.usual
        error = ((x.float() - pairs.x_stop) @ self.matrix).pow(2).sum(-1) / self.usual
        share = pairs.tokens.mask / (size / self.cap).clamp(min=1)
        return (error * share).sum(), share.sum()


@dataclass
class Task:
    """The task that ``fit`` hands to ``training.fit``: to train ``parts`` of ``stack``, the student with middle
    ``span``."""

    teacher: Stack
    stack: Stack
    span: tuple[int, int]
    parts: str
    pairs: Latents
    heldout: Tokens
    objective: Objective
    weigh: Weigh
    answers: Tensor | None
    watched: str
    student: _Student = field(init=False)
    matrices: list[nn.Parameter] = field(init=False)
    others: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        scale = _Scale.of(self.pairs.moments(), self.objective, self.stack.device) if self.objective.latent else None
        self.student = _Student(self.stack, self.span, self.objective, self.parts == "all", scale)
        twin = plain(self.stack.model)
        blocks = self.stack.model.blocks
        layers = [block if twin is None else twin.get_submodule(block.name) for block in blocks]
        start, stop = self.span
        trained = {"middle": layers[start:stop], "junction": layers[start : stop + 1], "all": layers}[self.parts]
        inside = [parameter for layer in trained for parameter in layer.parameters()]
        known = {id(parameter) for parameter in inside}
        outside = [p for p in self.student.parameters() if id(p) not in known] if self.parts == "all" else []
        self.matrices = [parameter for parameter in inside if parameter.ndim == 2]
        self.others = [parameter for parameter in inside if parameter.ndim != 2] + outside

    @property
    def factors(self) -> tuple[float, ...]:
        return self.objective.factors

    @property
    def n_prompts(self) -> int:
        return self.pairs.n_prompts

    @property
    def divisible(self) -> bool:
        return True

    def batch(self, prompts: list[int]) -> _Batch:
        pairs = self.pairs.batch(prompts)
        device = self.stack.device
        pairs = Pairs(pairs.tokens.to(device), send(pairs.x_start, device), send(pairs.x_stop, device))
        return _Batch(pairs, weights=self.weigh(pairs.tokens))

    def with_teacher(self, batch: _Batch) -> _Batch:
        if not self.objective.kl:
            return batch
        context = self.teacher.context(batch.pairs.tokens)
        with torch.no_grad():
            return replace(batch, logits=decode(self.teacher, self.pairs.stop, batch.pairs.x_stop, context))

    def evaluate(self) -> dict[str, float]:
        span = (self.pairs.start, self.pairs.stop)
        row = fidelity.compare(
            self.teacher,
            self.stack,
            self.heldout,
            span,
            self.span,
            answers=self.answers,
            sampling=Sampling(resamples=0),
        )
        return {str(name): float(value) for name, value in row.iloc[0].items() if name in fidelity.COLUMNS}


def decode(
    stack: Stack, stop: int, x: Float[Tensor, "prompt pos d_model"], context: Context, *, grad: bool = False
) -> Float[Tensor, "prompt pos d_vocab"]:
    """Logits that the layers from ``stop`` on and the head make of the stream ``x``. Cost: ``1 - stop / L`` F."""
    last = stack.execute(f"{stop}:", x, context, grad=grad) if stop < stack.n_layers else x
    return stack.readout(last, grad=grad)


def _equal_weights(tokens: Tokens) -> Float[Tensor, "prompt pos"]:
    return tokens.mask.float()


def _nothing(batch: _Batch) -> tuple[Tensor, Tensor]:
    """A term that adds nothing to the loss."""
    zero = batch.weights.new_zeros(())
    return zero, zero + 1


def _synchronised(stack: Stack) -> Stack:
    """The Stack, or one on a new bridge where the adapter keeps weights of its own, which training did not reach."""
    twin = plain(stack.model)
    if twin is None:
        return stack
    shared = {id(parameter) for parameter in twin.parameters()}
    if all(id(parameter) in shared for parameter in stack.model.parameters()):
        return stack
    return Stack(wrap(twin, stack.tokenizer, str(stack.model.cfg.model_name)))
