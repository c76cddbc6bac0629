r"""Babel: a generated corpus in which translation and reasoning are separate, and reasoning has a length.

A problem is a start symbol and a chain of ``k`` fixed functions applied one after the other. It is asked in one
language and must be answered in a requested, often different one:

====================  ==========================  =============================================================
language              a problem with ``k = 2``    peculiarity
====================  ==========================  =============================================================
``plain``             ``p3 pf1 pf4``              one token per word, symbol first
``other``             ``o3 of1 of4``              a second vocabulary
``spelled``           ``d a sf1 sf4``             two letters a symbol
``reversed``          ``rf4 rf1 r3``              function-first: the last function to apply comes first
====================  ==========================  =============================================================

    <bos> p3 pf1 pf4 >spelled g e <eos>

``k = 0`` is pure translation, local to a token; every further step needs the result of the one before. So it is known
beforehand where a model must translate, where it must compose and how serial it must be there, and ``k`` is a dial.

The functions are random bijections: every answer is equally likely at every ``k``, and chance is ``1 / n_symbols``.
This is our own corpus; composition chains as a probe of depth are an old idea (Csordas et al. 2025, arXiv 2505.13898,
use multihop arithmetic), the languages follow D. Ng's "input translation, reasoning, output translation".

>>> corpus = Babel()
>>> problem = Problem(symbol=3, chain=(1, 4), source="plain", target="other")
>>> " ".join(corpus.words(problem)).startswith("<bos> p3 pf1 pf4 >other o")
True
"""

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LANGUAGES = ("plain", "other", "spelled", "reversed")
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TRAINING_MIX = (0.10, 0.15, 0.20, 0.25, 0.30)  # shares of k = 0..4 that the reference model was trained on
CONSONANTS, VOWELS = "bdgkmnprtvz", "aeio"


@dataclass(frozen=True)
class Problem:
    """Apply ``chain`` (first function first) to ``symbol``; asked in ``source``, answered in ``target``."""

    symbol: int
    chain: tuple[int, ...]
    source: str
    target: str

    @property
    def k(self) -> int:
        return len(self.chain)


@dataclass(frozen=True)
class Babel:
    """The corpus: its sizes, its function tables (drawn from ``seed``) and its languages.

    A value: equal fields give the equal corpus. Raises ValueError for sizes that the spelling cannot hold.
    """

    n_symbols: int = 10
    n_functions: int = 6
    seed: int = 0
    heldout_percent: int = 10

    def __post_init__(self) -> None:
        most = len(CONSONANTS) * len(VOWELS)
        if not 2 <= self.n_symbols <= most:
            raise ValueError(f"n_symbols must be 2 to {most} (two letters must spell each), got {self.n_symbols}")
        if self.n_functions < 1:
            raise ValueError(f"n_functions must be at least 1, got {self.n_functions}")

    @cached_property
    def tables(self) -> np.ndarray:
        """The function tables, ``[n_functions, n_symbols]``: each row is a permutation of the symbols."""
        generator = np.random.default_rng(self.seed)
        return np.stack([generator.permutation(self.n_symbols) for _ in range(self.n_functions)])

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        letters = sorted({letter for symbol in range(self.n_symbols) for letter in _spell(symbol)})
        words = [f"{language[0]}{i}" for language in LANGUAGES if language != "spelled" for i in range(self.n_symbols)]
        functions = [f"{language[0]}f{i}" for language in LANGUAGES for i in range(self.n_functions)]
        return (PAD, BOS, EOS, *(f">{language}" for language in LANGUAGES), *words, *letters, *functions)

    @cached_property
    def token_ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    def solve(self, problem: Problem) -> int:
        """The symbol that the chain leads to."""
        symbol = problem.symbol
        for function in problem.chain:
            symbol = int(self.tables[function, symbol])
        return symbol

    def question(self, problem: Problem) -> list[str]:
        """The words that a model is given, up to and including the request for a language."""
        symbol = _symbol_words(problem.symbol, problem.source)
        functions = [f"{problem.source[0]}f{function}" for function in problem.chain]
        words = functions[::-1] + symbol if problem.source == "reversed" else symbol + functions
        return [BOS, *words, f">{problem.target}"]

    def answer(self, problem: Problem) -> list[str]:
        """The words of the right answer: one, or the two letters of a spelled symbol."""
        return _symbol_words(self.solve(problem), problem.target)

    def words(self, problem: Problem) -> list[str]:
        """Question, answer and end mark."""
        return [*self.question(problem), *self.answer(problem), EOS]

    def heldout(self, problem: Problem) -> bool:
        """Whether the problem is kept out of training.

        From ``k = 2`` on a (symbol, chain) is held out in every language pair at once, so that solving it takes
        composition. Shorter problems are the tables themselves: there each language pair and function misses one symbol
        in ``n_symbols``, in rotation, which the other pairs teach, so that solving it takes translation.
        """
        if problem.k < 2:
            pair = LANGUAGES.index(problem.source) * len(LANGUAGES) + LANGUAGES.index(problem.target)
            return (problem.symbol + pair + sum(problem.chain)) % self.n_symbols == 0
        return zlib.crc32(repr((self.seed, problem.symbol, problem.chain)).encode()) % 100 < self.heldout_percent

    def problems(
        self, k: int, sources: Sequence[str] = LANGUAGES, targets: Sequence[str] = LANGUAGES
    ) -> Iterator[Problem]:
        """Every problem with ``k`` steps, in a fixed order."""
        for symbol in range(self.n_symbols):
            for chain in itertools.product(range(self.n_functions), repeat=k):
                for source, target in itertools.product(sources, targets):
                    yield Problem(symbol, chain, source, target)

    def sample(self, k: int, count: int, seed: int, heldout: bool = True) -> list[Problem]:
        """Draw ``count`` random problems with ``k`` steps, held out or from training, language pairs in turn.

        Raises ValueError where that side has no such problem.
        """
        generator = np.random.default_rng((seed, k))
        pairs = list(itertools.product(LANGUAGES, LANGUAGES))
        chosen: list[Problem] = []
        for _ in range(1000 * count):
            source, target = pairs[len(chosen) % len(pairs)]
            chain = tuple(int(f) for f in generator.integers(self.n_functions, size=k))
            problem = Problem(int(generator.integers(self.n_symbols)), chain, source, target)
            if self.heldout(problem) == heldout:
                chosen.append(problem)
            if len(chosen) == count:
                break
        if len(chosen) < count:
            raise ValueError(f"no {'held-out' if heldout else 'training'} problem with k = {k} to sample")
        return chosen

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """A word-level Hugging Face tokenizer of the corpus, which prepends ``<bos>`` itself."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel(self.token_ids, unk_token=PAD))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, self.token_ids[BOS])]
        )
        return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=BOS, eos_token=EOS, pad_token=PAD)

    def encode(self, problems: Sequence[Problem]) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded token ids ``[problem, pos]`` and a mask of the same shape that marks the answers' tokens."""
        rows = [[self.token_ids[word] for word in self.words(problem)] for problem in problems]
        tokens = np.full((len(rows), max(map(len, rows), default=0)), self.token_ids[PAD], dtype=np.int64)
        answers = np.zeros_like(tokens, dtype=bool)
        for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
            tokens[i, : len(row)] = row
            answers[i, len(row) - 1 - len(self.answer(problem)) : len(row) - 1] = True
        return tokens, answers

    def answer_mask(self, tokens: np.ndarray) -> np.ndarray:
        """Mark the tokens of answers in token ids ``[problem, pos]``: those between a request and the end mark."""
        requested = np.isin(tokens, [self.token_ids[f">{language}"] for language in LANGUAGES]).cumsum(1) > 0
        ended = (tokens == self.token_ids[EOS]).cumsum(1) > 0
        return np.pad(requested, ((0, 0), (1, 0)))[:, :-1] & ~ended

    def mixture(self, count: int, seed: int, shares: Sequence[float] = TRAINING_MIX) -> list[Problem]:
        """Draw ``count`` random training problems, k = 0, 1, ... in these shares, shuffled."""
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(count, shares)
        problems = [p for k, n in enumerate(counts) for p in self.sample(k, int(n), seed, heldout=False)]
        return [problems[i] for i in generator.permutation(count)]


def exact(predicted: np.ndarray, tokens: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Tell for each problem whether every answer token is the model's first choice, given all tokens before it.

    ``predicted[problem, pos]`` is the most likely token *after* ``pos``. This equals greedy decoding of the answer, at
    the cost of one forward pass.
    """
    right = (predicted[:, :-1] == tokens[:, 1:]) | ~answers[:, 1:]
    return right.all(axis=1)


def _spell(symbol: int) -> list[str]:
    return [CONSONANTS[symbol // len(VOWELS)], VOWELS[symbol % len(VOWELS)]]


def _symbol_words(symbol: int, language: str) -> list[str]:
    return _spell(symbol) if language == "spelled" else [f"{language[0]}{symbol}"]
