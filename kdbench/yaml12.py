"""YAML as its version 1.2 reads it, safely: `1e-3` is a number, `010` is ten, and `no`, `1:30`, `1_000` and `2026-01-13` are text.

PyYAML implements YAML 1.1, in which `1e-3` is text, `010` is eight, `1:30` is ninety and `no` is false. What `dump` writes, both
versions read alike, so that a config in a record says the same to every reader.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

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


def load(text: str) -> Any:
    """The value that `text` holds. Raises yaml.YAMLError, ValueError or RecursionError where it does not parse."""
    return yaml.load(text, _Loader)


def dump(value: Any) -> str:
    """`value` as YAML, its keys in their order. Text that either version would take for something else is quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML's safe subset. A key that is listed twice is an error: YAML itself would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`, whose keys may well stand again
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} can't be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes what version 1.1 would misread, and quotes what version 1.2 would misread too."""


_Loader.yaml_implicit_resolvers = {}  # not those of version 1.1
for _tag, _pattern, _first in (_INT, _FLOAT, _BOOL, _NULL, _MERGE):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), list(_first))
for _tag, _pattern, _first in (_INT, _FLOAT):
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), list(_first))
_Loader.add_constructor(_INT[0], _Loader.construct_whole_number)
