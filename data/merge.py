"""Token files joined into one, in the order given, without a Python object for every sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.index_check import broken_index
from data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path, publish, token_dtype
from data.manifest import Manifest, SourceRecord, manifest_path, read_manifest
from data.tokenizer import Tokenizer
from foundation.errors import RequestError, WorkError

_TOKENS = 1 << 20


def join_token_files(parts: Sequence[Path], out: Path, sources: Sequence[SourceRecord]) -> Manifest:
    """Join token files of ours that are thrown away afterwards.

    Args:
        parts: prefixes, in order; all of one tokenizer. A single one is moved, not copied.
        out: prefix of the whole.
        sources: for its manifest.
    """
    manifests = [_own_manifest(part) for part in parts]
    if len(parts) == 1:
        manifest = dataclasses.replace(manifests[0], sources=tuple(sources))
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(out, bin_path(parts[0]), idx_path(parts[0]).read_bytes(), manifest)
        return manifest
    first = manifests[0]
    with IndexedWriter(out, first.vocab_size) as writer:
        for part in parts:
            append(writer, IndexedTokens(part))
        return writer.finish(first.tokenizer_hash, first.eod_id, sources)


def merge_token_files(prefixes: Sequence[Path], out: Path, tokenizer: Tokenizer | None = None) -> Manifest:
    """Merge token files, which stay as they are. Documents of several sequences and views are merged too.

    Args:
        prefixes: in the order in which their documents follow one another.
        out: prefix of the result.
        tokenizer: that wrote them; needed where one has no manifest, as Megatron's own tools write none.

    Raises:
        RequestError: they are of different tokenizers or token types, or nothing tells of which.
        WorkError: one is damaged. The result's own hashes would hide it for good.
    """
    if out.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise RequestError(f"{out} is among the files to merge", cure="another name for the result")
    written_by = {
        (known.tokenizer_hash, known.eod_id, known.vocab_size) for known in map(read_manifest, prefixes) if known
    }
    if tokenizer is not None:
        written_by.add((tokenizer.hash, tokenizer.eod_id, tokenizer.vocab_size))
    bare = next((prefix for prefix in prefixes if not manifest_path(prefix).is_file()), None)
    if bare is not None and tokenizer is None:
        raise RequestError(
            f"{bare} has no manifest",
            rule="the manifest tells which tokenizer wrote a token file",
            cure="--tokenizer with the one that wrote it",
        )
    if len(written_by) != 1:
        raise RequestError(
            "token files of several tokenizers",
            where="; ".join(f"sha256 {digest[:12]}, end of document {end}" for digest, end, _ in sorted(written_by)),
            rule="numbers mean the same tokens in all files that are merged",
            cure="tokenise all documents with one tokenizer",
        )
    ((tokenizer_hash, eod_id, vocab_size),) = written_by
    sources: list[SourceRecord] = []
    with IndexedWriter(out, vocab_size) as writer:
        for prefix in prefixes:
            file, manifest = IndexedTokens(prefix), read_manifest(prefix)
            if file.dtype is not token_dtype(vocab_size):
                raise RequestError(
                    f"{prefix} holds {np.dtype(file.dtype).name}",
                    rule=f"a vocabulary of {vocab_size:,} takes {np.dtype(token_dtype(vocab_size)).name}",
                    cure="name the tokenizer that wrote it",
                )
            broken = broken_index(file)
            if broken:
                raise WorkError(
                    f"{idx_path(prefix)} is damaged: {broken[0]}",
                    where=str(prefix),
                    cure="write the corpus again with `orthant data tokenize`, or copy it again",
                )
            append(writer, file)
            sources += manifest.sources if manifest is not None else (SourceRecord(str(prefix), file.documents, 0),)
        return writer.finish(tokenizer_hash, eod_id, sources)


def append(writer: IndexedWriter, file: IndexedTokens) -> None:
    """Add all documents of a token file, a bounded number of tokens at a time."""
    itemsize = np.dtype(file.dtype).itemsize
    lengths = np.array(file.lengths)
    if len(lengths):
        ends = file.pointers + lengths.astype(np.int64) * itemsize
        breaks = np.flatnonzero(file.pointers[1:] != ends[:-1]) + 1  # where a view leaves documents out
        with open(bin_path(file.prefix), "rb") as handle:  # not through the map, whose pages would count as memory
            for first, last in pairwise([0, *breaks.tolist(), len(lengths)]):
                handle.seek(int(file.pointers[first]))
                left = (int(ends[last - 1]) - int(file.pointers[first])) // itemsize
                while left > 0:
                    tokens = np.fromfile(handle, dtype=file.dtype, count=min(_TOKENS, left))
                    if not len(tokens):
                        raise WorkError(
                            f"{bin_path(file.prefix)} is shorter than its index says", cure="write it again"
                        )
                    writer.add_tokens(tokens)
                    left -= len(tokens)
    writer.add_index(lengths, np.diff(file.document_index).astype(np.int32))


def _own_manifest(prefix: Path) -> Manifest:
    manifest = read_manifest(prefix)
    if manifest is None:
        raise WorkError(f"{manifest_path(prefix)} is gone", where=str(prefix), cure="start again")
    return manifest
