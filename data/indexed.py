"""Token files: PREFIX.bin and PREFIX.idx in Megatron's format, with a manifest in PREFIX.json.

Follows megatron.core.datasets.indexed_dataset byte for byte, without torch. Little-endian. The .bin holds tokens only.
The .idx: magic, version u64 = 1, dtype code u8, sequences u64, length of the document index u64, then sequence lengths
int32, byte offsets of the sequences int64, and the document index int64 (where each document's sequences begin; one
entry more than documents). An empty document repeats an entry of the document index and has no sequence.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from data.manifest import Manifest, SourceRecord, manifest_path
from foundation.errors import RequestError, WorkError
from foundation.files import flush_folder, write_text
from foundation.locks import NoLocksError, take

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer[Any]]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

Tokens = NDArray[np.integer[Any]]


def bin_path(prefix: Path | str) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> type[np.uint16 | np.int32]:
    """uint16 where the vocabulary has fewer than 65500 entries, else int32 (core's DType.optimal_dtype)."""
    return np.uint16 if vocab_size < 65500 else np.int32


def entropy(counts: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Entropy of a frequency table in nats; 0.0 where it is empty."""
    seen = counts[counts > 0].astype(np.float64)
    total = seen.sum()
    return float(np.log(total) - (seen * np.log(seen)).sum() / total) if total else 0.0


def index_bytes(
    dtype: type[np.integer[Any]], lengths: NDArray[np.int32], pointers: NDArray[np.int64], documents: NDArray[np.int64]
) -> bytes:
    """The bytes of an .idx.

    Args:
        dtype: of the tokens.
        lengths: tokens of each sequence, int32 [sequences].
        pointers: bytes before each sequence, int64 [sequences].
        documents: first sequence of each document and, at the end, the number of sequences, int64 [documents + 1].
    """
    header = _HEADER.pack(MAGIC, 1, _CODES[dtype], len(lengths), len(documents))
    return b"".join((header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()))


class IndexedWriter:
    """Writes a token file whole or not at all.

    Tokens go to a temporary file beside the final one. `finish` flushes it to disk and gives the three files their
    final names, the .idx last: a prefix with no .idx was never finished. Leaving the `with` block before `finish`
    leaves nothing; after a kill, the next writer of the same prefix takes the temporary file over.

    Args:
        prefix: final path without its ending.
        vocab_size: of the tokenizer; decides uint16 or int32.

    Attributes:
        tokens: added so far.
        documents: added so far, empty ones included.
        counts: how often each token was added, int64 [vocab_size].

    Raises:
        WorkError: another process writes the same prefix.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix, self.vocab_size = prefix, vocab_size
        self.dtype = token_dtype(vocab_size)
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
        self.tokens = 0
        self.documents = 0
        self._lengths: list[NDArray[np.int32]] = []
        self._sequences: list[NDArray[np.int32]] = []
        self._hash = hashlib.sha256()
        self._temporary = prefix.with_name(f".{prefix.name}.bin.tmp")
        self._handle = self._claim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def discard(self) -> None:
        """Leave nothing behind, unless `finish` has been called."""
        if not self._handle.closed:
            self._temporary.unlink(missing_ok=True)
            self._handle.close()

    def add(self, tokens: Tokens, lengths: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Append documents.

        Args:
            tokens: of all these documents, end to end, end-of-document tokens included.
            lengths: tokens of each document; 0 for an empty one.
        """
        sizes = np.asarray(lengths, dtype=np.int32)
        if int(sizes.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"lengths add up to {int(sizes.sum(dtype=np.int64))}, not to {len(tokens)} tokens")
        self.add_tokens(tokens)
        filled = sizes > 0
        self.add_index(sizes[filled], filled.astype(np.int32))

    def add_tokens(self, tokens: Tokens) -> None:
        """Append tokens; `add_index` has to tell whose they are before `finish`.

        Raises:
            WorkError: one is outside the vocabulary.
        """
        if not len(tokens):
            return
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise WorkError(
                f"tokens from {int(tokens.min())} to {int(tokens.max())}: outside the vocabulary of {self.vocab_size}",
                where=str(self.prefix),
                cure="tokenise with the tokenizer that the vocabulary size is from",
            )
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self._handle.write(data)
        self._hash.update(data)
        self.counts += np.bincount(tokens, minlength=self.vocab_size)
        self.tokens += len(tokens)

    def add_index(self, lengths: NDArray[np.int32], sequences: NDArray[np.int32]) -> None:
        """Append to the index.

        Args:
            lengths: tokens of each sequence, int32.
            sequences: how many of them each document has, int32 [documents].
        """
        if int(sequences.sum(dtype=np.int64)) != len(lengths):
            raise ValueError(f"documents of {int(sequences.sum(dtype=np.int64))} sequences, {len(lengths)} sequences")
        self._lengths.append(lengths)
        self._sequences.append(sequences)
        self.documents += len(sequences)

    def finish(self, tokenizer_hash: str, eod_id: int, sources: Sequence[SourceRecord]) -> Manifest:
        """Give the files their final names and return the manifest."""
        lengths = np.concatenate([np.empty(0, dtype=np.int32), *self._lengths])
        if int(lengths.sum(dtype=np.int64)) != self.tokens:
            raise ValueError(f"{self.tokens} tokens and an index of {int(lengths.sum(dtype=np.int64))}")
        itemsize = np.dtype(self.dtype).itemsize
        ends = np.cumsum(lengths, dtype=np.int64) * itemsize
        pointers = ends - lengths.astype(np.int64) * itemsize
        documents = np.zeros(self.documents + 1, dtype=np.int64)
        np.cumsum(np.concatenate([np.empty(0, dtype=np.int32), *self._sequences]), out=documents[1:])
        index = index_bytes(self.dtype, lengths, pointers, documents)
        manifest = Manifest(
            documents=self.documents,
            sequences=len(lengths),
            tokens=self.tokens,
            dtype=np.dtype(self.dtype).name,
            vocab_size=self.vocab_size,
            eod_id=eod_id,
            tokenizer_hash=tokenizer_hash,
            unigram_entropy=entropy(self.counts),
            bin_bytes=self.tokens * itemsize,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            sources=tuple(sources),
        )
        self._handle.flush()
        os.fsync(self._handle.fileno())
        publish(self.prefix, self._temporary, index, manifest)
        self._handle.close()
        return manifest

    def _claim(self) -> IO[bytes]:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = open(self._temporary, "ab")  # noqa: SIM115 - closed by finish or __exit__
            if not self._locked(handle):
                handle.close()
                raise WorkError(
                    "another process is writing this token file",
                    where=str(self.prefix),
                    cure="wait for it, or write to another prefix",
                )
            # Between opening and locking, its writer may have finished and renamed the file: what is locked would then
            # be a final .bin.
            if self._temporary.exists() and os.path.samestat(os.fstat(handle.fileno()), self._temporary.stat()):
                handle.truncate(0)
                return handle
            handle.close()

    def _locked(self, handle: IO[bytes]) -> bool:
        try:
            return take(handle, self._temporary, "processes")
        except NoLocksError:
            return True  # `tokenize`, where several may write at once, has told people


def publish(prefix: Path, finished_bin: Path, index: bytes, manifest: Manifest) -> None:
    """Give a token file its final names: .bin, .json and, last, the .idx without which nobody reads the others."""
    idx_path(prefix).unlink(missing_ok=True)
    flush_folder(prefix.parent)
    finished_bin.replace(bin_path(prefix))
    write_text(manifest_path(prefix), manifest.to_json())
    temporary = prefix.with_name(f".{prefix.name}.idx.tmp")
    with open(temporary, "wb") as handle:
        handle.write(index)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(idx_path(prefix))
    flush_folder(prefix.parent)


class IndexedTokens:
    """Reads a token file through memory maps. Text files only: Megatron's multimodal modes are not read.

    Attributes:
        lengths: tokens of each sequence, int32 [sequences].
        pointers: bytes before each sequence in the .bin, int64 [sequences].
        document_index: first sequence of each document, and their number at the end, int64 [documents + 1].
        dtype: of the tokens.

    Raises:
        RequestError: a file is missing.
        WorkError: the .idx is damaged.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise RequestError(
                    f"{path} is missing",
                    rule="a token file is a .bin and an .idx of the same name",
                    cure=f"name the prefix, {self.prefix.with_suffix('')}, without an ending"
                    if self.prefix.suffix in (".bin", ".idx", ".json")
                    else "write it with `orthant data tokenize`",
                )
        index = _mapped(idx_path(prefix)) if idx_path(prefix).stat().st_size else None
        self.dtype, sequences, documents = self._header(index)
        assert index is not None
        edges = np.cumsum([_HEADER.size, 4 * sequences, 8 * sequences, 8 * documents]).tolist()
        if index.size != edges[-1]:
            raise self._damaged(f"{index.size} bytes where its header promises {edges[-1]}")
        self.lengths: NDArray[np.int32] = index[edges[0] : edges[1]].view(np.int32)
        self.pointers: NDArray[np.int64] = index[edges[1] : edges[2]].view(np.int64)
        self.document_index: NDArray[np.int64] = index[edges[2] : edges[3]].view(np.int64)
        self.bin_bytes = bin_path(prefix).stat().st_size
        # An empty file cannot be mapped.
        self._bin = _mapped(bin_path(prefix)) if self.bin_bytes else np.empty(0, np.uint8)

    def __len__(self) -> int:
        """Sequences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_index) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    def read(self, sequence: int, start: int = 0, stop: int | None = None) -> Tokens:
        """Tokens [start, stop) of a sequence, in the file's dtype; a view of the mapped file.

        Raises:
            IndexError: `start` and `stop` are not in the sequence.
            WorkError: the index is damaged.
        """
        length = int(self.lengths[sequence])
        if length < 0:
            raise self._damaged(f"sequence {sequence} has {length} tokens")
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise IndexError(f"tokens [{start}, {stop}) of a sequence of {length}")
        if stop == start:
            return np.empty(0, dtype=self.dtype)
        offset = int(self.pointers[sequence]) + start * np.dtype(self.dtype).itemsize
        try:
            return np.frombuffer(self._bin, dtype=self.dtype, count=stop - start, offset=offset)
        except ValueError as problem:
            raise self._damaged(f"sequence {sequence} lies outside the .bin of {self.bin_bytes} bytes") from problem

    def _header(self, index: NDArray[np.uint8] | None) -> tuple[type[np.integer[Any]], int, int]:
        if index is None or index.size < _HEADER.size:
            raise self._damaged("shorter than its header")
        magic, version, code, sequences, documents = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != MAGIC or version != 1:
            raise self._damaged("not an index of Megatron's format, version 1")
        if code not in _DTYPES:
            raise self._damaged(f"dtype code {code} is not one of an integer type")
        if documents < 1:
            raise self._damaged("its document index is empty")
        return _DTYPES[code], sequences, documents

    def _damaged(self, what: str) -> WorkError:
        return WorkError(
            f"{idx_path(self.prefix)} is damaged: {what}",
            where=str(self.prefix),
            cure="write the corpus again with `orthant data tokenize`, or copy it again",
        )


def _mapped(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file, as a plain array: memmap's own class is slow to index."""
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
