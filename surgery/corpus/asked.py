"""What a model is to be asked, looked at without torch: a missing or broken file is told before anything is opened."""

import difflib
from pathlib import Path

from surgery import plugins
from surgery.corpus.probe_files import read_probes
from surgery.corpus.questions import NAMES
from surgery.corpus.text_files import LINES, read_prompts
from surgery.models.names import BUNDLED

TEXT = ".txt"  # running text


def require_prompts(model: str, text: "str | Path | None", most: int | None = None) -> None:
    """Raise ValueError if there are no prompts: a ``text`` file that cannot be read, or none and ``model`` has none."""
    if text is not None:
        read_prompts(text, most)
    elif model not in BUNDLED:
        raise ValueError(
            f"{model} brings no prompts of its own; give a text file with --text FILE, one prompt per line"
        )


def require_questions(model: str, questions: str | None, most: int | None = None) -> None:
    """Raise ValueError if nobody said what to ask, or it is no built-in set and no file of questions or texts.

    >>> require_questions("babel", None), require_questions("my-model", "recall")
    (None, None)
    """
    if questions is None:
        if model not in BUNDLED:
            raise ValueError(
                f"what should {model} be asked? It has no questions of its own: name a built-in set with --probes "
                f"({', '.join(name for name in NAMES if not name.startswith('babel'))}), a .jsonl file of "
                'questions ({"prompt": "...", "answer": "..."} on each line), or a .txt file of running text'
            )
    elif (kind := Path(questions).suffix.lower()) == TEXT:
        read_prompts(questions, most)
    elif kind in LINES:
        read_probes(questions)
    else:
        require_named(questions)


def require_named(name: str) -> None:
    """Raise ValueError for a name that no probe set has, built in or of an installed package."""
    if name not in NAMES and name not in (every := plugins.names("probes", NAMES)):
        near = difflib.get_close_matches(name, every, n=1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"there is no probe set {name!r}{guess}; there are {', '.join(every)}, or give a .jsonl file")
