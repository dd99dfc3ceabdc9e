"""Text normalisation: what no reader sees and no model should learn.

Unicode NFC, line ends (form feeds and vertical tabs are such) as line feeds, a space where a zero-width space parts
words, no control characters or zero-width marks other than those that join letters, no spaces before a line's end, at
most one empty line in a row, no white space around the text.
"""

from __future__ import annotations

import re
import unicodedata

_CONTROL_BYTES = bytes(set(range(32)) - {9, 10}) + b"\x7f"
# C0 and C1 controls, soft hyphen, byte order mark, word joiner; U+200C and U+200D shape real words.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u2060\ufeff]+")
# Vertical tab, form feed, NEL and the line and paragraph separators end lines as well (UAX 14: BK, NL).
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# The separators of ASCII and the zero-width space part words, which must not be glued; beside white space they go.
_PARTS = re.compile("(?<=[ \t\n\xa0])[\x1c-\x1f\u200b]+|[\x1c-\x1f\u200b]+(?=[ \t\n\xa0])")
_PARTS_ALONE = re.compile("[\x1c-\x1f\u200b]+")
_TRAILING = re.compile(r"[ \t\xa0]+$", re.MULTILINE)
_MANY_EMPTY = re.compile(r"\n{3,}")


def normalise(text: str) -> str:
    """The text as it goes on; the same object where nothing had to change.

    A lone surrogate, which JSON can spell and UTF-8 cannot, becomes U+FFFD.
    """
    if text.isascii():
        data = text.encode()
        if len(data.translate(None, _CONTROL_BYTES)) == len(data):
            return _tidy_lines(text)
    else:
        text = unicodedata.normalize("NFC", text)
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = _UNSEEN.sub("", _LINE_ENDS.sub("\n", text))
    return _tidy_lines(_PARTS_ALONE.sub(" ", _PARTS.sub("", text)))


def _tidy_lines(text: str) -> str:
    if " \n" in text or "\t\n" in text or "\xa0\n" in text:
        text = _TRAILING.sub("", text)
    if "\n\n\n" in text:
        text = _MANY_EMPTY.sub("\n\n", text)
    return text.strip()
