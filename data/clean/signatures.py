"""From texts to the hashes by which duplicates meet: a digest of the text, and one number a band of its MinHash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.clean.settings import NearSettings

Hashes = NDArray[np.uint64]

_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_GRAM = 0x9E3779B97F4A7C15
_KNOWN_WORDS = 1 << 20
# Scripts written without spaces (Thai, Lao, Myanmar, Khmer, kana, Han): every letter is a word of its own.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_ACCENTS = re.compile("[\u0300-\u036f]+")
_ASCII_WORDS = bytes(
    code if chr(code).isalnum() and code < 128 else 32 for code in bytes(range(256)).lower().ljust(256)
)


def mix(values: Hashes) -> Hashes:
    """Spread the bits of 64-bit numbers (the finaliser of SplitMix64: Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    result: Hashes = values ^ (values >> np.uint64(31))
    return result


def comparable_words(text: str) -> list[bytes]:
    """The words by which texts are compared: lower case, without accents and punctuation."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).split()
    plain = _ACCENTS.sub("", unicodedata.normalize("NFKD", text.lower()))
    return [word.encode("utf-8", "surrogatepass") for word in _WORD.findall(plain)]


class WordHashes(dict[bytes, int]):
    """64-bit hashes of words, the same in every process; words met before are looked up."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()  # bounds the memory; words come back as they are met
        number = int.from_bytes(hashlib.blake2b(word, digest_size=8).digest(), "little")
        self[word] = number
        return number

    def of(self, words: Sequence[bytes]) -> Hashes:
        """Hashes of words, in their order."""
        return np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))


def exact_hashes(texts: Sequence[str]) -> Hashes:
    """128-bit digests of whole texts.

    Returns:
        [documents, 2].
    """
    digests = b"".join(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts
    )
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


def ngram_hashes(words: Hashes, lengths: NDArray[np.int64], size: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Hashes of the word n-grams of several documents.

    A document of fewer than `size` words has one n-gram, all of its words; one without words has none.

    Args:
        words: hashes of the words of all documents, one document after the other.
        lengths: words of each document. [documents]
        size: words in an n-gram.

    Returns:
        The hashes, and how many belong to each document. [documents]
    """
    ends = np.cumsum(lengths)
    # Short documents get words of zero at their end, so that every position has a whole n-gram.
    short = (lengths > 0) & (lengths < size)
    missing = np.where(short, size - lengths, 0)
    if short.any():
        words = np.insert(words, np.repeat(ends, missing), np.uint64(0))
        lengths = lengths + missing
        ends = np.cumsum(lengths)
    counts = np.maximum(lengths - (size - 1), 0)
    if len(words) < size:
        return words[:0], counts
    total = len(words) - size + 1
    grams = np.zeros(total, dtype=np.uint64)
    for offset in range(size):
        grams = grams * np.uint64(_GRAM) + words[offset : offset + total]
    # The last size - 1 words of a document begin n-grams that reach into the next one.
    inside = np.ones(len(words), dtype=bool)
    full = ends[lengths > 0]
    for back in range(1, size):
        inside[full - back] = False
    return mix(grams[inside[:total]]), counts


def band_hashes(texts: Sequence[str], known: WordHashes, settings: NearSettings) -> tuple[Hashes, NDArray[np.int64]]:
    """One hash a band for each document that has words.

    Args:
        texts: documents.
        known: hashes of words; keep it from batch to batch.
        settings: bands, rows, n-gram size, seed.

    Returns:
        [documents with words, bands], and the numbers of those documents within `texts`.
    """
    words: list[bytes] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for number, text in enumerate(texts):
        before = len(words)
        words.extend(comparable_words(text))
        lengths[number] = len(words) - before
    return bands_of_words(known.of(words), lengths, settings)


def bands_of_words(
    words: Hashes, lengths: NDArray[np.int64], settings: NearSettings
) -> tuple[Hashes, NDArray[np.int64]]:
    """As `band_hashes`, from hashes of words. lengths: words of each document. [documents]"""
    from rensa import RMinHash

    grams, counts = ngram_hashes(words, lengths, settings.ngram)
    documents = np.flatnonzero(counts)
    if not len(documents):
        return np.empty((0, settings.bands), dtype=np.uint64), documents
    offsets = np.concatenate([[0], np.cumsum(counts[documents])]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets, settings.hashes, settings.seed)
    rows = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(documents), settings.bands, settings.rows)
    combined = np.zeros(rows.shape[:2], dtype=np.uint64)
    for row in range(settings.rows):
        combined = mix(combined * np.uint64(_GRAM) + rows[:, :, row])
    return combined, documents
