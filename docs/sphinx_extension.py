"""What the site needs beyond Sphinx: drawings of wirings, links from names to the reference, docstrings made tidy."""

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

import surgery
from surgery import Wiring

ITEM = re.compile(r"\s*([-*+•]|\d+[.)])\s")


class Drawn(SphinxDirective):
    """Draw every wiring of the body, one a line, of a model with as many layers as the argument says."""

    has_content = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        parts: list[nodes.Node] = []
        for text in self.content:
            wiring = Wiring.parse(text, int(self.arguments[0]))
            svg = f'<div class="wiring">{wiring.draw()}</div>'
            parts += [nodes.paragraph("", "", nodes.literal(text, text)), nodes.raw("", svg, format="html")]
        return parts


class Linked(SphinxTransform):
    """Make code that is the name of something in the library, such as ``series.windows``, a link to its docstring."""

    default_priority = 210

    def apply(self, **options: Any) -> None:
        for node in list(self.document.findall(nodes.literal)):
            where = place_of(node.astext().removesuffix("()"))
            if where and not isinstance(node.parent, (nodes.reference, pending_xref)):
                link = pending_xref("", refdomain="py", reftype="obj", reftarget=where, refdoc=self.env.docname)
                node.replace_self(link)
                link += node


def place_of(text: str) -> str | None:
    """Where the reference has a name of the library: its module, or the module of the function or class.

    >>> place_of("series.windows"), place_of("surgery.rebuild.width"), place_of("Wiring.parse"), place_of("x_l")
    ('surgery.series.window.windows', 'surgery.rebuild.width', 'surgery.wiring.value.Wiring.parse', None)
    """
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", text):
        return None
    thing: Any = surgery
    for part in text.removeprefix("surgery.").split("."):
        thing = getattr(thing, part, None)
        if thing is None:
            return None
    if inspect.ismodule(thing):
        return thing.__name__
    return f"{thing.__module__}.{thing.__qualname__}" if inspect.isclass(thing) or inspect.isroutine(thing) else None


def tidied(lines: list[str]) -> list[str]:
    """The lines of a docstring, with formulas that stand by themselves as literal blocks, and ``|x|`` as it is meant.

    >>> tidied(["The size |x|:", "", "    |x| = 1"])
    ['The size \\\\|x\\\\|:', '', '::', '', '    |x| = 1']
    """
    result: list[str] = []
    first, literal = "", -1  # of the paragraph before; the indentation from which on all is literal
    for before, line in zip(["", *lines], lines):
        indent, base = _indent(line), _indent(first)
        if line.strip() and not before.strip():
            if literal >= 0 and indent < literal:
                literal = -1
            table = line.lstrip().startswith("==")
            if literal < 0 and first and indent > base and not table and not ITEM.match(line) and not ITEM.match(first):
                if not (result and _last(result).endswith("::")):
                    result += [" " * base + "::", ""]
                literal = indent
            first = line
        result.append(line if literal >= 0 or ">>>" in line else _bars(line))
    return result


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _last(lines: list[str]) -> str:
    return next((line for line in reversed(lines) if line.strip()), "")


def _bars(line: str) -> str:
    """A line whose bars outside of ``code`` are bars, and no substitutions."""
    parts = re.split(r"(``.*?``)", line)
    return "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)


def _tidy(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    lines[:] = tidied(lines)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("wiring", Drawn)
    app.add_transform(Linked)
    app.connect("autodoc-process-docstring", _tidy, priority=400)  # before napoleon reads them
    return {"parallel_read_safe": True}
