"""A page taken apart: its tags, its words, its sections."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, their attributes, the text of a page, and that of its scripts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.words, self.scripts, self.open = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.words).append(data)

    def all(self, tag: str) -> list[dict]:
        """The attributes of every tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


def words(source: str) -> str:
    """The text of a page or of a part of it, without what marks its wirings and measures."""
    return "".join(Page(source).words)


def section(source: str, name: str) -> str:
    """The source of one section of a page, without its pictures."""
    return re.sub(r"base64,[^\"]*", "", source[source.index(f'id="{name}"') :].split("</section>", 1)[0])
