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


@dataclass(frozen=True, slots=True)
class Written:
    """A value that is opcodes already: they do not depend on where they stand, as nothing is memoised."""

    opcodes: bytes


@dataclass(frozen=True)
class Persistent:
    """What the reader looks up by itself: a tensor's storage."""

    identifier: Any


def pickled(value: Any) -> bytes:
    """The pickle of `value`: None, bool, int, float, str, tuple, list, dict and what is declared above."""
    return b"\x80\x02" + written(value).opcodes + b"."


def written(value: Any) -> Written:
    """`value` as opcodes: a tenth of the memory of what it is made of."""
    opcodes = bytearray()
    _write(value, opcodes)
    return Written(bytes(opcodes))


def _write(value: Any, opcodes: bytearray) -> None:
    match value:
        case None:
            opcodes.extend(b"N")
        case bool():
            opcodes.extend(b"\x88" if value else b"\x89")
        case int():
            opcodes.extend(_whole_number(value))
        case float():
            opcodes.extend(b"G" + struct.pack(">d", value))
        case str():
            text = value.encode()
            opcodes.extend(b"X" + struct.pack("<I", len(text)) + text)
        case tuple():
            _write_all(b"(", value, b"t", opcodes)
        case list():
            _write_all(b"](", value, b"e", opcodes)
        case dict():
            _write_all(b"}(", [part for pair in value.items() for part in pair], b"u", opcodes)
        case Named():
            opcodes.extend(f"c{value.module}\n{value.name}\n".encode())
        case Persistent():
            _write(value.identifier, opcodes)
            opcodes.extend(b"Q")
        case Call():
            _write(value.target, opcodes)
            _write(value.args, opcodes)
            opcodes.extend(b"R")
        case Made():
            _write(value.target, opcodes)
            opcodes.extend(b")\x81")
            _write(value.state, opcodes)
            opcodes.extend(b"b")
        case Written():
            opcodes.extend(value.opcodes)
        case Pairs():
            _write_all(b"}(", [part for pair in value.pairs for part in pair], b"u", opcodes)
        case _:
            raise AssertionError(f"no opcode for a {type(value).__name__}")


def _write_all(before: bytes, values: Any, after: bytes, opcodes: bytearray) -> None:
    opcodes.extend(before)
    for value in values:
        _write(value, opcodes)
    opcodes.extend(after)


def _whole_number(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
