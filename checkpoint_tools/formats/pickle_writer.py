"""Write the pickles that torch reads, without importing what they name.

torch takes seconds and a quarter of a gigabyte to import; the pickles of a checkpoint are plain data and names.
Protocol 2, the opcodes of Python's `pickletools`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Named:
    """A class or function by its name."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What `target(*args)` gives."""

    target: Named
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Made:
    """An object of class `target`, not initialised; then `state` is put into it."""

    target: Named
    state: Any


@dataclass(frozen=True)
class Pairs:
    """A dictionary, as pairs: its keys need not be hashable here."""

    pairs: list[tuple[Any, Any]]


@dataclass(frozen=True)
class Persistent:
    """What the reader looks up by itself: a tensor's storage."""

    identifier: Any


def pickled(value: Any) -> bytes:
    """The pickle of `value`: None, bool, int, float, str, tuple, list, dict and what is declared above."""
    parts: list[bytes] = [b"\x80\x02"]
    _write(value, parts)
    parts.append(b".")
    return b"".join(parts)


def _write(value: Any, parts: list[bytes]) -> None:
    match value:
        case None:
            parts.append(b"N")
        case bool():
            parts.append(b"\x88" if value else b"\x89")
        case int():
            parts.append(_whole_number(value))
        case float():
            parts.append(b"G" + struct.pack(">d", value))
        case str():
            text = value.encode()
            parts.append(b"X" + struct.pack("<I", len(text)) + text)
        case tuple():
            _write_all(b"(", value, b"t", parts)
        case list():
            _write_all(b"](", value, b"e", parts)
        case dict():
            _write_all(b"}(", [part for pair in value.items() for part in pair], b"u", parts)
        case Named():
            parts.append(f"c{value.module}\n{value.name}\n".encode())
        case Persistent():
            _write(value.identifier, parts)
            parts.append(b"Q")
        case Call():
            _write(value.target, parts)
            _write(value.args, parts)
            parts.append(b"R")
        case Made():
            _write(value.target, parts)
            parts.append(b")\x81")
            _write(value.state, parts)
            parts.append(b"b")
        case Pairs():
            _write_all(b"}(", [part for pair in value.pairs for part in pair], b"u", parts)
        case _:
            raise AssertionError(f"no opcode for a {type(value).__name__}")


def _write_all(before: bytes, values: Any, after: bytes, parts: list[bytes]) -> None:
    parts.append(before)
    for value in values:
        _write(value, parts)
    parts.append(after)


def _whole_number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
