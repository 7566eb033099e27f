"""The layer-pattern language: `"(c*3 a)*2"` is eight layers, each named by the mixers that run in it.

Grammar (white space separates, and is free around `*`, `+` and parentheses):

    pattern = item { item }                      one after the other
    item    = layer [ "*" count ]                the layer, count times
            | "(" pattern ")" [ "*" count ]      the whole group, count times
    layer   = name { "+" name }                  mixers that run in parallel inside one block
    name    = word [ "[" flags "]" ]             `c`, `attention`, `carve[erase=token,write=one]`
    count   = a whole number, at least 1

Pure text in, tuples out: nothing here knows what the names mean; spec.py looks them up. Imports the errors of
mixers/schema.py and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

from hybridzoo.mixers.schema import OWN_MIXERS, SpecError, nearest

MAX_LAYERS = 4096
MAX_PARALLEL = 64  # mixers in one layer

_TOKEN = re.compile(r"(?P<space>\s+)|(?P<name>[A-Za-z_][A-Za-z0-9_.-]*)|(?P<count>\d+)|(?P<mark>[()*+\[])")
_WIDTH = 72  # columns of the pattern that an error shows
_LAYER_FORMS = "a mixer name or '('"


class _Token(NamedTuple):
    kind: str  # name, count, one of ( ) * +, or end
    text: str
    start: int
    stop: int


@dataclass
class _Group:
    """An open parenthesis (or the whole pattern): its layers so far, and where its last item begins among them."""

    opened: int
    layers: list[tuple[str, ...]] = field(default_factory=list)
    last: int = 0
    repeated: bool = True  # nothing stands before a '*' yet


def is_name(text: str) -> bool:
    """Whether a pattern can hold `text` as one name, with or without flags."""
    word, bracket, flags = text.partition("[")
    match = _TOKEN.fullmatch(word)
    closed = not bracket or flags.find("]") == len(flags) - 1 >= 0
    return closed and match is not None and match.lastgroup == "name"


def parse_pattern(
    text: str, names: Collection[str] | None = None, where: str = "layers"
) -> tuple[tuple[str, ...], ...]:
    """Expand a pattern into its layers, first to last, each a tuple of the names that run in it in parallel.

    A name keeps its flags (`carve[erase=token]`), without white space. With `names` given, a name whose word is not
    among them is refused with the nearest one.

    Raises: `SpecError` that shows the place in the pattern and says what was expected there; also for a pattern of more
    than 4,096 layers, which is refused before it is expanded, or of more than 64 mixers in one layer.
    """
    return _Parser(text, names, where).parse()


class _Parser:
    def __init__(self, text: str, names: Collection[str] | None, where: str) -> None:
        self.text, self.names, self.where = text, names, where
        self.tokens = self._tokens()
        self.at = 0

    def parse(self) -> tuple[tuple[str, ...], ...]:
        # Open groups are a list, not recursion: no depth of parentheses can exhaust Python's stack.
        groups = [_Group(opened=0)]
        while (token := self._next()).kind != "end":
            if token.kind == "name":
                self._add(groups[-1], [self._layer(token)], token)
            elif token.kind == "(":
                groups.append(_Group(opened=token.start))
            elif token.kind == ")":
                self._close(groups, token)
            elif token.kind == "*":
                self._repeat(groups[-1], token)
            elif token.kind == "+":
                self._fail(token, f"expected {_LAYER_FORMS}: '+' joins the mixers of one layer, as in 'c+a'")
            else:
                self._fail(token, f"expected {_LAYER_FORMS}: a repeat follows what it repeats, as in 'c*{token.text}'")
        if len(groups) > 1:
            self._fail(_mark(self.text, groups[-1].opened), "this '(' is never closed")
        if not groups[0].layers:
            self._fail(token, f"no layers: expected {_LAYER_FORMS}")
        return tuple(groups[0].layers)

    def _layer(self, token: _Token) -> tuple[str, ...]:
        members = [self._name(token)]
        while self._peek().kind == "+":
            self._next()
            member = self._next()
            if member.kind != "name":
                self._fail(member, "expected a mixer name: '+' joins the mixers of one layer, as in 'c+a'")
            members.append(self._name(member))
            if len(members) > MAX_PARALLEL:
                self._fail(member, f"more than {MAX_PARALLEL} mixers in one layer")
        if len(members) > 1 and self._peek().kind == "*":
            joined = "+".join(members)
            self._fail(self._peek(), f"a repeat of a parallel layer needs parentheses: write '({joined})*n'")
        return tuple(members)

    def _name(self, token: _Token) -> str:
        word, _, flags = token.text.partition("[")
        if self.names is not None and word not in self.names:
            known = ", ".join(self.names) or "none"
            message = f"unknown mixer '{word}'{nearest(word, self.names)}; known: {known}; {OWN_MIXERS}"
            self._fail(token._replace(stop=token.start + len(word)), message)
        return f"{word}[{''.join(flags.split())}" if flags else word

    def _close(self, groups: list[_Group], token: _Token) -> None:
        if len(groups) == 1:
            self._fail(token, "this ')' closes nothing")
        if not groups[-1].layers:
            self._fail(token, f"an empty group: expected {_LAYER_FORMS}")
        inner = groups.pop()
        self._add(groups[-1], inner.layers, token)

    def _repeat(self, group: _Group, star: _Token) -> None:
        if group.repeated:
            fault = "one '*' repeats an item: multiply the counts" if group.layers else f"expected {_LAYER_FORMS}"
            self._fail(star, fault)
        token = self._next()
        if token.kind != "count":
            self._fail(token, "expected a count after '*', as in 'c*3'")
        # Leading zeros aside, more than nine digits are too many for int() to be worth calling.
        digits = token.text.lstrip("0")
        if not digits:
            self._fail(token, "a repeat is at least 1")
        count = int(digits) if len(digits) <= 9 else MAX_LAYERS + 1
        item = group.layers[group.last :]
        self._check_size(group.last + len(item) * count, token)
        group.layers[group.last :] = item * count
        group.repeated = True

    def _add(self, group: _Group, layers: list[tuple[str, ...]], token: _Token) -> None:
        self._check_size(len(group.layers) + len(layers), token)
        group.last = len(group.layers)
        group.layers += layers
        group.repeated = False
        # Counts are at least 1, so no group may ever hold more than the whole may: checking each is enough.

    def _check_size(self, size: int, token: _Token) -> None:
        if size > MAX_LAYERS:
            self._fail(token, f"the pattern expands past {MAX_LAYERS:,} layers here")

    def _next(self) -> _Token:
        token = self.tokens[self.at]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def _peek(self) -> _Token:
        return self.tokens[self.at]

    def _tokens(self) -> list[_Token]:
        tokens: list[_Token] = []
        start = 0
        while start < len(self.text):
            match = _TOKEN.match(self.text, start)
            if match is None:
                self._unreadable(start)
            kind, text = str(match.lastgroup), match.group()
            if text == "[":
                self._fail(_mark(self.text, start), "flags follow a mixer's name directly: 'carve[write=one]'")
            stop = match.end()
            if kind == "name" and self.text[stop : stop + 1] == "[":
                stop = self._closing_bracket(stop)
            if kind != "space":
                repeat = [token.kind for token in tokens[-2:]] == ["*", "count"]
                if repeat and tokens[-1].stop == start and kind == "name":
                    self._fail(_Token("name", text, start, stop), "expected white space after a count")
                tokens.append(_Token(text if kind == "mark" else kind, self.text[start:stop], start, stop))
            start = stop
        return [*tokens, _Token("end", "", len(self.text), len(self.text) + 1)]

    def _closing_bracket(self, opened: int) -> int:
        closed = self.text.find("]", opened)
        if closed < 0:
            self._fail(_mark(self.text, opened), "this '[' is never closed")
        return closed + 1

    def _unreadable(self, start: int) -> NoReturn:
        char = self.text[start]
        hints = {
            ":": "a ratio of 3 to 1 is written '(c*3 a)'",
            ",": "layers are separated by white space",
            "]": "this ']' closes nothing",
            "-": "a name starts with a letter",
        }
        hint = hints.get(char, "a pattern holds names, '*n', '+', '(' and ')'")
        self._fail(_mark(self.text, start), f"unexpected '{char}': {hint}")

    def _fail(self, token: _Token, message: str) -> NoReturn:
        raise SpecError(f"{self.where}: column {token.start + 1}: {message}\n{_excerpt(self.text, token)}")


def _mark(text: str, start: int) -> _Token:
    return _Token(text[start], text[start], start, start + 1)


def _excerpt(text: str, token: _Token) -> str:
    """Show the line of the pattern around the token, and carets under it."""
    line = "".join(" " if char.isspace() else char for char in text)
    first = max(0, min(token.start - _WIDTH // 2, len(line) - _WIDTH))
    shown = line[first : first + _WIDTH]
    left, right = "..." if first else "", "..." if first + _WIDTH < len(line) else ""
    carets = "^" * max(1, min(token.stop, first + _WIDTH) - token.start)
    return f"    {left}{shown}{right}\n    {' ' * (len(left) + token.start - first)}{carets}"
