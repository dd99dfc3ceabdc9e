"""Merging token files: the bytes of one that was written at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.index_check import check_token_file
from data.indexed import IndexedTokens, IndexedWriter, idx_path, index_bytes
from data.manifest import manifest_path
from data.merge import merge_token_files
from data.sources import find_source
from data.tokenize import Tokenization, tokenize
from data.tokenizer import Tokenizer, load_tokenizer
from data.views import split_by_content
from foundation.errors import RequestError, WorkError
from tests.data.conftest import some_texts, write_jsonl


def write(folder: Path, name: str, texts: list[str], tokenizer: Tokenizer) -> Path:
    source = find_source(str(write_jsonl(folder / f"{name}.jsonl", texts)))
    tokenize(Tokenization((source,), tokenizer, "text", folder / name), lambda _: None)
    return folder / name


@pytest.fixture
def parts(tmp_path: Path, bpe: Tokenizer) -> list[Path]:
    texts = some_texts(300)
    return [write(tmp_path, f"part_{n}", texts[n * 100 : n * 100 + 100], bpe) for n in range(3)]


def test_merged_as_written_at_once(
    tmp_path: Path, bpe: Tokenizer, parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.merge._TOKENS", 97)
    manifest = merge_token_files(parts, tmp_path / "merged")
    whole = write(tmp_path, "whole", some_texts(300), bpe)
    for ending in (".bin", ".idx"):
        assert Path(f"{tmp_path / 'merged'}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    assert check_token_file(tmp_path / "merged") == []
    assert [source.documents for source in manifest.sources] == [100, 100, 100]
    for part in parts:
        assert check_token_file(part) == []


def test_merged_as_core_merges(tmp_path: Path, parts: list[Path], bpe: Tokenizer) -> None:
    """Files without a manifest, in core's way."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=np.uint16)
    for part in parts:
        builder.add_index(str(part))
    builder.finalize(str(tmp_path / "core.idx"))
    for part in parts:
        manifest_path(part).unlink()
    with pytest.raises(RequestError, match="no manifest"):
        merge_token_files(parts, tmp_path / "merged")
    merge_token_files(parts, tmp_path / "merged", bpe)
    for ending in (".bin", ".idx"):
        assert Path(f"{tmp_path / 'merged'}{ending}").read_bytes() == (tmp_path / f"core{ending}").read_bytes()


def test_views_and_documents_of_several_sequences(tmp_path: Path, parts: list[Path], bpe: Tokenizer) -> None:
    split_by_content(parts[0], tmp_path / "kept", tmp_path / "held", 0.3, bpe, lambda _: None)
    with IndexedWriter(tmp_path / "several", bpe.vocab_size) as writer:
        writer.add_tokens(np.array([5, 6, 7, 8, bpe.eod_id]))
        writer.add_index(np.array([2, 2, 1], dtype=np.int32), np.array([2, 0, 1], dtype=np.int32))
        writer.finish(bpe.hash, bpe.eod_id, ())
    merge_token_files([tmp_path / "several", tmp_path / "kept", tmp_path / "held"], tmp_path / "merged")
    merged = IndexedTokens(tmp_path / "merged")
    assert merged.document_index[:4].tolist() == [0, 2, 2, 3]
    files = [IndexedTokens(tmp_path / name) for name in ("several", "kept", "held")]
    expected = [file.read(sequence).tolist() for file in files for sequence in range(len(file))]
    assert [merged.read(sequence).tolist() for sequence in range(len(merged))] == expected
    assert merged.documents == 103


def test_empty_files(tmp_path: Path, bpe: Tokenizer, parts: list[Path]) -> None:
    empty = write(tmp_path, "empty", ["", ""], bpe)
    merge_token_files([empty, parts[0], empty], tmp_path / "merged")
    assert IndexedTokens(tmp_path / "merged").documents == 104
    merge_token_files([empty], tmp_path / "still_empty")
    assert idx_path(tmp_path / "still_empty").read_bytes() == idx_path(empty).read_bytes()


def test_what_does_not_go_together(tmp_path: Path, bpe: Tokenizer, parts: list[Path]) -> None:
    other = write(tmp_path, "other", ["a"], load_tokenizer(bpe.path, "<|endoftext|>"))
    text = manifest_path(other).read_text()
    manifest_path(other).write_text(text.replace(bpe.hash, "0" * 64))
    with pytest.raises(RequestError, match="several tokenizers"):
        merge_token_files([parts[0], other], tmp_path / "merged")
    with pytest.raises(RequestError, match="is among the files to merge"):
        merge_token_files(parts, parts[1])
    with pytest.raises(RequestError, match="is missing"):
        merge_token_files([tmp_path / "nothing"], tmp_path / "merged", bpe)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize(
    ("place", "value", "what"),
    [
        ("lengths", -7, "length of sequence 3 is negative"),
        ("pointers", -8, "sequence 3 lies outside"),
        ("pointers", 2**63 - 2, "sequence 3 lies outside"),
        ("documents", 10**12, "falls at document 3"),
        ("documents", -4, "falls at document 2"),
    ],
)
def test_a_damaged_file_is_not_merged(tmp_path: Path, parts: list[Path], place: str, value: int, what: str) -> None:
    """The result would carry the damage under hashes of its own."""
    file = IndexedTokens(parts[1])
    arrays = {"lengths": file.lengths.copy(), "pointers": file.pointers.copy(), "documents": file.document_index.copy()}
    arrays[place][3] = value
    index = index_bytes(np.uint16, arrays["lengths"], arrays["pointers"], arrays["documents"])
    idx_path(parts[1]).write_bytes(index)
    with pytest.raises(WorkError, match=what):
        merge_token_files(parts, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_an_index_that_ends_early_is_not_merged(tmp_path: Path, parts: list[Path]) -> None:
    file = IndexedTokens(parts[1])
    documents = file.document_index.copy()
    documents[-1] -= 1
    idx_path(parts[1]).write_bytes(index_bytes(np.uint16, file.lengths, file.pointers, documents))
    with pytest.raises(WorkError, match="document index: ends at"):
        merge_token_files(parts, tmp_path / "merged")
