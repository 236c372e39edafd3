"""Read a report's page as its reader would: elements, tables, and charts by their tick labels."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np


class Page(HTMLParser):
    """What a browser would make of the page: its elements, its text, and its tables by id as rows of cell texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.tables: dict[str | None, list[list[str]]] = {}
        self._table: list[list[str]] = []
        self._hidden = self._cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._hidden = tag == "style" or (self._hidden and tag != "body")
        if tag == "table":
            self._table = self.tables.setdefault(dict(attributes).get("id"), [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("th", "td"):
            self._table[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._hidden = self._hidden and tag != "style"
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self._table[-1][-1] += data
        if not self._hidden:
            self.text += data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def chart(html: str, name: str) -> ElementTree.Element:
    found = re.search(rf'<svg id="{name}".*?</svg>', html, re.DOTALL)
    assert found, f"no {name} in the page"
    return ElementTree.fromstring(found.group())


def dots(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.findall("g[@class='dots']/circle")]


def axis(svg: ElementTree.Element, name: str) -> np.poly1d:
    """Position → value, from the tick labels alone: what a reader with a ruler would do."""
    ticks = [
        (float(t.attrib[name]), float(str(t.text).replace("−", "-"))) for t in svg.findall("text") if is_tick(t, name)
    ]
    assert len(ticks) >= 2, "a scale takes two labelled ticks"
    return np.poly1d(np.polyfit([at for at, _ in ticks], [value for _, value in ticks], 1))


def is_tick(element: ElementTree.Element, name: str) -> bool:
    return element.get("class") == f"{name}-tick"


def loads_nothing(html: str) -> None:
    """Assert that the page loads nothing and runs nothing, and forbids itself to; pictures are in it."""
    html = re.sub(r' src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"', "", html)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html.replace("http://www.w3.org/2000/svg", ""))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags())
    assert not {name for _, attributes in page.elements for name in attributes if name in ("src", "href", "onload")}
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
