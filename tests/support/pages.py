"""A page taken apart: its tags, its words, its sections."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag: str) -> list[dict]:
        """The attributes of every tag of that name."""
        return [attributes for name, attributes in self.tags if name == tag]


def section(source: str, name: str) -> str:
    """The source of one section of a page, without its pictures."""
    return re.sub(r"base64,[^\"]*", "", source[source.index(f'id="{name}"') :].split("</section>", 1)[0])
