"""What people see: errors and marks, in colour only where a terminal asks for it."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

from foundation.errors import OrthantError

Colour = Literal["red", "green", "yellow", "cyan", "bold"]
_CODES: dict[Colour, str] = {"red": "1;31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1"}


def wants_colour(stream: TextIO) -> bool:
    """A terminal, and no NO_COLOR (no-color.org) or dumb terminal in the environment."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: Colour, stream: TextIO) -> str:
    """`text` in `colour` where `stream` wants colour, else `text` as it is."""
    return f"\033[{_CODES[colour]}m{text}\033[0m" if wants_colour(stream) else text


def print_error(error: OrthantError) -> None:
    """Print the message of `error` to stderr: what in red, labels (where, rule, cure) in cyan."""
    for line in str(error).splitlines():
        label, colon, rest = line.partition(": ")
        if line.startswith("  ") and colon:
            print(coloured(f"{label}:", "cyan", sys.stderr), rest, file=sys.stderr)
        else:
            print(line if line.startswith(" ") else coloured(line, "red", sys.stderr), file=sys.stderr)
