"""Another text in a line of JSON whose other bytes stay as they are."""

from __future__ import annotations

import re

import orjson

_STRING = rb'"(?>[^"\\]+|\\.)*+"'
# One member of an object: its key, then what its value begins with. RFC 8259 has four white space characters.
_KEY = re.compile(rb"[ \t\r\n]*(?:[{,][ \t\r\n]*)?(" + _STRING + rb")[ \t\r\n]*:[ \t\r\n]*", re.DOTALL)
_WHOLE_STRING = re.compile(_STRING, re.DOTALL)
_BRACKET = re.compile(rb'[^"{}\[\]]*+(?:' + _STRING + rb'[^"{}\[\]]*+)*+([{}\[\]])', re.DOTALL)
_SCALAR = re.compile(rb"[^,}\s]+")


def with_text(line: bytes, text: str, text_key: str) -> bytes:
    """The line with another string under one key of its object; where the key comes twice, under both.

    Args:
        line: an object that orjson reads, with a string under `text_key`.
        text: the new string.
        text_key: key of the outer object.
    """
    new = orjson.dumps(text)
    parts: list[bytes] = []
    copied = at = 0
    while member := _KEY.match(line, at):
        begin = member.end()
        at = _end_of_value(line, begin)
        if orjson.loads(member[1]) == text_key:
            parts += line[copied:begin], new
            copied = at
    return b"".join([*parts, line[copied:]])


def _end_of_value(line: bytes, begin: int) -> int:
    """Where the value that begins there ends."""
    first = line[begin : begin + 1]
    if first not in (b"{", b"["):
        value = (_WHOLE_STRING if first == b'"' else _SCALAR).match(line, begin)
        assert value is not None  # orjson has read the line
        return value.end()
    depth, at = 0, begin
    while True:
        bracket = _BRACKET.match(line, at)
        assert bracket is not None
        at = bracket.end()
        depth += 1 if bracket[1] in (b"{", b"[") else -1
        if not depth:
            return at
