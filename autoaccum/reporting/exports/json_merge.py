"""Set top-level numbers in a JSON text, and leave every other character.

DeepSpeed reads its configuration as Hjson: files with `//`, `#` and `/* */` comments and trailing commas are common.
They are kept; Hjson's strings without quotes are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...errors import UsageError

_TOKEN = re.compile(
    r"""(?P<blank>[\s\ufeff]+|//[^\n]*|\#[^\n]*|/\*.*?\*/)
      | (?P<string>"(?:[^"\\\x00-\x1f]|\\.)*")
      | (?P<sign>[{}\[\],:])
      | (?P<plain>[^\s{}\[\],:"\#/]+)""",
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class _Token:
    """A token of the text: its kind, and where it stands."""

    kind: str
    text: str
    start: int
    end: int


def merge(text: str, values: Mapping[str, int], *, source: str) -> str:
    """Return the text with these top-level numbers set.

    A key that is there keeps its place; others are added at the end.

    Args:
        text: An object in JSON; comments and trailing commas are allowed.
        values: The numbers by key.
        source: The text's name in error messages.

    Raises:
        UsageError: It is no such object, or has a key twice.
    """
    tokens = list(_tokens(text, source))
    before = _value(tokens, source)
    places = _top_level(tokens)
    merged = text
    for key in sorted((key for key in values if key in places), key=lambda key: -places[key][0]):
        start, end = places[key]
        merged = merged[:start] + str(values[key]) + merged[end:]
    merged = _with_added(merged, {key: value for key, value in values.items() if key not in places}, source)
    after = _value(list(_tokens(merged, source)), source)
    assert after == {**before, **values}  # nothing else changed
    return merged


def _tokens(text: str, source: str) -> Iterator[_Token]:
    """Yield the tokens, without blanks and comments."""
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            line = text.count("\n", 0, place) + 1
            raise _no_json(source, f"line {line} has {text[place : place + 20]!r}")
        place = found.end()
        if found.lastgroup != "blank":
            yield _Token(str(found.lastgroup), found[0], found.start(), found.end())


def _value(tokens: list[_Token], source: str) -> dict[str, Any]:
    """Read the tokens as JSON.

    Raises:
        UsageError: They are no object, or have a key twice.
    """
    kept = [
        token.text
        for token, following in pairwise([*tokens, None])
        if token is not None and not (token.text == "," and following is not None and following.text in ("}", "]"))
    ]

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise _no_json(source, f"the key {twice!r} occurs twice")
        return dict(pairs)

    try:
        found = json.loads(" ".join(kept), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _no_json(source, str(error)) from None
    if not isinstance(found, dict):
        raise _no_json(source, f"it is a {type(found).__name__}, not an object")
    return found


def _top_level(tokens: list[_Token]) -> dict[str, tuple[int, int]]:
    """Return where the value of each top-level key begins and ends."""
    places: dict[str, tuple[int, int]] = {}
    depth, key = 0, None
    for index, token in enumerate(tokens):
        if token.text in ("}", "]") and token.kind == "sign":
            depth -= 1
            if depth == 1 and key is not None:
                places[key] = places[key][0], token.end
        if depth == 1 and token.kind != "sign":
            if tokens[index + 1].text == ":" and tokens[index + 1].kind == "sign":
                key = str(json.loads(token.text))
            elif key is not None:
                places[key] = token.start, token.end
        if token.text in ("{", "[") and token.kind == "sign":
            if depth == 1 and key is not None:
                places[key] = token.start, token.end
            depth += 1
    return places


def _with_added(text: str, values: Mapping[str, int], source: str) -> str:
    """Add keys after the last one, indented as the first."""
    if not values:
        return text
    tokens = list(_tokens(text, source))
    last, comma = tokens[-2], tokens[-2].text == ","
    indented = re.search(r"\{[ \t]*\r?\n([ \t]*)\S", text)
    between = f"\n{indented[1]}" if indented else " "
    added = ("," + between).join(f"{json.dumps(key)}: {value}" for key, value in values.items())
    lead = "" if comma or last.text == "{" else ","
    return text[: last.end] + lead + between + added + text[last.end :]


def _no_json(source: str, why: str) -> UsageError:
    return UsageError(
        f"{source} is not a JSON object that can be edited: {why}.",
        "Its other keys and comments are to be kept, so it has to be read exactly.",
        "Mend it, or leave out --merge and copy the three numbers.",
    )
