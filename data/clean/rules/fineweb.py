"""The rules of FineWeb (Penedo et al. 2024, section 3.6), made to remove what others let pass: lists and menus."""

from __future__ import annotations

from data.clean.rules.gopher import Found, repeated_parts
from data.clean.rules.settings import FineWebSettings
from data.clean.rules.text import TERMINAL, Text


def apply(text: Text, settings: FineWebSettings) -> Found:
    """Lines that end no sentence, short lines, repeated lines, line feeds."""
    lines = text.lines
    if not lines:
        return "fineweb.min_punctuated_lines", 0.0
    punctuated = sum(line.endswith(TERMINAL) for line in lines) / len(lines)
    if punctuated < settings.min_punctuated_lines:
        return "fineweb.min_punctuated_lines", punctuated
    short = sum(len(line) <= settings.short_line for line in lines) / len(lines)
    if short > settings.max_short_lines:
        return "fineweb.max_short_lines", short
    repeated = repeated_parts(lines)[1]
    if repeated > settings.max_duplicate_line_letters:
        return "fineweb.max_duplicate_line_letters", repeated
    newlines = text.text.count("\n") / len(text.words)
    if newlines > settings.max_newlines_per_word:
        return "fineweb.max_newlines_per_word", newlines
    return None
