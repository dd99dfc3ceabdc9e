"""Text to token numbers, many documents at a time: by the reference tokenizer, or by gigatoken where it gives the same.

The reference is the tokenizer's own library (`tokenizers`, sentencepiece). gigatoken is some fifty times faster. It is
used for a tokenizer only after it gave the reference's numbers on a sample of the corpus at hand and on texts that are
hard on tokenizers, and goes on being compared on a piece of every batch. It never learns of special tokens, so that a
text that spells one stays text; a document that it is known to do otherwise goes to the reference.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.tokenizer import Ids, SentencePieceTokenizer, Tokenizer

_CHECKED_LETTERS = 1 << 14  # of one document in every batch
_TOLD_LETTERS = 60
_RANDOM_TEXTS = 3000

HARD_TEXTS = (
    "",
    " ",
    "  two  spaces and a trailing one ",
    "\n\n\t\r\n \n",
    "nul \0 and bell \a and \x7f\x80\x9f",
    "\ufeffmark",
    "é e\u0301 ﬁ ½ Å \u212b",
    "日本語 한국어 ไทย العربية हिन्दी",
    "😀 👩\u200d👩\u200d👧 🇫🇷 \U0010ffff",
    "a\u00a0b\u3000c\u2028d\u200be",
    "a\u2581b \u2581\u2581 c\u2581",
    "don't DON'T we'll I'm 'tis 'S 'Ve",
    "1234567890 3.14159 1,000,000 0x1F ²³",
    "<0x0A> <0xFF> <unk> [UNK] <s>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" * 3000 + " " * 300 + "=" * 300 + "\n" * 100,
    "def f(x):\n    return x**2  # comment\n\n\tif (a&&b||c) { d[0]+=1; }\r\n",
    "https://example.org/a?b=c&d=%20e#f me@example.org /usr/lib C:\\x",
)


_SCRIPTS = (
    (0x20, 0x7E), (0x00, 0x1F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xACFF),
    (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1D400, 0x1D4FF), (0x1F300, 0x1F6FF),
)  # fmt: skip
_BITS = (
    "  ", "\n", "\t", "a", "B", "don", "'S", "'ll", "9", "12", ".", "!!", "_", "\r\n", "é", "日", "\u00a0",
    "\u3000", "\u017f", "\u212a", "\u0130", "\u01c5",
)  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Texts in which letters stand together that never do in a corpus; always the same."""
    chance = random.Random(0)
    texts = []
    for _ in range(count):
        if chance.random() < 0.6:
            scripts = chance.choices(_SCRIPTS, k=chance.randint(1, 4))
            letters = [chr(chance.randint(*chance.choice(scripts))) for _ in range(chance.randint(1, 60))]
        else:
            letters = chance.choices(_BITS, k=chance.randint(1, 40))
        texts.append("".join(letters))
    return texts


class Encoded(NamedTuple):
    """Tokens of several texts, end to end, and how many each has."""

    tokens: NDArray[np.integer[Any]]
    lengths: NDArray[np.int64]


class FastPathDiffers(Exception):
    """gigatoken gave other numbers than the reference: nothing that it did for this tokenizer may be kept."""


class Encoder(Protocol):
    """Encodes texts in batches."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Tokens of the texts, as the reference tokenizer gives them; without special tokens."""
        ...


@dataclass(frozen=True)
class ReferenceEncoder:
    """The tokenizer's own library."""

    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Tokens of the texts."""
        return _joined(self.tokenizer.encode(texts))


class GigatokenEncoder:
    """gigatoken, beside the reference.

    Args:
        tokenizer: the reference.
        ascii_only: documents with other letters are the reference's.
        parallel: use a thread for every core.

    Raises:
        RuntimeError, ValueError: gigatoken cannot do this kind of tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, ascii_only: bool = False, parallel: bool = True) -> None:
        import gigatoken

        self.ascii_only = ascii_only
        self._reference = tokenizer
        self._parallel = parallel
        self._library: Any = gigatoken.Tokenizer.from_json(_without_special_tokens(tokenizer))
        self._special: NDArray[np.bool_] = np.zeros(max(tokenizer.vocab_size, self._library.vocab_size), dtype=np.bool_)
        self._special[list(tokenizer.special_tokens.values())] = True
        self._batches = 0

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Tokens of the texts.

        Raises:
            FastPathDiffers: a piece of this batch has other tokens at the reference.
        """
        aside = {number for number, text in enumerate(texts) if self.ascii_only and not text.isascii()}
        encoded = self._encode(["" if number in aside else text for number, text in enumerate(texts)])
        self._compare_one([text for number, text in enumerate(texts) if number not in aside])
        special = np.flatnonzero(self._special[encoded.tokens])
        if len(special):
            aside.update(np.searchsorted(np.cumsum(encoded.lengths), special, side="right").tolist())
        return self._with_reference(encoded, texts, sorted(aside)) if aside else encoded

    def first_difference(self, texts: Sequence[str]) -> str | None:
        """The first of these texts that this encoder and the reference give other tokens, None where none is."""
        found = self._encode(texts)
        rows = np.split(found.tokens, np.cumsum(found.lengths)[:-1])
        for text, row, expected in zip(texts, rows, self._reference.encode(texts), strict=True):
            if not np.array_equal(row, expected) and not self._special[row].any():
                return text
        return None

    def _encode(self, texts: Sequence[str]) -> Encoded:
        import awkward

        rows = self._library.encode_batch(list(texts), parallel=self._parallel)
        return Encoded(np.asarray(awkward.flatten(rows)), np.asarray(awkward.num(rows, axis=1), dtype=np.int64))

    def _compare_one(self, texts: Sequence[str]) -> None:
        self._batches += 1
        text = texts[self._batches % len(texts)][:_CHECKED_LETTERS] if texts else ""
        tokens = self._encode([text]).tokens
        if not self._special[tokens].any() and not np.array_equal(tokens, self._reference.encode([text])[0]):
            raise FastPathDiffers(f"other tokens for {_told(text)}")

    def _with_reference(self, encoded: Encoded, texts: Sequence[str], numbers: Sequence[int]) -> Encoded:
        """Put the reference's tokens in the place of some texts'."""
        references = self._reference.encode([texts[number] for number in numbers])
        rows = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
        for number, ids in zip(numbers, references, strict=True):
            rows[number] = ids
        return _joined(rows)


def choose_encoder(
    tokenizer: Tokenizer, sample: Sequence[str], report: Callable[[str], None], *, parallel: bool = True
) -> Encoder:
    """gigatoken where it does all of a sample as the reference does, else the reference.

    Args:
        tokenizer: the reference.
        sample: texts of the corpus that is to be encoded.
        report: is told the choice, and why.
        parallel: let gigatoken use a thread for every core.
    """
    try:
        fast = GigatokenEncoder(tokenizer, parallel=parallel)
    except (RuntimeError, ValueError, KeyError, ImportError) as problem:
        report(f"tokenise: by the reference, as gigatoken cannot do this tokenizer: {str(problem).splitlines()[0]}")
        return ReferenceEncoder(tokenizer)
    texts = [*HARD_TEXTS, *_spelled(tokenizer), *random_texts(_RANDOM_TEXTS), *sample]
    different = fast.first_difference(texts)
    beyond_ascii = ""
    if different is not None and not different.isascii():
        beyond_ascii = f"; documents with letters beyond ASCII by the reference, as it errs on {_told(different)}"
        fast = GigatokenEncoder(tokenizer, ascii_only=True, parallel=parallel)
        texts = [text for text in texts if text.isascii()]
        different = fast.first_difference(texts)
    if different is not None:
        report(f"tokenise: by the reference, as gigatoken gives other tokens for {_told(different)}")
        return ReferenceEncoder(tokenizer)
    letters = sum(map(len, sample))
    report(
        f"tokenise: by gigatoken {version('gigatoken')}, which gave the reference's tokens on {len(sample):,} "
        f"documents of this corpus ({letters:,} letters) and {len(texts) - len(sample):,} hard texts{beyond_ascii}"
    )
    return fast


def _told(text: str) -> str:
    return repr(text[:_TOLD_LETTERS])


def _spelled(tokenizer: Tokenizer) -> list[str]:
    """Texts that spell each special token, alone and inside other text."""
    names = list(tokenizer.special_tokens)
    return [
        *names,
        *(f"x {name} y" for name in names),
        *(f"x{name}{name}y" for name in names),
        " ".join(names),
        "".join(names),
    ]


def _without_special_tokens(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that gigatoken reads, without the tokens that no text may become."""
    data = tokenizer.path.read_bytes()
    if isinstance(tokenizer, SentencePieceTokenizer):
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        values: dict[str, Any] = json.loads(sentencepiece_to_tokenizer_json(data))
    else:
        values = json.loads(data)
    values["added_tokens"] = [token for token in values.get("added_tokens") or () if not token.get("special")]
    values["truncation"] = values["padding"] = values["post_processor"] = None
    return json.dumps(values)


def _joined(rows: Sequence[Ids | NDArray[np.integer[Any]]]) -> Encoded:
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    return Encoded(np.concatenate(rows) if len(rows) else np.empty(0, dtype=np.int32), lengths)
