"""Reads a page as a browser would, and refuses one that is not well-formed."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset(("meta", "br", "hr", "img", "input", "link"))


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""
    """Of the element and all below it."""

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements below this one, in order."""
        found = []
        for child in self.children:
            wanted = all(v in child.attributes.get(k, "").split() for k, v in attributes.items())
            if child.tag == tag and wanted:
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    def everything(self) -> list[Element]:
        return [e for c in self.children for e in (c, *c.everything())]


class Reader(HTMLParser):
    """Builds the tree; an element that is not closed, or not open, fails."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def read_page(text: str) -> Element:
    """The tree of a page; AssertionError where it is not well-formed."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"not closed: {[e.tag for e in reader.open[1:]]}"
    return reader.root


def table(element: Element) -> dict[str, list[str]]:
    """Rows of a table by their heading, cells with spaces made single."""
    rows = {}
    for row in element.all("tbody")[0].all("tr"):
        head = " ".join(row.all("th")[0].text.split())
        rows[head] = [" ".join(cell.text.split()) for cell in row.all("td")]
    return rows
