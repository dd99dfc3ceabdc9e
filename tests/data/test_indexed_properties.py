"""Token files of any documents: what goes in comes out, merging is concatenation, no damage passes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.index_check import check_token_file
from data.indexed import IndexedTokens, IndexedWriter, bin_path, idx_path
from data.manifest import manifest_path
from data.merge import merge_token_files
from data.order import SampleOrder
from foundation.errors import OrthantError

VOCABULARIES = st.sampled_from([2, 256, 65499, 65500, 200_000])
EOD = 1
Documents = list[list[int]]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[Documents]]:
    """A vocabulary, and up to four files of documents: empty files, empty documents, its first and last entries."""
    vocab_size = draw(VOCABULARIES)
    token = st.sampled_from([0, 1, vocab_size - 1]) | st.integers(0, vocab_size - 1)
    document = st.just([]) | st.lists(token, max_size=6).map(lambda tokens: [*tokens, EOD])
    return vocab_size, draw(st.lists(st.lists(document, max_size=6), min_size=1, max_size=4))


def write(prefix: Path, vocab_size: int, documents: Documents, calls: int = 1) -> None:
    """A token file of `documents`, told to the writer in `calls` pieces."""
    step = -(-max(1, len(documents)) // calls)
    with IndexedWriter(prefix, vocab_size) as writer:
        for first in range(0, len(documents), step):
            some = documents[first : first + step]
            tokens = np.array([token for document in some for token in document], dtype=np.int64)
            writer.add(tokens, [len(document) for document in some])
        writer.finish("abc", EOD, ())


def read(prefix: Path) -> Documents:
    """All documents of a token file."""
    file = IndexedTokens(prefix)
    edges = file.document_index.tolist()
    return [
        [token for sequence in range(first, last) for token in file.read(sequence).tolist()]
        for first, last in pairwise(edges)
    ]


@given(corpora(), st.integers(1, 3))
def test_documents_come_back_and_merging_is_concatenation(corpus: tuple[int, list[Documents]], calls: int) -> None:
    vocab_size, files = corpus
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prefixes = [folder / f"part.{number}" for number in range(len(files))]
        for prefix, documents in zip(prefixes, files, strict=True):
            write(prefix, vocab_size, documents, calls)
            assert read(prefix) == documents
            assert check_token_file(prefix) == []
            assert bin_path(prefix).stat().st_size == sum(map(len, documents)) * (2 if vocab_size < 65500 else 4)
        whole = [document for documents in files for document in documents]
        write(folder / "whole", vocab_size, whole)
        merge_token_files(prefixes, folder / "merged")
        assert check_token_file(folder / "merged") == []
        for path in (bin_path, idx_path):
            assert path(folder / "merged").read_bytes() == path(folder / "whole").read_bytes()


@given(corpora(), st.sampled_from([bin_path, idx_path, manifest_path]), st.data())
def test_damage_is_refused(
    corpus: tuple[int, list[Documents]], path_of: Callable[[Path], Path], data: st.DataObject
) -> None:
    """A bit turned, bytes lost or bytes added, anywhere: it is told, and reading ends with a message or not at all."""
    vocab_size, files = corpus
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "t"
        write(prefix, vocab_size, files[0])
        path = path_of(prefix)
        content = bytearray(path.read_bytes())
        kind = data.draw(st.sampled_from(["turn", "cut", "add"] if content else ["add"]))
        if kind == "turn":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        else:
            content += data.draw(st.binary(min_size=1, max_size=9))
        path.write_bytes(bytes(content))
        try:
            told = check_token_file(prefix)
        except OrthantError:
            return
        if path_of is not manifest_path:
            assert told
        with contextlib.suppress(OrthantError):
            file = IndexedTokens(prefix)
            for sequence in range(len(file)):
                file.read(sequence)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    st.integers(1, 16),
    st.integers(0, 1 << 40),
)
def test_an_epoch_reads_its_tokens_once(lengths: list[int], seq_length: int, seed: int) -> None:
    sizes = np.array(lengths, dtype=np.int32)
    if sum(lengths) - 1 < seq_length:
        return
    order = SampleOrder(sizes, seq_length, seed)
    starts = [0, *accumulate(lengths)]
    inputs = []
    for k in range(order.samples_per_epoch):
        pieces = order.pieces(k)
        assert all(0 <= piece.start < piece.stop <= lengths[piece.sequence] for piece in pieces)
        places = [starts[piece.sequence] + at for piece in pieces for at in range(piece.start, piece.stop)]
        assert len(places) == seq_length + 1
        inputs += places[:-1]
    assert len(set(inputs)) == len(inputs) == order.samples_per_epoch * seq_length
