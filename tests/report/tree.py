"""A strict reader of HTML: every element must be closed by its own tag, no attribute may stand twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


@dataclass(eq=False)
class Node:
    """An element: tag, attributes, children in order."""

    tag: str
    attributes: dict[str, str]
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """Itself and everything below, in order of appearance."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str | None = None, class_: str | None = None) -> list[Node]:
        """Elements below with this tag and class."""
        found = [node for node in self.walk() if node is not self and (tag is None or node.tag == tag)]
        return [node for node in found if class_ is None or class_ in node.classes]

    def one(self, tag: str | None = None, class_: str | None = None) -> Node:
        (found,) = self.all(tag, class_)
        return found

    def by_id(self, name: str) -> Node:
        (found,) = [node for node in self.walk() if node.attributes.get("id") == name]
        return found

    def panel(self, title: str) -> Node:
        """The panel whose heading reads `title`."""
        (found,) = [panel for panel in self.all(class_="panel") if any(head.text == title for head in panel.all("h3"))]
        return found

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def nodes(self) -> list[Node]:
        """Child elements."""
        return [child for child in self.children if isinstance(child, Node)]

    @property
    def raw(self) -> str:
        """All text below, but what pictures say in tooltips."""
        return "".join(
            child if isinstance(child, str) else child.raw for child in self.children if isinstance(child, str) or child.tag != "title"
        )

    @property
    def text(self) -> str:
        """The same with blanks put together."""
        return re.sub(r"[ \n]+", " ", self.raw).strip(" \n")

    def rows(self) -> list[list[Node]]:
        """Cells of a table's body."""
        return [row.nodes for row in self.one("tbody").nodes]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]
        self.declarations: list[str] = []

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> is no HTML")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data[:60]}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data[:60]}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data[:60]}")


def parse(text: str) -> Node:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.declarations == ["doctype html"]
    assert reader.open == [reader.root], f"never closed: {[node.tag for node in reader.open[1:]]}"
    (root,) = reader.root.nodes
    return root
