"""Read YAML strictly: bounded, without anchors, tags or duplicate keys.

YAML is read from its event stream, never built into Python objects, so every value
keeps its line and its path, and a refusal can name both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeAlias

import yaml
from yaml.resolver import Resolver

from ztserve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

MAX_BYTES = 256 * 1024
MAX_DOCUMENTS = 256
MAX_NODES = 20_000
MAX_DEPTH = 24

_TAG = "tag:yaml.org,2002:"
_KINDS = {"str": "a string", "null": "empty", "map": "a mapping", "seq": "a list"}

Content: TypeAlias = "str | tuple[Node, ...] | dict[str, Node]"


@dataclass(frozen=True, slots=True)
class Node:
    """One YAML value with the place where it stands."""

    kind: str
    """``str``, ``null``, ``int``, ``bool``, ..., ``map`` or ``seq``."""
    content: Content
    line: int
    source: str
    path: str

    def error(self, message: str) -> ConfigError:
        """Return the error to raise about this value: file, line, field, message."""
        field = f"{self.path}: " if self.path else ""
        return ConfigError(f"{self.source}, line {self.line}: {field}{message}")

    def _is(self, kind: str) -> str:
        return f"expected {kind}, found {_KINDS.get(self.kind, f'a YAML {self.kind}')}"

    def fields(self, allowed: Collection[str], *, hint: str = "") -> dict[str, Node]:
        """Return the fields of a mapping, each one of `allowed`."""
        found = self.mapping()
        for name, node in found.items():
            if name not in allowed:
                close = get_close_matches(name, allowed, 1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise node.error(
                    f"unknown field{meant}; allowed here: {', '.join(allowed)}{hint}"
                )
        return found

    def mapping(self) -> dict[str, Node]:
        """Return the entries of a mapping with free keys."""
        if not isinstance(self.content, dict):
            raise self.error(self._is("a mapping"))
        return self.content

    def sequence(self, *, empty: bool = False) -> tuple[Node, ...]:
        """Return the items of a list, which must not be empty unless `empty`."""
        if not isinstance(self.content, tuple):
            raise self.error(self._is("a list"))
        if not self.content and not empty:
            raise self.error("an empty list means nothing; fill it or leave it out")
        return self.content

    def text(self) -> str:
        """Return a string, which must not be empty."""
        if self.kind != "str" or not isinstance(self.content, str):
            raise self.error(self._is("a string") + "; write it in quotes")
        if not self.content:
            raise self.error("an empty string is not allowed")
        return self.content

    def one_of(self, choices: Collection[str]) -> str:
        """Return a string that is one of `choices`."""
        if (text := self.text()) not in choices:
            raise self.error(f"{text!r} is none of {', '.join(choices)}")
        return text


def read(text: str, source: str) -> Iterator[Node]:
    """Yield the documents of `text`, leaving out empty ones; ConfigError otherwise."""
    if len(text) > MAX_BYTES or len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES} bytes")
    try:
        yield from _Reader(text, source).documents()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{source}{line}: not YAML: {problem}") from None


class _Reader:
    def __init__(self, text: str, source: str) -> None:
        self._events: Iterator[yaml.Event] = iter(yaml.parse(text, yaml.SafeLoader))
        self._resolver = Resolver()
        self._source = source
        self._nodes = 0

    def documents(self) -> Iterator[Node]:
        count = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                count += 1
                if count > MAX_DOCUMENTS:
                    raise ConfigError(
                        f"{self._source}: more than {MAX_DOCUMENTS} documents"
                    )
                node = self._node(next(self._events), "", 0)
                if node.kind != "null":
                    yield node

    def _node(self, event: yaml.Event, path: str, depth: int) -> Node:
        line = event.start_mark.line + 1 if event.start_mark else 0
        here = Node("null", "", line, self._source, path)
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise here.error(
                f"more than {MAX_NODES} values or {MAX_DEPTH} levels in one file"
            )
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise here.error("anchors and aliases are not allowed; write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise here.error(f"the tag {tag} is not allowed")
        if isinstance(event, yaml.MappingStartEvent):
            return replace(here, kind="map", content=self._entries(path, depth))
        if isinstance(event, yaml.SequenceStartEvent):
            return replace(here, kind="seq", content=self._items(path, depth))
        return self._scalar(here, event)

    def _scalar(self, here: Node, event: yaml.Event) -> Node:
        if not isinstance(event, yaml.ScalarEvent):
            raise here.error("expected a value")
        tag = str(
            self._resolver.resolve(  # type: ignore[no-untyped-call]
                yaml.ScalarNode, event.value, event.implicit
            )
        )
        return replace(here, kind=tag.removeprefix(_TAG), content=event.value)

    def _entries(self, path: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, path, depth + 1)
            # A port number is a key that YAML reads as an integer.
            if key.kind not in {"str", "int"} or not isinstance(key.content, str):
                raise key.error("a key must be a plain string; write it in quotes")
            name = key.content
            if name in entries:
                raise key.error(f"the field {name!r} stands here twice")
            inner = f"{path}.{name}" if path else name
            entries[name] = self._node(next(self._events), inner, depth + 1)
        return entries

    def _items(self, path: str, depth: int) -> tuple[Node, ...]:
        items: list[Node] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, f"{path}[{len(items)}]", depth + 1))
        return tuple(items)
