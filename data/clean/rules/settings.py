"""The thresholds of the rules, with the values of the papers that they come from."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from foundation.errors import ConfigError


@dataclass(frozen=True)
class GopherSettings:
    """Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", A.1.1, table A1.

    Fractions are of the text's words, lines or letters as said; a text that lies beyond a bound is removed.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_symbol_word_ratio: float = 0.1
    """Of "#", and of ellipses, to words."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    """Of the, be, to, of, and, that, have, with: how many different ones occur. 0 for languages other than English."""
    max_duplicate_lines: float = 0.3
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_line_letters: float = 0.2
    max_duplicate_paragraph_letters: float = 0.2
    max_top_2gram: float = 0.2
    max_top_3gram: float = 0.18
    max_top_4gram: float = 0.16
    max_duplicate_5grams: float = 0.15
    max_duplicate_6grams: float = 0.14
    max_duplicate_7grams: float = 0.13
    max_duplicate_8grams: float = 0.12
    max_duplicate_9grams: float = 0.11
    max_duplicate_10grams: float = 0.1


@dataclass(frozen=True)
class C4Settings:
    """Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2.2.

    Its lines must end in punctuation; FineWeb leaves that out, since it removes a third of all text, and so does the
    default here. The least numbers are the paper's; the code published with it has 3 sentences and 5 words.
    """

    terminal_punctuation: bool = False
    """Drop lines that do not end in a terminal punctuation mark."""
    min_words_per_line: int = 3
    """Drop shorter lines."""
    min_sentences: int = 5
    """Of a document, after lines were dropped."""
    max_word_length: int = 1000
    """Drop lines with longer words (not in the paper but in its code)."""
    drop_javascript_lines: bool = True
    drop_policy_lines: bool = True
    """Terms of use, privacy policy, cookies."""
    drop_citations: bool = True
    """Wikipedia's [1], [edit] and [citation needed]."""
    refuse_lorem_ipsum: bool = True
    refuse_curly_bracket: bool = True
    """A curly bracket: the page is code."""


@dataclass(frozen=True)
class FineWebSettings:
    """Penedo et al. 2024, "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale", 3.6."""

    min_punctuated_lines: float = 0.12
    """Share of lines that end in a terminal punctuation mark."""
    max_short_lines: float = 0.67
    short_line: int = 30
    """Letters of a short line."""
    max_duplicate_line_letters: float = 0.1
    max_newlines_per_word: float = 0.3


@dataclass(frozen=True)
class RuleSettings:
    """Which rules are applied; a group that is None is not."""

    gopher: GopherSettings | None = field(default_factory=GopherSettings)
    c4: C4Settings | None = field(default_factory=C4Settings)
    fineweb: FineWebSettings | None = field(default_factory=FineWebSettings)


GROUPS: dict[str, type] = {"gopher": GopherSettings, "c4": C4Settings, "fineweb": FineWebSettings}


def rule_settings(groups: Iterable[str], changes: Iterable[str] = ()) -> RuleSettings | None:
    """The settings of some groups of rules.

    Args:
        groups: of gopher, c4, fineweb.
        changes: `group.name=value`.

    Returns:
        None where no group is named.

    Raises:
        ConfigError: an unknown group, name or a value that does not fit.
    """
    values: dict[str, dict[str, Any]] = {}
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(
                "--rules", group, f"the rules are {', '.join(GROUPS)} or none", f"--rules {','.join(GROUPS)}"
            )
        values[group] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        group, dot, leaf = name.partition(".")
        if not equals or not dot:
            raise ConfigError("--set", change, "it has the form group.name=value", "--set gopher.min_words=20")
        if group not in values:
            raise ConfigError(
                "--set", change, f"the rules in use are {', '.join(values) or 'none'}", f"--rules {group}"
            )
        values[group][leaf] = _value(group, leaf, text)
    if not values:
        return None
    return RuleSettings(**{name: GROUPS[name](**values[name]) if name in values else None for name in GROUPS})


def _value(group: str, leaf: str, text: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(GROUPS[group])}
    if leaf not in fields:
        near = (*difflib.get_close_matches(leaf, fields, n=1), next(iter(fields)))[0]
        raise ConfigError(
            "--set",
            f"{group}.{leaf}",
            f"{group} has {', '.join(fields)}",
            _with_default(group, near),
        )
    default: Any = fields[leaf].default
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        value = int(text) if isinstance(default, int) else float(text)
    except (ValueError, KeyError) as problem:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise ConfigError("--set", f"{group}.{leaf}={text}", f"it is {kind}", _with_default(group, leaf)) from problem
    if value < 0 or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(
            "--set", f"{group}.{leaf}={text}", "it is not below 0, and finite", _with_default(group, leaf)
        )
    return value


def _with_default(group: str, leaf: str) -> str:
    """The option that sets a threshold to what it is anyway."""
    default = next(field.default for field in dataclasses.fields(GROUPS[group]) if field.name == leaf)
    return f"--set {group}.{leaf}={str(default).lower()}"
