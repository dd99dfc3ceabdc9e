"""Blocks of code in the README and the pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
GENERATED = {"config.md", "errors.md", "planner_error.md", "wrong_inputs.md"}
"""Written by programs that ran what stands there; tests of their own hold them to it."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page."""

    page: str
    line: int
    """Of its first line, counted from 1."""
    language: str
    """What stands behind the fence; empty for an indented block."""
    text: str

    @property
    def place(self) -> str:
        """For messages and names of tests."""
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    """All blocks of a page, from top to bottom."""
    for token in MarkdownIt().parse(path.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(path.name, token.map[0] + 1, token.info.strip(), token.content)


def all_blocks() -> list[Block]:
    """Those of every page that people write."""
    return [block for path in PAGES if path.name not in GENERATED for block in blocks_of(path)]


def commands_of(text: str) -> list[list[str]]:
    """The words of each command of a shell block, comments taken out, lines that go on joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def commands_meant(usage: str) -> list[list[str]]:
    """Commands that a line of usage allows: all options given, one command for each alternative.

    `A [--kind x|y] --prompt TEXT | --interactive` means `A --kind x --prompt TEXT` and `A --interactive`.
    """
    text = usage.partition("#")[0].replace("[section.key=value ...]", "training.seed=7").replace("...", "")
    text = re.sub(r"\[([^\]|]*)(\|[^\]]*)?\]", r"\1", text)
    first, *others = (part.split() for part in text.split(" | "))
    stem = first[: next(at for at, word in enumerate(first) if word.startswith("--"))] if others else []
    return [first, *([*stem, *other] for other in others)]
