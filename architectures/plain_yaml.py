"""YAML as plain data: mappings, lists and scalars, and nothing that could run code or surprise.

Only the parser of PyYAML is used; values are built here, so no tag can construct an object. Scalars are read by
`mixers.schema.parse_scalar`, as in registry strings: `3:1` is text, `no` is text, `1e-3` is a number. Duplicate keys
and tags are refused, and aliases that would expand past `MAX_VALUES` values are refused before they are expanded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hybridzoo.mixers.schema import SpecError, parse_scalar

MAX_VALUES = 10_000
MAX_DEPTH = 32
MAX_BYTES = 1_000_000

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


def read_file(path: Path, where: str) -> dict[str, Any]:
    """Read a YAML file that holds one mapping. `where` names it in errors.

    Raises `SpecError` for a file that cannot be read, is not UTF-8, is over 1 MB, or is refused by `read_yaml`.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError(f"{where}: larger than {MAX_BYTES:,} bytes, which no spec or study needs")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{where}: not UTF-8 text") from None
    except OSError as error:
        raise SpecError(f"{where}: {(error.strerror or str(error)).lower()}") from None
    data = read_yaml(text, where)
    if not isinstance(data, dict):
        found = "nothing" if data is None else "a list" if isinstance(data, list) else f"'{data}'"
        raise SpecError(f"{where}: expected a mapping of keys to values, got {found}")
    return data


def read_yaml(text: str, where: str) -> Any:
    """Read one YAML document into dicts with text keys, lists and scalars.

    Anchors, aliases and merge keys (`<<`) work. Raises `SpecError` for bad syntax (with line and column), a duplicate
    key (with both lines), a tag, an alias inside itself, and data of more than 10,000 values or 32 levels.
    """
    try:
        # BaseLoader resolves no scalar and knows no tag: a node whose tag is not one of the three plain ones was given
        # a tag by hand.
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        raise SpecError(f"{where}: {_syntax(error)}") from None
    except yaml.YAMLError as error:
        raise SpecError(f"{where}: not YAML: {error}") from None
    except RecursionError:
        raise SpecError(f"{where}: nested too deep; at most {MAX_DEPTH} levels") from None
    return None if root is None else _Reader(where).value(root)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    fault = error.problem or error.context or "cannot be read"
    if error.problem and error.context and error.context.startswith("expected"):
        fault = f"{error.context}, {error.problem}"
    elif error.context_mark and mark and error.context_mark.line < mark.line:
        fault += f", {error.context} from line {error.context_mark.line + 1} on"
    return place + fault + next((f"; {hint}" for part, hint in _HINTS.items() if part in fault), "")


_HINTS = {
    "expected ',' or '}'": "inside {} a value that contains '[', ',' or ': ' needs quotes",
    "expected ',' or ']'": "inside [] a value that contains '[', ',' or ': ' needs quotes",
    "undefined alias": "a value that starts with '*' needs quotes",
    r"'\t'": "indent with spaces",
    "another document": "a file holds one, without '---' in the middle",
}


class _Reader:
    """Turns composed nodes into values; aliases are shared nodes, so the same node may be read many times."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.open: list[yaml.Node] = []
        self.count = 0

    def value(self, node: yaml.Node) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise self._error(node, f"more than {MAX_VALUES:,} values once its aliases are expanded")
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(node, f"the tag '{tag}' is not allowed: a file is plain data")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if any(node is outer for outer in self.open):
            raise self._error(node, "an alias stands inside the value it names")
        if len(self.open) == MAX_DEPTH:
            raise self._error(node, f"nested too deep; at most {MAX_DEPTH} levels")
        self.open.append(node)
        value = self._mapping(node) if isinstance(node, yaml.MappingNode) else [self.value(n) for n in node.value]
        self.open.pop()
        return value

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.style is not None:  # quoted or a block of text
            return node.value
        return parse_scalar(node.value) if node.value else None

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be text")
            key = key_node.value
            if key in lines:
                raise self._error(key_node, f"the key '{key}' is already given on line {lines[key]}")
            lines[key] = key_node.start_mark.line + 1
            value = self.value(value_node)
            if key == "<<" and key_node.style is None:
                merged = self._merged(value, value_node)
            else:
                own[key] = value
        return {**merged, **own}

    def _merged(self, value: Any, node: yaml.Node) -> dict[str, Any]:
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            raise self._error(node, "'<<' merges a mapping or a list of mappings")
        # Of several sources the earlier wins.
        return {key: item for source in reversed(sources) for key, item in source.items()}

    def _error(self, node: yaml.Node, message: str) -> SpecError:
        mark = node.start_mark
        return SpecError(f"{self.where}: line {mark.line + 1}, column {mark.column + 1}: {message}")
