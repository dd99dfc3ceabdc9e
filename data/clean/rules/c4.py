"""The rules of C4 (Raffel et al. 2020, section 2.2). They drop lines, then look at what is left.

Left out: the list of obscene words and the removal of three-sentence spans that occur elsewhere (see near duplicates).
"""

from __future__ import annotations

import re

from data.clean.rules.gopher import Found
from data.clean.rules.settings import C4Settings
from data.clean.rules.text import TERMINAL, Text

POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[\d+\]|\[edit\]|\[citation needed\]")
_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]]*(?=\s|$)|[。！？]""")


def apply(text: Text, settings: C4Settings) -> tuple[Text, Found]:
    """The text without the lines that the rules drop; and the rule that removes it as a whole, if one does."""
    lower = text.text.lower()
    if settings.refuse_lorem_ipsum and "lorem ipsum" in lower:
        return text, ("c4.refuse_lorem_ipsum", 1)
    if settings.refuse_curly_bracket and "{" in text.text:
        return text, ("c4.refuse_curly_bracket", 1)
    kept = []
    changed = False
    for line in text.text.split("\n"):
        cleaned = _CITATION.sub("", line) if settings.drop_citations and "[" in line else line
        changed |= cleaned != line
        if not cleaned.strip() or _stays(cleaned.strip(), settings):
            kept.append(cleaned)
        else:
            changed = True
    if changed:
        text = Text(re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip())
    sentences = len(_SENTENCE_END.findall(text.text))
    if sentences < settings.min_sentences:
        return text, ("c4.min_sentences", sentences)
    return text, None


def _stays(line: str, settings: C4Settings) -> bool:
    if len(line.split(None, settings.min_words_per_line)) < settings.min_words_per_line:
        return False
    if settings.terminal_punctuation and (not line.endswith(TERMINAL) or line.endswith("...")):
        return False
    if len(line) > settings.max_word_length and max(map(len, line.split())) > settings.max_word_length:
        return False
    lower = line.lower()
    if settings.drop_javascript_lines and "javascript" in lower:
        return False
    return not (settings.drop_policy_lines and any(phrase in lower for phrase in POLICY))
