"""Token files: core's bytes, whole or not at all, and damage found."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.index_check import check_token_file
from data.indexed import IndexedTokens, IndexedWriter, bin_path, entropy, idx_path
from data.manifest import Manifest, manifest_path, read_manifest
from foundation.errors import RequestError, WorkError

LENGTHS = [3, 0, 1, 700, 0, 0, 12, 0]
EOD = 7


def some_tokens(vocab_size: int) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(0, vocab_size, sum(LENGTHS), dtype=np.int32)
    tokens[np.cumsum(LENGTHS) - 1] = EOD
    return tokens


def write(prefix: Path, vocab_size: int = 100) -> Manifest:
    tokens = some_tokens(vocab_size)
    with IndexedWriter(prefix, vocab_size) as writer:
        writer.add(tokens[:4], LENGTHS[:3])
        writer.add(tokens[:0], [])
        writer.add(tokens[4:], LENGTHS[3:])
        return writer.finish("abc", EOD, [])


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 200_000])
def test_the_bytes_are_those_of_core(tmp_path: Path, vocab_size: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=DType.optimal_dtype(vocab_size))
    begin = 0
    for length in LENGTHS:
        if length:
            builder.add_item(torch.from_numpy(some_tokens(vocab_size)[begin : begin + length]))
        builder.end_document()
        begin += length
    builder.finalize(str(tmp_path / "core.idx"))

    manifest = write(tmp_path / "ours.v1", vocab_size)
    assert bin_path(tmp_path / "ours.v1").read_bytes() == (tmp_path / "core.bin").read_bytes()
    assert idx_path(tmp_path / "ours.v1").read_bytes() == (tmp_path / "core.idx").read_bytes()
    assert manifest.dtype == ("uint16" if vocab_size < 65500 else "int32")

    theirs, ours = IndexedDataset(str(tmp_path / "ours.v1")), IndexedTokens(tmp_path / "core")
    assert len(theirs) == len(ours) == 4
    assert theirs.document_indices.tolist() == ours.document_index.tolist() == [0, 1, 1, 2, 3, 3, 3, 4, 4]
    for sequence in range(4):
        assert ours.read(sequence).dtype == theirs[sequence].dtype
        assert ours.read(sequence).tolist() == theirs[sequence].tolist()
    assert ours.read(2, 5, 9).tolist() == theirs.get(2, 5, 4).tolist()


def test_the_manifest_says_what_is_there(tmp_path: Path) -> None:
    manifest = write(tmp_path / "t")
    tokens = some_tokens(100)
    assert read_manifest(tmp_path / "t") == manifest
    assert (manifest.documents, manifest.sequences, manifest.tokens) == (8, 4, 716)
    assert manifest.bin_sha256 == hashlib.sha256((tmp_path / "t.bin").read_bytes()).hexdigest()
    shares = np.bincount(tokens)[np.bincount(tokens) > 0] / len(tokens)
    assert manifest.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)
    assert entropy(np.array([0, 5])) == 0.0 == entropy(np.zeros(3, dtype=np.int64))
    assert check_token_file(tmp_path / "t") == []


def test_only_empty_documents(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", 100) as writer:
        writer.add(np.empty(0, dtype=np.int32), [0, 0])
        writer.finish("abc", EOD, [])
    file = IndexedTokens(tmp_path / "t")
    assert (file.documents, len(file), file.tokens) == (2, 0, 0)
    assert check_token_file(tmp_path / "t") == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="outside the vocabulary"), IndexedWriter(tmp_path / "t", 100) as writer:
        writer.add(np.array([1, 2]), [2])
        writer.add(np.array([100]), [1])
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_prefix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", 100) as first:
        with pytest.raises(WorkError, match="another process"):
            IndexedWriter(tmp_path / "t", 100)
        first.add(np.array([1, EOD]), [2])
        first.finish("abc", EOD, [])
    write(tmp_path / "t")  # over the finished one
    assert check_token_file(tmp_path / "t") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx", "t.json"]


def test_killed_while_replacing_an_older_file(tmp_path: Path) -> None:
    """The new .bin never stands beside the old .idx."""
    write(tmp_path / "t")
    code = f"""
import os, signal, numpy, data.indexed
from pathlib import Path
data.indexed.write_text = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with data.indexed.IndexedWriter(Path({str(tmp_path / "t")!r}), 100) as writer:
    writer.add(numpy.array([5, {EOD}]), [2])
    writer.finish("abc", {EOD}, [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "t.bin").stat().st_size == 4
    with pytest.raises(RequestError, match=r"t\.idx is missing"):
        IndexedTokens(tmp_path / "t")


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def resign(prefix: Path) -> None:
    """Make the manifest's hashes those of the files, so that only the deeper checks can find the damage."""
    values = json.loads(manifest_path(prefix).read_text())
    for key, path in (("bin_sha256", bin_path(prefix)), ("idx_sha256", idx_path(prefix))):
        values[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest_path(prefix).write_text(json.dumps(values))


POINTERS, DOCUMENTS = 34 + 4 * 4, 34 + 12 * 4
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "some tokens": (lambda t: patch(bin_path(t), 20, b"\x01\x00" * 9), "unigram_entropy"),
    "a token outside": (lambda t: patch(bin_path(t), 20, b"\xff\xff"), "token 65535 at 10 is outside"),
    "an end of document": (lambda t: patch(bin_path(t), 4, b"\x02\x00"), "sequence 0 does not end"),
    "a cut bin": (lambda t: bin_path(t).write_bytes(bin_path(t).read_bytes()[:-2]), "lies outside"),
    "a longer bin": (lambda t: bin_path(t).write_bytes(bin_path(t).read_bytes() + b"\0\0"), "add up to 1432 bytes"),
    "a length": (lambda t: patch(idx_path(t), 34, b"\x04"), "pointer of sequence 1"),
    "a length below 0": (lambda t: patch(idx_path(t), 37, b"\x80"), "length of sequence 0 is negative"),
    "a pointer": (lambda t: patch(idx_path(t), POINTERS + 8, b"\x08"), "pointer of sequence 1 is 8"),
    "the document index": (lambda t: patch(idx_path(t), DOCUMENTS + 8, b"\x03"), "falls at document 1"),
    "its end": (lambda t: patch(idx_path(t), DOCUMENTS + 64, b"\x03"), "ends at 3"),
    "its start": (lambda t: patch(idx_path(t), DOCUMENTS, b"\x01"), "starts at 1"),
    "the magic": (lambda t: patch(idx_path(t), 0, b"X"), "not an index"),
    "the dtype": (lambda t: patch(idx_path(t), 17, b"\x03"), "dtype"),
    "a cut idx": (lambda t: idx_path(t).write_bytes(idx_path(t).read_bytes()[:-1]), "header promises"),
    "an empty idx": (lambda t: idx_path(t).write_bytes(b""), "shorter than its header"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    damage, expected = DAMAGES[name]
    write(tmp_path / "t")
    damage(tmp_path / "t")
    assert any("sha256" in line for line in check_token_file(tmp_path / "t"))
    resign(tmp_path / "t")
    found = check_token_file(tmp_path / "t")
    assert any(expected in line for line in found), found


def test_a_sequence_of_less_than_nothing_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "t")
    patch(idx_path(tmp_path / "t"), 37, b"\x80")
    with pytest.raises(WorkError, match=r"t\.idx is damaged: sequence 0 has -"):
        IndexedTokens(tmp_path / "t").read(0)


def test_a_manifest_that_lies(tmp_path: Path) -> None:
    write(tmp_path / "t")
    path = manifest_path(tmp_path / "t")
    path.write_text(path.read_text().replace('"documents": 8', '"documents": 9'))
    assert check_token_file(tmp_path / "t") == ["documents: 8 in the files, 9 in the manifest"]
    path.write_text("{")
    assert "not a manifest" in check_token_file(tmp_path / "t")[0]


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("vocab_size", "100", 'vocab_size is "100", not int'),
        ("vocab_size", -5, "vocab_size is -5"),
        ("vocab_size", 10**15, "vocab_size is 1000000000000000"),
        ("vocab_size", True, "vocab_size is true, not int"),
        ("bin_sha256", None, "bin_sha256 is null, not str"),
        ("unigram_entropy", "q", 'unigram_entropy is "q", not float'),
        ("sources", [{"name": "a", "documents": "z", "bad_lines": 0}], 'documents is "z", not int'),
    ],
)
def test_an_edited_manifest_is_a_difference(tmp_path: Path, key: str, value: object, what: str) -> None:
    write(tmp_path / "t")
    path = manifest_path(tmp_path / "t")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    (found,) = check_token_file(tmp_path / "t")
    assert f"not a manifest of a token file ({what})" in found


@pytest.mark.parametrize("ending", ["bin", "idx", "json"])
def test_a_missing_file_is_named(tmp_path: Path, ending: str) -> None:
    write(tmp_path / "t")
    (tmp_path / f"t.{ending}").unlink()
    with pytest.raises(RequestError, match=rf"t\.{ending} is missing"):
        check_token_file(tmp_path / "t")
    if ending != "json":
        with pytest.raises(RequestError, match=rf"t\.{ending} is missing"):
            IndexedTokens(tmp_path / "t")
