"""What people see: lines, errors and marks; colour only where a terminal asks for it, nothing of progress if quiet."""

from __future__ import annotations

import os
import sys
from typing import Literal, TextIO

from foundation.errors import OrthantError

Colour = Literal["red", "green", "yellow", "cyan", "bold"]
_CODES: dict[Colour, str] = {"red": "1;31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1"}


QUIET = "ORTHANT_QUIET"
"""Variable that --quiet sets: ranks are processes of their own, and have it from the one that starts them."""


def is_quiet() -> bool:
    """Whether results, warnings and errors alone are asked for."""
    return os.environ.get(QUIET, "0") not in ("", "0")


def say(text: str) -> None:
    """A line about work under way, on stderr, which is for people; none under --quiet."""
    if not is_quiet():
        tell(text)


def tell(text: str) -> None:
    """A line that is said under --quiet too, a result or a warning, on stderr: stdout is for what programs read."""
    print(text, file=sys.stderr, flush=True)


def wants_bar(stream: TextIO) -> bool:
    """A terminal that can take a line back, and no --quiet."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not is_quiet()


def wants_colour(stream: TextIO) -> bool:
    """A terminal that is not dumb, and no NO_COLOR (no-color.org); FORCE_COLOR (force-color.org) wants it in pipes."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


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
