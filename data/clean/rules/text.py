"""A text and what several rules ask of it, each worked out once."""

from __future__ import annotations

import re
from functools import cached_property

TERMINAL = (
    ".",
    "!",
    "?",
    '."',
    '!"',
    '?"',
    ".”",
    "!”",
    "?”",
    ".'",
    "!'",
    "?'",
    ".’",
    "!’",
    "?’",
    "…",
    "。",
    "！",
    "？",
)
"""Ends of sentences; a quotation mark may follow."""

_PARAGRAPH = re.compile(r"\n{2,}")


class Text:
    """A text as the rules see it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """Parted by white space."""
        return self.text.split()

    @cached_property
    def letters(self) -> int:
        """Without white space."""
        return sum(map(len, self.words))

    @cached_property
    def lines(self) -> list[str]:
        """Those that are not empty, without white space around them."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Parted by empty lines."""
        return [part for part in map(str.strip, _PARAGRAPH.split(self.text)) if part]
