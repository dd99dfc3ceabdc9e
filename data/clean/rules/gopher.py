"""The rules of Gopher (Rae et al. 2021, appendix A.1.1): quality, and repetition within a document (table A1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from data.clean.rules.settings import GopherSettings
from data.clean.rules.text import Text

STOP_WORDS = frozenset("the be to of and that have with".split())
BULLETS = ("•", "‣", "◦", "●", "▪", "■", "·", "-", "*")
ELLIPSES = ("...", "…")
LONGEST_NGRAM = 10
LONGEST_TOP_NGRAM = 4

_LETTER = re.compile(r"[^\W\d_]")

Found = tuple[str, float] | None
"""The rule that removes a text, and what it saw."""


def repetition(text: Text, settings: GopherSettings) -> Found:
    """Lines, paragraphs and n-grams that come again. A repeat is an occurrence after the first."""
    for name, parts in (("line", text.lines), ("paragraph", text.paragraphs)):
        share, letters = repeated_parts(parts)
        if share > getattr(settings, f"max_duplicate_{name}s"):
            return f"gopher.max_duplicate_{name}s", share
        if letters > getattr(settings, f"max_duplicate_{name}_letters"):
            return f"gopher.max_duplicate_{name}_letters", letters
    for size, top, repeated in ngram_shares(text.words):
        name = f"max_top_{size}gram" if size <= LONGEST_TOP_NGRAM else f"max_duplicate_{size}grams"
        share = top if size <= LONGEST_TOP_NGRAM else repeated
        if share > getattr(settings, name):
            return f"gopher.{name}", share
    return None


def repeated_parts(parts: Sequence[str]) -> tuple[float, float]:
    """Share of the parts that repeat an earlier one, by their number and by their letters."""
    if len(set(parts)) == len(parts):
        return 0.0, 0.0
    seen: set[str] = set()
    count = letters = 0
    for part in parts:
        if part in seen:
            count += 1
            letters += len(part)
        seen.add(part)
    return count / len(parts), letters / sum(map(len, parts))


def ngram_shares(words: Sequence[str]) -> Iterator[tuple[int, float, float]]:
    """For word n-grams of 2 and more, as long as one occurs twice: shares of the text's letters.

    Yields:
        n; letters of the most frequent n-gram times its count (the largest product among equally frequent ones);
        letters of words that lie in a repeat of an n-gram, each counted once.
    """
    numbers: dict[str, int] = {}
    ids = np.fromiter(map(numbers.setdefault, words, range(len(words))), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    keys = ids
    for size in range(2, min(LONGEST_NGRAM, len(words)) + 1):
        # Exact, without hashing: an n-gram is the number of its first n - 1 words and the last word.
        pairs = keys[:-1] * len(words) + ids[size - 1 :]
        _, first, keys, counts = np.unique(pairs, return_index=True, return_inverse=True, return_counts=True)
        most = counts.max()
        if most == 1:
            return
        gram_letters = ends[size:] - ends[:-size]
        top = int(gram_letters[first[counts == most]].max() * most)
        covered = _covered(first[keys] != np.arange(len(keys)), lengths, size)
        yield size, top / int(ends[-1]), covered / int(ends[-1])


def _covered(repeats: NDArray[np.bool_], lengths: NDArray[np.int64], size: int) -> int:
    starts = np.flatnonzero(repeats)
    steps = np.zeros(len(lengths) + 1, np.int64)
    steps[starts] += 1
    steps[starts + size] -= 1
    return int(lengths[np.cumsum(steps[:-1]) > 0].sum())


def quality(text: Text, settings: GopherSettings) -> Found:
    """Words, symbols, bullets, ellipses, stop words."""
    words, lines = text.words, text.lines
    count = len(words)
    if count < settings.min_words:
        return "gopher.min_words", count
    if count > settings.max_words:
        return "gopher.max_words", count
    mean = text.letters / count
    if mean < settings.min_mean_word_length:
        return "gopher.min_mean_word_length", mean
    if mean > settings.max_mean_word_length:
        return "gopher.max_mean_word_length", mean
    for symbols in (text.text.count("#"), sum(map(text.text.count, ELLIPSES))):
        if symbols / count > settings.max_symbol_word_ratio:
            return "gopher.max_symbol_word_ratio", symbols / count
    bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
    if bullets > settings.max_bullet_lines:
        return "gopher.max_bullet_lines", bullets
    ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    if ellipses > settings.max_ellipsis_lines:
        return "gopher.max_ellipsis_lines", ellipses
    alphabetic = sum(map(str.isalpha, words)) / count
    if alphabetic < settings.min_alphabetic_words:  # only then the words with other characters are looked into
        alphabetic = sum(_LETTER.search(word) is not None for word in words) / count
    if alphabetic < settings.min_alphabetic_words:
        return "gopher.min_alphabetic_words", alphabetic
    stop_words = len(STOP_WORDS.intersection(text.text.lower().split())) if settings.min_stop_words else 0
    if stop_words < settings.min_stop_words:
        return "gopher.min_stop_words", stop_words
    return None
