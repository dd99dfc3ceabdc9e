"""Whether a token file is what its manifest says and what the format demands."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.indexed import IndexedTokens, bin_path, entropy, idx_path, token_dtype
from data.manifest import Manifest, manifest_path, read_manifest
from foundation.errors import RequestError, WorkError

_BATCH_TOKENS = 1 << 24


def check_token_file(prefix: Path) -> list[str]:
    """What is wrong with a token file, one line each; none where it is whole.

    Reads all of it: hashes against the manifest, the index's invariants, and the tokens against the vocabulary.

    Raises:
        RequestError: one of its three files is missing.
    """
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        if not path.is_file():
            raise RequestError(
                f"{path} is missing",
                rule="a token file is PREFIX.bin, PREFIX.idx and the manifest PREFIX.json",
                cure="name the prefix without an ending; or write it again with `orthant data tokenize`",
            )
    try:
        manifest = read_manifest(prefix)
        assert manifest is not None
    except WorkError as problem:
        return [f"{manifest_path(prefix)}: {problem.what}"]
    found = _check_hashes(prefix, manifest)
    try:
        file = IndexedTokens(prefix)
    except WorkError as problem:
        return [*found, problem.what]
    found += _check_manifest(file, manifest)
    broken = _check_documents(file) + _check_sequences(file, manifest)
    found += broken
    if not broken:  # else nobody knows where the tokens are
        found += _check_tokens(file, manifest)
    return found


def broken_index(file: IndexedTokens) -> list[str]:
    """Why nobody can say where a token file's documents are, by its index and the size of its .bin; none where one can.

    Holds for any file of the format: also for a view, and for what has no manifest.
    """
    return _check_documents(file) + _check_places(file)


def _check_hashes(prefix: Path, manifest: Manifest) -> list[str]:
    found = []
    for path, expected in ((bin_path(prefix), manifest.bin_sha256), (idx_path(prefix), manifest.idx_sha256)):
        with open(path, "rb") as handle:
            actual = hashlib.file_digest(handle, "sha256").hexdigest()
        if actual != expected:
            found.append(f"{path}: its sha256 is {actual[:16]}..., the manifest says {expected[:16]}...")
    return found


def _check_manifest(file: IndexedTokens, manifest: Manifest) -> list[str]:
    actual = {
        "documents": file.documents,
        "sequences": len(file),
        "tokens": file.tokens,
        "dtype": np.dtype(file.dtype).name,
        "bin_bytes": file.bin_bytes,
    }
    found = [
        f"{key}: {value} in the files, {getattr(manifest, key)} in the manifest"
        for key, value in actual.items()
        if value != getattr(manifest, key)
    ]
    if manifest.view_of is None and file.dtype is not token_dtype(manifest.vocab_size):
        found.append(f"dtype: {actual['dtype']} for a vocabulary of {manifest.vocab_size}")
    return found


def _check_documents(file: IndexedTokens) -> list[str]:
    index = file.document_index
    found = []
    if index[0] != 0:
        found.append(f"document index: starts at {index[0]}, not at 0")
    if index[-1] != len(file):
        found.append(f"document index: ends at {index[-1]}, not at the number of sequences, {len(file)}")
    falls = np.flatnonzero(np.diff(index) < 0)
    if len(falls):
        found.append(f"document index: falls at document {falls[0]}")
    return found


def _check_places(file: IndexedTokens) -> list[str]:
    itemsize = np.dtype(file.dtype).itemsize
    pointers = file.pointers
    found = []
    if (file.lengths < 0).any():
        found.append(f"length of sequence {np.flatnonzero(file.lengths < 0)[0]} is negative")
    if (pointers % itemsize).any():
        found.append(f"pointer of sequence {np.flatnonzero(pointers % itemsize)[0]} is inside a token")
    sizes = file.lengths.astype(np.int64) * itemsize
    outside = (pointers < 0) | (pointers > file.bin_bytes - sizes)  # a sum could pass int64
    if outside.any():
        found.append(f"sequence {np.flatnonzero(outside)[0]} lies outside the .bin of {file.bin_bytes} bytes")
    return found


def _check_sequences(file: IndexedTokens, manifest: Manifest) -> list[str]:
    sizes = file.lengths.astype(np.int64) * np.dtype(file.dtype).itemsize
    pointers = file.pointers
    ends = pointers + sizes
    found = _check_places(file)
    expected = np.concatenate([[0], np.cumsum(sizes)])
    if manifest.view_of is not None:
        overlapping = np.flatnonzero(pointers[1:] < ends[:-1])
        if len(overlapping):
            found.append(f"sequence {overlapping[0] + 1} overlaps the one before it")
    elif (pointers != expected[:-1]).any():
        wrong = np.flatnonzero(pointers != expected[:-1])[0]
        found.append(
            f"pointer of sequence {wrong} is {pointers[wrong]}; the lengths before it add up to {expected[wrong]}"
        )
    elif expected[-1] != file.bin_bytes:
        found.append(f"the lengths add up to {expected[-1]} bytes; the .bin has {file.bin_bytes}")
    return found


def _check_tokens(file: IndexedTokens, manifest: Manifest) -> list[str]:
    if not file.tokens:
        return []
    tokens = np.memmap(bin_path(file.prefix), dtype=file.dtype, mode="r")
    counts: NDArray[np.int64] = np.zeros(manifest.vocab_size, dtype=np.int64)
    for first in range(0, len(tokens), _BATCH_TOKENS):
        part = tokens[first : first + _BATCH_TOKENS]
        outside = np.flatnonzero((part < 0) | (part >= manifest.vocab_size))
        if len(outside):
            return [
                f"token {part[outside[0]]} at {first + outside[0]} is outside the vocabulary of {manifest.vocab_size}"
            ]
        counts += np.bincount(part, minlength=manifest.vocab_size)
    found = []
    if manifest.view_of is None and abs(entropy(counts) - manifest.unigram_entropy) > 1e-9:
        found.append(f"unigram_entropy: {entropy(counts)} in the files, {manifest.unigram_entropy} in the manifest")
    filled = file.lengths > 0
    last = (file.pointers[filled] // np.dtype(file.dtype).itemsize) + file.lengths[filled] - 1
    without_end = np.flatnonzero(tokens[last] != manifest.eod_id)
    if len(without_end) and manifest.view_of is None:
        found.append(f"sequence {without_end[0]} does not end with the end-of-document token {manifest.eod_id}")
    return found
