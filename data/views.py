"""Token files that exist already: what they hold, and a view of a part of their documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed import IndexedTokens, bin_path, entropy, index_bytes, publish
from data.manifest import Manifest, SourceRecord, read_manifest
from data.tokenize_shard import content_fraction
from data.tokenizer import Tokenizer
from foundation.errors import ConfigError

_BATCH_TOKENS = 1 << 22


def refuse_other_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Refuse a token file that another tokenizer wrote, as far as its manifest tells.

    Raises:
        ConfigError: the manifest names another tokenizer.
    """
    manifest = read_manifest(prefix)
    if manifest is not None and (manifest.tokenizer_hash, manifest.eod_id) != (tokenizer.hash, tokenizer.eod_id):
        raise ConfigError(
            "data.tokenizer.path",
            str(tokenizer.path),
            f"{prefix} was written with a tokenizer of sha256 {manifest.tokenizer_hash[:12]} and end of document "
            f"{manifest.eod_id}; this one has {tokenizer.hash[:12]} and {tokenizer.eod_id}",
            "the tokenizer that wrote the token file, or tokenise the documents again",
        )


def token_counts(prefix: Path, vocab_size: int) -> NDArray[np.int64]:
    """How often each token stands in a token file, int64 [vocab_size].

    Raises:
        ConfigError: a token is outside the vocabulary.
    """
    counter = _Counter(prefix, vocab_size)
    file = IndexedTokens(prefix)
    for sequence in range(len(file)):
        counter.add(file.read(sequence))
    return counter.result()


def split_by_content(
    prefix: Path, train: Path, validation: Path, fraction: float, tokenizer: Tokenizer, report: Callable[[str], None]
) -> tuple[Manifest, Manifest]:
    """Hold documents of a token file out, without copying tokens.

    Two new prefixes share the .bin through a link; their .idx files name the documents of each side, chosen by a hash
    of the documents' tokens.

    Returns:
        The manifests of the two.
    """
    file = IndexedTokens(prefix)
    held = np.zeros(file.documents, dtype=bool)
    counters = [_Counter(prefix, tokenizer.vocab_size), _Counter(prefix, tokenizer.vocab_size)]
    for document in range(file.documents):
        first, last = int(file.document_index[document]), int(file.document_index[document + 1])
        sequences = [file.read(sequence) for sequence in range(first, last)]
        content = b"".join(tokens.astype("<i4").tobytes() for tokens in sequences)
        held[document] = content_fraction(content) < fraction
        for tokens in sequences:
            counters[int(held[document])].add(tokens)
    manifest = read_manifest(prefix)
    if manifest is not None:
        digest = manifest.bin_sha256
    else:
        with open(bin_path(prefix), "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    sides = [
        _publish_view(file, held == bool(side), counters[side].result(), target, tokenizer, digest)
        for side, target in enumerate((train, validation))
    ]
    report(f"{prefix}: {sides[0].documents:,} documents to train on, {sides[1].documents:,} held out")
    return sides[0], sides[1]


def _publish_view(
    file: IndexedTokens,
    chosen: NDArray[np.bool_],
    counts: NDArray[np.int64],
    target: Path,
    tokenizer: Tokenizer,
    digest: str,
) -> Manifest:
    sizes = np.diff(file.document_index)  # sequences of each document
    sequences = np.repeat(chosen, sizes)
    lengths = np.ascontiguousarray(file.lengths[sequences])
    documents = np.concatenate([[0], np.cumsum(sizes[chosen])]).astype(np.int64)
    index = index_bytes(file.dtype, lengths, np.ascontiguousarray(file.pointers[sequences]), documents)
    manifest = Manifest(
        documents=int(chosen.sum()),
        sequences=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        dtype=np.dtype(file.dtype).name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        tokenizer_hash=tokenizer.hash,
        unigram_entropy=entropy(counts),
        bin_bytes=file.bin_bytes,
        bin_sha256=digest,
        idx_sha256=hashlib.sha256(index).hexdigest(),
        sources=(SourceRecord(str(file.prefix), int(chosen.sum()), 0),),
        view_of=str(file.prefix),
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    link = target.with_name(f".{target.name}.bin.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(bin_path(file.prefix).resolve())
    publish(target, link, index, manifest)
    return manifest


class _Counter:
    """Counts tokens many at a time."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix, self._vocab_size = prefix, vocab_size
        self._counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self._waiting: list[NDArray[np.integer]] = []
        self._tokens = 0

    def add(self, tokens: NDArray[np.integer]) -> None:
        self._waiting.append(tokens)
        self._tokens += len(tokens)
        if self._tokens >= _BATCH_TOKENS:
            self._count()

    def result(self) -> NDArray[np.int64]:
        self._count()
        return self._counts

    def _count(self) -> None:
        tokens = np.concatenate(self._waiting) if self._waiting else np.empty(0, dtype=np.int64)
        self._waiting, self._tokens = [], 0
        if not len(tokens):
            return
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise ConfigError(
                "data.tokenizer.path",
                self._vocab_size,
                f"{self._prefix} holds tokens {int(tokens.min())} to {int(tokens.max())}; the tokenizer's vocabulary "
                f"has {self._vocab_size} entries",
                "the tokenizer that wrote the token file",
            )
        self._counts += np.bincount(tokens, minlength=self._vocab_size)
