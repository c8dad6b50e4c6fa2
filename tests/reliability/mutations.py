"""Damaged contents of files: flipped bits, cuts, and other values in JSON."""

import random
from collections.abc import Iterator
from typing import Any

OTHER_VALUES: list[Any] = [None, 0, -1, 1e308, "x", "", [], {}, True, [[]], {"a": 1}]
# what is no manifest at all
NO_MANIFESTS = {
    "empty": b"",
    "nested": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"1" * 10_000,
    "not UTF-8": b"\xff\xfe{}",
    "NaN": b"NaN",
}


def flip(content: bytes, at: int, dice: random.Random) -> bytes:
    """Return a content with a bit of one byte flipped."""
    changed = bytearray(content)
    changed[at] ^= 1 << dice.randrange(8)
    return bytes(changed)


def flip_several(content: bytes, dice: random.Random, count: int) -> bytes:
    """Return a content with a bit of several bytes flipped."""
    for at in dice.sample(range(len(content)), min(count, len(content))):
        content = flip(content, at, dice)
    return content


def damages(content: bytes, dice: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    """Yield (description, content) of single flips all over a file, of cuts, and of more bytes."""
    for number in range(flips):
        low = number * len(content) // flips
        at = dice.randrange(low, max(low + 1, (number + 1) * len(content) // flips))
        yield f"a bit of byte {at}", flip(content, at, dice)
    for size in {0, len(content) // 2, len(content) - 1}:
        yield f"cut to {size} bytes", content[:size]
    yield "eight bits", flip_several(content, dice, 8)
    yield "a byte more", content + b"\n"


def mutations(content: Any, path: str = "all") -> Iterator[tuple[str, Any]]:
    """Yield (description, content) of a JSON document with one of its values changed."""
    for value in OTHER_VALUES:
        if value != content or type(value) is not type(content):
            yield f"{path} = {value!r}", value
    match content:
        case str():
            yield f"{path} longer", content + "x"
        case int() | float():
            yield f"{path} + 1", content + 1
        case dict():
            yield from _mutations_of_object(content, path)
        case list() if content:
            yield from _mutations_of_list(content, path)


def _mutations_of_object(content: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    yield f"{path} with one more", {**content, "one_more": 1}
    for key in content:
        yield (
            f"{path} without {key}",
            {name: value for name, value in content.items() if name != key},
        )
        for what, value in mutations(content[key], f"{path}.{key}"):
            yield what, {**content, key: value}


def _mutations_of_list(content: list[Any], path: str) -> Iterator[tuple[str, Any]]:
    if content != content[::-1]:
        yield f"{path} reversed", content[::-1]
    yield f"{path} without its last", content[:-1]
    for what, value in mutations(content[0], f"{path}.0"):
        yield what, [value, *content[1:]]
