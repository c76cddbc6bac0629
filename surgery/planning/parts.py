"""The parts of a study: what each measures at which level, what that costs, and what the level leaves out.

A question's room says in ``part.py`` which parts it has. A part has levels, from the leanest to the full one; a level
is settings (JSON values), its ``Work``, and in words what it cuts. ``surgery.planning.plans`` chooses among them and
``surgery.study`` runs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.models import identity
from surgery.models.loading import untrained
from surgery.models.stack import Stack
from surgery.models.tokens import Tokens
from surgery.planning.machine import Work
from surgery.records import manifest

Say = Callable[[str], Any]


class NotMeasurableError(ValueError):
    """A part turned out, while it was measured, not to be measurable on this model and these prompts."""


@dataclass(frozen=True)
class Shape:
    """What costs depend on: the size of the model, and how much it is run on.

    Attributes:
        n_layers, d_model, d_mlp, d_vocab: of the model.
        prompts: how many; ``longest``: tokens of the longest of them; ``tokens``: real tokens of all.
        max_length: the longest window or span that is asked for.
        batch_size: prompts run at once.
        own: whether the model brings its own prompts, whose kinds are known.
        half: how long a layer takes in bfloat16, as a share of what it takes in float32.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    d_vocab: int
    prompts: int
    longest: int
    tokens: int
    max_length: int
    batch_size: int
    own: bool = False
    half: float = 1.0

    @classmethod
    def of(cls, stack: Stack, *, prompts: int, longest: int, tokens: int, batch_size: int, **others: Any) -> "Shape":
        """The shape of a model and what it runs on; ``max_length`` is all layers unless ``others`` say so."""
        return cls(
            n_layers=stack.n_layers,
            d_model=stack.d_model,
            d_mlp=getattr(stack.model.cfg, "d_mlp", None) or 4 * stack.d_model,
            d_vocab=stack.d_vocab,
            prompts=prompts,
            longest=longest,
            tokens=tokens,
            batch_size=batch_size,
            **{"max_length": stack.n_layers} | others,
        )

    @property
    def padded(self) -> int:
        """Tokens that run, padding included."""
        return self.prompts * self.longest

    @property
    def batch(self) -> int:
        """Tokens of a batch, padding included."""
        return min(self.batch_size, self.prompts) * self.longest

    @property
    def forward(self) -> Work:
        """One forward pass of all prompts, without the head."""
        return Work(forward=self.n_layers * self.padded)

    @property
    def backward(self) -> Work:
        """One forward and backward pass of all prompts, without the head."""
        return Work(backward=self.n_layers * self.padded)

    @property
    def readout(self) -> Work:
        """The next-token distributions of all tokens."""
        return Work(readouts=self.tokens)

    @property
    def streams(self) -> float:
        """Bytes of the stream before and after every layer, of one batch."""
        return 4.0 * (self.n_layers + 1) * self.batch * self.d_model

    @property
    def graph(self) -> float:
        """Bytes that a gradient through all layers keeps of one batch."""
        return 4.0 * self.n_layers * self.batch * (14 * self.d_model + 6 * self.d_mlp)


@dataclass(frozen=True)
class Level:
    """How thoroughly a part is measured.

    Attributes:
        settings: what the part is called with.
        work: what that costs.
        cut: what the full level has beyond this one, in words; empty for the full level.
        fair: whether this is enough for an answer that one would show to others.
    """

    settings: Mapping[str, Any]
    work: Work
    cut: str = ""
    fair: bool = True


@dataclass
class Subject:
    """What is measured: the opened model, its prompts, and the settings that all parts share.

    ``probes`` is what the scan asks (a probe set or a file of questions); None asks the model's own problems, or the
    prompts as running text. ``whole_scan`` says that this study scans every repeated span, so that its other parts may
    read that.
    """

    stack: Stack
    prompts: list[tuple[int, str]]
    text: str | None
    tokens: Tokens
    max_tokens: int
    seed: int = 0
    batch_size: int = 64
    progress: bool = False
    cluster: Any = None
    whole_scan: bool = False
    probes: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    say: Say = lambda _: None

    @property
    def own(self) -> bool:
        """Whether the prompts are the model's own."""
        return self.text is None

    @property
    def identity(self) -> dict[str, Any]:
        """What pieces of a measurement depend on besides its settings."""
        return {
            "model": identity.digest(self.stack),
            "tokens": manifest.tokens_hash(self.tokens),
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    @cached_property
    def fresh(self) -> Stack:
        """The same architecture with fresh weights."""
        return Stack(untrained(self.stack.model, self.seed))

    def manifest(self, **settings: Any) -> dict[str, Any]:
        """The manifest of a table about these prompts."""
        return manifest.manifest(self.stack, self.tokens, seed=self.seed, **self.settings, **settings)


@dataclass(frozen=True)
class Part:
    """A part of a study.

    Attributes:
        name: one or two words, unique.
        question: which of ``chapters.MEASURED`` it belongs to.
        says: what a study says when the part begins.
        levels: the levels for a shape, the leanest first; the last is the full one.
        measure: measures a subject at the settings of a level and writes files to a folder.
        refusal: why a subject cannot be measured, in words, or None.
        ready: raises ValueError where a folder holds something that the part would refuse to go on with; called before
            anything is measured.
    """

    name: str
    question: str
    says: str
    levels: Callable[[Shape], tuple[Level, ...]]
    measure: Callable[[Subject, Path, Mapping[str, Any]], Any]
    refusal: Callable[[Subject], str | None] = lambda _: None
    ready: Callable[[Subject, Path], None] = lambda subject, folder: None
