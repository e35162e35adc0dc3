"""YAML as its version 1.2 reads it, safely: `1e-3` is a number, `010` is ten, and `no`, `1:30`, `1_000` and `2026-01-13` are text.

PyYAML implements YAML 1.1, in which `1e-3` is text, `010` is eight, `1:30` is ninety and `no` is false. What `dump` writes, both
versions read alike, so that a config in a record says the same to every reader.

Whoever wrote the text, reading it takes a bounded time and memory: see `LONGEST`, `DEEPEST`, `MOST_NODES` and `MOST_DIGITS`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from kdbench.errors import cut, shown

# The longest experiment of this repository has 4 kB, 150 nodes and 5 levels.
LONGEST = 1_000_000  # characters
DEEPEST = 50  # levels of lists and mappings; below it, no reader of the value runs out of stack
MOST_NODES = 50_000  # keys, values, lists and mappings, an alias counted as a copy of what it stands for; PyYAML reads so many in 2 s
MOST_DIGITS = 1_000  # of a whole number; Python itself refuses to read or print one of more than 4,300

# The core schema, https://yaml.org/spec/1.2.2/#103-core-schema: a tag, its pattern, and the characters that its scalars begin with.
_INT = ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789")
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
    "-+.0123456789",
)
_BOOL = ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF")
_NULL = ("tag:yaml.org,2002:null", re.compile(r"null|Null|NULL|~|"), ["n", "N", "~", ""])
_MERGE = ("tag:yaml.org,2002:merge", re.compile(r"<<"), "<")  # of version 1.1, but everybody who writes anchors uses it
_TOO_DEEP = f"it is nested more than {DEEPEST} levels deep"
_TOO_MANY = f"it has more than {MOST_NODES:,} keys and values, counting each alias as a copy"
_BEYOND_THE_SCHEMA = ("binary", "timestamp", "omap", "pairs", "set")  # of version 1.1: their values are none that JSON has
_SURROGATE = re.compile("[\ud800-\udfff]")


class InvalidYAML(ValueError):
    """Text that is not YAML, or more of it than anybody would write. The message is one line: `line 2, column 5: not valid YAML: ...`."""


def load(text: str) -> Any:
    """The value that `text` holds.

    Raises:
        InvalidYAML: it does not parse, or is longer or deeper or holds more than the bounds of this module allow.
    """
    return _loaded(text, _Loader)


def load_as_1_1(text: str) -> Any:
    """As `load`, with numbers, dates and truth values as PyYAML reads them: what kdbench read and wrote until November 2026."""
    return _loaded(text, _Loader11)


def _loaded(text: str, loader: type[_Bounded]) -> Any:
    if len(text) > LONGEST:
        raise InvalidYAML(f"the text has {len(text):,} characters, expected at most {LONGEST:,}")
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InvalidYAML(f"{place}not valid YAML: {_one_line(error.problem or error.context)}") from error
    except yaml.YAMLError as error:
        raise InvalidYAML(f"not valid YAML: {_one_line(error)}") from error
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner, which says no place, and of a date such as 2026-13-01
        raise InvalidYAML(r"not valid YAML: the number of an escape such as \UFFFFFFFF or of a directive is out of range") from error


def dump(value: Any) -> str:
    """`value` as YAML, its keys in their order. Text that either version would take for something else is quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def _one_line(problem: object) -> str:
    return cut(" ".join(str(problem).split()), 200)


@dataclass(frozen=True)
class _Extent:
    """Of a node with its aliases expanded. nodes: it and all below it. levels: of lists and mappings, 0 of a scalar."""

    nodes: int
    levels: int


class _Bounded(yaml.SafeLoader):
    """YAML's safe subset, of bounded size.

    A text of a few hundred bytes can stand for billions of nodes, by aliases of lists of aliases. So nodes are counted while they are
    composed, each once, before anything is constructed from them.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open = 0  # lists and mappings around the node that is composed
        self._composed = 0
        self._extents: dict[yaml.Node, _Extent] = {}  # of all that are composed to their end

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        self._composed += 1
        if self._composed > MOST_NODES:
            _refuse(_TOO_MANY, event)
        if self._open > DEEPEST:
            _refuse(_TOO_DEEP, event)
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        assert node is not None, "every event that begins a node ends in one"
        if isinstance(event, yaml.AliasEvent):  # its node was composed elsewhere
            if node not in self._extents:
                _refuse(f"the alias {shown(event.anchor)} is inside of what it stands for", event)
        else:
            self._extents[node] = self._extent(node)
        return node

    def _extent(self, node: yaml.Node) -> _Extent:
        """Raises InvalidYAML beyond the bounds."""
        below = [self._extents[child] for child in _children(node)]
        nodes = 1 + sum(extent.nodes for extent in below)
        levels = max((extent.levels for extent in below), default=0) + (not isinstance(node, yaml.ScalarNode))
        if nodes > MOST_NODES:
            _refuse(_TOO_MANY, node)
        if levels > DEEPEST:
            _refuse(_TOO_DEEP, node)
        return _Extent(nodes, levels)


class _Loader(_Bounded):
    """Of version 1.2. A key that is listed twice is an error: YAML itself would keep the last without a word."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError) as error:  # !!int x, !!bool x
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"{shown(node.value)} is no {kind}", node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            _refuse("a text is no map", node)
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may well stand again
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                _refuse(f"{shown(key)} can't be a key", key_node)
            if key in seen:
                _refuse(f"the key {shown(key)} is listed twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and _SURROGATE.search(text):  # no file, terminal or database takes it
            _refuse(f"{shown(text)} holds half of a character, which can't be written as UTF-8", node)
        return text

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        if len(text) > MOST_DIGITS:
            _refuse(f"a whole number of {len(text):,} digits, expected at most {MOST_DIGITS:,}", node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Loader11(_Bounded):
    """Of version 1.1, in which the time for a number such as 1:30:30 grows with the square of its length."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in (_INT[0], _FLOAT[0]) and len(node.value) > MOST_DIGITS:
            _refuse(f"a number of {len(node.value):,} characters, expected at most {MOST_DIGITS:,}", node)
        return super().construct_object(node, deep)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _refuse(problem: str, at: Any) -> NoReturn:
    """at: the node or event that is meant."""
    raise yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what version 1.1 would misread, and quotes what version 1.2 would misread too."""


_Loader.yaml_implicit_resolvers = {}  # not those of version 1.1
for _tag, _pattern, _first in (_INT, _FLOAT, _BOOL, _NULL, _MERGE):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), list(_first))
for _tag, _pattern, _first in (_INT, _FLOAT):
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), list(_first))
_Loader.add_constructor(_INT[0], _Loader.construct_whole_number)
_Loader.yaml_constructors = {
    tag: construct for tag, construct in _Loader.yaml_constructors.items() if str(tag).rpartition(":")[2] not in _BEYOND_THE_SCHEMA
}
