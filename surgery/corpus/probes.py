r"""Probe sets: questions with known answers, scored by likelihood, that a scan asks of a rewired model.

A probe is a prompt, its answer, a group and, optionally, choices. A probe set comes from a file, from a generator, or
is running text, in which every token is the answer to the text before it:

    probes.load("mine.jsonl")            {"prompt": "2 + 2 =", "answer": "4", "group": "sums", "choices": ["4", "5"]}
    probes.named("babel", 128)           generated from a seed; ``probes.NAMES`` lists them
    probes.text("stories.txt")           one text per line, or .jsonl with a "text" on each line

Prompt and answer are joined by one space unless there is white space at the seam already (``joiner=""`` joins them
unchanged). **Where the answer begins.** A tokenizer may cut ``prompt + answer`` differently from the two
parts, so they are tokenised together, as the model would see them, and the answer's tokens are those after the
longest prefix in common with the tokens of the prompt alone. A token that straddles the seam thus
belongs to the answer. The choices of a probe are scored from the same token on, so that their likelihoods compare.

``ProbeSet.split`` makes two halves: one to search with, one to measure the winners again. The best of thousands of
wirings on 16 questions is lucky; on the other half it is not.

Why likelihood and not generated text: one pass scores the whole answer, a nearly right answer earns part of the score,
and no format has to be parsed (RYS of D. Ng and its successors generate; there, format effects passed for gains).

>>> numbers = ProbeSet("numbers", (Probe("1 2 3", "4", choices=("4", "9")), Probe("5 6", "7")))
>>> numbers.probes[0].answers
('4', '9')
"""

import hashlib
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from surgery import notebook, plugins
from surgery.corpus import questions
from surgery.corpus.asked import require_named
from surgery.corpus.babel import LANGUAGES
from surgery.corpus.probe_files import read_probes
from surgery.corpus.questions import NAMES as NAMES
from surgery.corpus.questions import Probe as Probe
from surgery.corpus.text_files import read_prompts
from surgery.models.stack import Stack
from surgery.models.targets import Prompt as Prompt
from surgery.models.tokens import (
    Tokens,
    common_prefix,
    has_unknown_words,
    joined,
    padded,
    require_known,
    unended_rows,
)
from surgery.outside import shown


@dataclass(frozen=True)
class Encoded:
    """A probe set as token ids: one row per sequence to be scored, padded on the right.

    ``credit`` divides one point among the scored tokens of a row, by the characters of each (without white space). Its
    sum over the tokens that are the model's first choice is the part of the answer, digit by digit, that the model
    gets right under teacher forcing.
    """

    tokens: Tokens
    scored: Bool[Tensor, "row pos"]  # True at tokens to predict, never the first
    probe: tuple[int, ...]  # row -> index of the probe
    choice: tuple[int, ...]  # row -> which choice, 0 the right answer; 0 where there are none
    groups: tuple[str, ...]  # per probe
    sha256: str  # of the probe set
    credit: Float[Tensor, "row pos"] | None = None
    name: str = ""  # of the probe set
    clusters: tuple[str, ...] = ()  # per probe, what is drawn together; empty for none
    members: tuple[int, ...] = ()  # of a portion: the index of each of its probes in the whole set

    @property
    def prompts(self) -> tuple[int, ...]:
        """The index of each probe in the whole set."""
        return self.members or tuple(range(len(self.groups)))

    @classmethod
    def of(cls, probes: "ProbeSet | Encoded", stack: Stack) -> "Encoded":
        """The probes as ``stack`` reads them; what is encoded already is given back as it is."""
        return probes if isinstance(probes, Encoded) else probes.encode(stack)

    def portion(self, probes: Sequence[int]) -> "Encoded":
        """Some of the probes, numbered from 0 in this order, cut to the longest of them."""
        rows_of: dict[int, list[int]] = {probe: [] for probe in probes}
        for row, probe in enumerate(self.probe):
            if probe in rows_of:
                rows_of[probe].append(row)
        pairs = [(new, row) for new, probe in enumerate(probes) for row in rows_of[probe]]
        rows = [row for _, row in pairs]
        filled = self.tokens.mask[rows].any(0).nonzero()
        columns = slice(int(filled[0]), int(filled[-1]) + 1)
        return replace(
            self,
            tokens=Tokens(self.tokens.ids[rows, columns], self.tokens.mask[rows, columns]),
            scored=self.scored[rows, columns],
            probe=tuple(new for new, _ in pairs),
            choice=tuple(self.choice[row] for row in rows),
            groups=tuple(self.groups[probe] for probe in probes),
            credit=None if self.credit is None else self.credit[rows, columns],
            clusters=tuple(self.clusters[probe] for probe in probes) if self.clusters else (),
            members=tuple(self.prompts[probe] for probe in probes),
        )


@dataclass(frozen=True)
class ProbeSet:
    """Named probes.

    ``joiner`` separates prompt and answer where no white space does; running text is cut to ``max_tokens``. Raises
    ValueError for no probe, and for ``max_tokens`` below 2.
    """

    name: str
    probes: tuple[Probe, ...]
    joiner: str = " "
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.probes:
            raise ValueError(f"the probe set {self.name} holds no probe")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2 (the first token is not predicted), got {self.max_tokens}")

    def __len__(self) -> int:
        return len(self.probes)

    def __repr__(self) -> str:
        groups = list(dict.fromkeys(probe.group for probe in self.probes if probe.group))
        listed = ", ".join([*(shown(group, 20) for group in groups[:6]), *["..."] * (len(groups) > 6)])
        of = f" in {len(groups)} group{'s' * (len(groups) != 1)}: {listed}" if groups else ""
        return f"ProbeSet({shown(self.name, 40)}: {len(self)} probe{'s' * (len(self) != 1)}{of})"

    def _repr_html_(self) -> str:
        rows = [{**asdict(probe), "choices": ", ".join(probe.choices)} for probe in self.probes[:5]]
        return notebook.table(f"{self!r}; the first {len(rows)}:", rows)

    @cached_property
    def sha256(self) -> str:
        """Hash of all probes in order and of how they are joined and cut, but not of the name nor of clusters."""
        probes = [{name: value for name, value in asdict(probe).items() if name != "cluster"} for probe in self.probes]
        content = {"probes": probes, "joiner": self.joiner, "max": self.max_tokens}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split(self, seed: int = 0) -> "tuple[ProbeSet, ProbeSet]":
        """Divide the set into a half to search with and a half to validate on, each group in equal parts.

        The halves share no probe: all copies of one are in the same half. Raises ValueError for a single probe.
        """
        generator, groups = random.Random(f"split {seed}"), defaultdict(list)
        for probe in dict.fromkeys(self.probes):
            groups[probe.group].append(probe)
        turns = [probe for _, group in sorted(groups.items()) for probe in generator.sample(group, len(group))]
        if len(turns) < 2:
            raise ValueError(f"the probe set {self.name} holds one probe only: there is nothing to split")
        search = set(turns[::2])  # groups follow one another, so those of odd size favour each half in turn
        halves = (
            [probe for probe in self.probes if probe in search],
            [probe for probe in self.probes if probe not in search],
        )
        first, second = (
            replace(self, name=f"{self.name} ({half})", probes=tuple(probes))
            for half, probes in zip(("search", "validation"), halves, strict=True)
        )
        return first, second

    def encode(self, stack: Stack) -> Encoded:
        """Encode every probe with each of its answers, and mark the tokens to score.

        Whether there is a beginning mark is left to the tokenizer; an end mark that it adds is removed. Running text is
        scored from its second token on.

        Raises:
            ValueError: the model has no tokenizer; or, naming the probe: it is longer than the model reads, has a word
                the tokenizer does not know, or has an answer without a token of its own.
        """
        tokenizer = stack.tokenizer
        if tokenizer is None:
            raise ValueError(f"{stack.name} has no tokenizer, so it cannot be asked the probes of {self.name}")
        pairs = [(i, j) for i, probe in enumerate(self.probes) for j in range(len(probe.answers))]
        prompts = unended_rows(tokenizer, [probe.prompt for probe in self.probes])
        rows = unended_rows(tokenizer, [self._joined(self.probes[i], self.probes[i].answers[j]) for i, j in pairs])
        rows = [row if self.probes[i].prompt else row[: self.max_tokens] for row, (i, _) in zip(rows, pairs)]
        begins: dict[int, int] = {}  # probe -> its first scored token
        for row, (i, _) in zip(rows, pairs):
            begin = max(1, common_prefix(prompts[i], row)) if self.probes[i].prompt else 1
            begins[i] = min(begins.get(i, begin), begin)
        for row, (i, j) in zip(rows, pairs):
            self._check(i, j, row, begins[i], stack)
        tokens = padded(rows, tokenizer.pad_token_id, stack.d_vocab)
        scored = torch.zeros_like(tokens.mask)
        for n, (row, (i, _)) in enumerate(zip(rows, pairs)):
            scored[n, begins[i] : len(row)] = True
        return Encoded(
            tokens=tokens.to(stack.device),
            scored=scored.to(stack.device),
            probe=tuple(i for i, _ in pairs),
            choice=tuple(j for _, j in pairs),
            groups=tuple(probe.group for probe in self.probes),
            sha256=self.sha256,
            credit=_credit(tokenizer, tokens.ids, scored).to(stack.device),
            name=self.name,
            clusters=tuple(probe.cluster for probe in self.probes),
        )

    def _joined(self, probe: Probe, answer: str) -> str:
        return joined(probe.prompt, answer, self.joiner)

    def _check(self, i: int, j: int, row: list[int], begin: int, stack: Stack) -> None:
        probe, n_ctx = self.probes[i], stack.n_ctx
        start = probe.prompt or probe.answer
        where = f"{self.name}, probe {i + 1} ({start[:40]!r}{'...' if len(start) > 40 else ''})"
        if len(row) > n_ctx:
            advice = "ask something shorter" if probe.prompt else f"cut the text with max_tokens={n_ctx}"
            raise ValueError(f"{where} has {len(row)} tokens, the model reads {n_ctx}; {advice}")
        if begin >= len(row):
            what = (
                f"the answer {probe.answers[j]!r} has no token of its own"
                if probe.prompt
                else "has fewer than 2 tokens"
            )
            raise ValueError(f"{where}: {what}")
        asked = self._joined(probe, probe.answers[j])
        if probe.prompt and has_unknown_words(stack.tokenizer, asked, row):  # in running text they may occur
            raise ValueError(f"{where} contains words that this model's tokenizer does not know")
        require_known(row, stack.d_vocab, where)


# --- from files ------------------------------------------------------------------------------------------------------


def load(path: "str | Path", joiner: str = " ") -> ProbeSet:
    """Read a probe set from a JSONL file: ``prompt``, ``answer``, optionally ``group``, ``choices``, ``cluster``.

    Empty lines are skipped.

    Raises:
        ValueError: the file is missing, empty or not text; or, with its number, a line is not JSON, lacks a field, has
            an unknown field or one of the wrong type, an empty answer, or an answer that is not among its choices.
    """
    return ProbeSet(Path(path).stem, read_probes(path), joiner)


def text(source: "str | Path | Sequence[str]", most: int | None = None, max_tokens: int | None = None) -> ProbeSet:
    """Running text from a file or a list, at most ``most`` texts, scored at every token but the first of each.

    A file is read as by ``surgery study``: ``.jsonl`` with a ``"text"`` on each line, anything else with one text per
    line. Texts are cut to ``max_tokens`` tokens.
    """
    if isinstance(source, str | Path):
        lines = [line for _, line in read_prompts(source, most)]
        return replace(text(lines, max_tokens=max_tokens), name=Path(source).name)
    return ProbeSet("text", tuple(Probe("", line) for line in source[:most]), max_tokens=max_tokens)


# --- tokens ----------------------------------------------------------------------------------------------------------


def _credit(tokenizer: Any, ids: Tensor, scored: Tensor) -> Tensor:
    characters = torch.zeros(int(ids.max()) + 1)
    for token in ids[scored].unique().tolist():
        characters[token] = len("".join(tokenizer.decode([token]).split()))
    credit = characters[ids] * scored
    total = credit.sum(1, keepdim=True)
    return torch.where(total > 0, credit / total, scored / scored.sum(1, keepdim=True))


# --- generated -------------------------------------------------------------------------------------------------------


def named(name: str, count: int = 128, seed: int = 0) -> ProbeSet:
    """Generate ``count`` probes of one of ``NAMES`` from a seed, its groups in turn (see ``surgery.corpus.questions``).

    A set of an installed package (``surgery.plugins``) is made by what its entry point holds: a function of count and
    seed that returns a ``ProbeSet`` or several ``Probe``. Raises ValueError if there is none of that name, or if the
    package's cannot be used.

    >>> named("recall", 3).probes[2].group
    'pairs=8'
    """
    require_named(name)
    return ProbeSet(name, _GENERATORS[name](count, seed)) if name in NAMES else _of_package(name, count, seed)


def _of_package(name: str, count: int, seed: int) -> ProbeSet:
    plugin = plugins.installed("probes", NAMES)[name]
    made = plugin.load()
    try:
        made = made(count, seed)
        made = made if isinstance(made, ProbeSet) else ProbeSet(name, tuple(made))
    except Exception as error:  # a package of somebody else's can raise anything
        raise plugin.error(error) from error
    if odd := next((probe for probe in made.probes if not isinstance(probe, Probe)), None):
        raise plugin.error(f"it gives a {type(odd).__name__} among its probes")
    return replace(made, name=name)


def babel(
    count_per_k: int,
    ks: Iterable[int] = range(7),
    seed: int = 0,
    *,
    sources: Sequence[str] = LANGUAGES,
    targets: Sequence[str] = LANGUAGES,
    group: str = "k",
    heldout: bool = True,
) -> ProbeSet:
    """Problems of the bundled model's corpus, ``count_per_k`` of every length, all different; see ``questions.babel``.

    There are few short held-out ones (over all language pairs 16 with k = 0, 96 with k = 1): where ``count_per_k`` is
    larger, all of them are taken.

    >>> babel(2, [0, 3], targets=["other"]).probes[2].group
    'k=3'
    """
    options: dict[str, Any] = {"sources": sources, "targets": targets, "group": group, "heldout": heldout}
    kinds = [questions.babel(k, seed, **options) for k in ks]
    return ProbeSet("babel", tuple(probe for kind in kinds for probe in itertools.islice(kind, count_per_k)))


def _babel_by(group: str) -> Callable[[int, int], tuple[Probe, ...]]:
    """Vary length and language pair together: as 7 and 16 have no common divisor, every combination occurs."""
    pairs = list(itertools.product(LANGUAGES, LANGUAGES))

    def make(count: int, seed: int) -> tuple[Probe, ...]:
        turns = [(turn % 7, *pairs[turn % len(pairs)]) for turn in range(7 * len(pairs))]
        kinds = [
            questions.babel(k, seed, sources=[source], targets=[target], group=group) for k, source, target in turns
        ]
        return questions.in_turn(kinds, count)

    return make


_GENERATORS: dict[str, Callable[[int, int], tuple[Probe, ...]]] = {
    "babel": _babel_by("k"),
    "babel-pairs": _babel_by("pair"),
    "arithmetic": questions.arithmetic,
    "tracking": questions.tracking,
    "recall": questions.recall,
    "copying": questions.copying,
    "induction": questions.induction,
}
