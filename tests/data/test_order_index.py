"""Epochs on disk change nothing but who computes them; a rewritten token file never meets an old one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from data.config import DataConfig, TokenizerConfig
from data.data_plan import PLAN, plan_data, read_plan
from data.fingerprints import ContentHashes, token_file_content
from data.indexed import IndexedWriter, bin_path
from data.manifest import manifest_path
from data.order import SampleOrder
from data.order_index import OrderIndex, _dtype, _width
from data.prepare import prepare
from data.prepared import PreparedData
from data.samples import open_samples
from data.sources import find_source
from data.tokenize import Tokenization, tokenize
from data.tokenizer import Tokenizer
from foundation.errors import WorkError
from tests.data.conftest import Lines, some_texts, write_jsonl

LENGTHS = np.array([5, 0, 17, 1, 40, 3, 3, 90, 0, 11], dtype=np.int32)  # 170 tokens
SEQ = 16


def test_mapped_epochs_are_the_computed_ones(tmp_path: Path) -> None:
    index = OrderIndex(tmp_path, "abc", SEQ, 3, 1)
    computed, mapped = SampleOrder(LENGTHS, SEQ, 3, 1), SampleOrder(LENGTHS, SEQ, 3, 1, index)
    assert [mapped.write_epoch(epoch) for epoch in (0, 1, 0)] == [True, True, False]
    assert isinstance(mapped._epoch(1).sequences, np.ndarray) and mapped._epoch(1).sequences.dtype == np.uint32
    assert mapped._epoch(1) is mapped._epoch(1), "mapped once"
    for k in range(30):  # epoch 2 is not on disk
        assert mapped.pieces(k) == computed.pieces(k)
    assert sorted(path.name for path in tmp_path.iterdir()) == [index.path(0).name, index.path(1).name]


@pytest.mark.parametrize("wide", [10, 21])
def test_sequences_and_samples_have_widths_of_their_own(tmp_path: Path, wide: int) -> None:
    """As where one of them is more than four bytes can number."""
    index = OrderIndex(tmp_path, "abc", 8, 3, 1)
    with mock.patch("data.order_index._width", lambda count: 8 if count == wide else 4):
        order = SampleOrder(LENGTHS, 8, 3, 1, index)
        order.write_epoch(0)
        read, computed = index.read(0, 10, 21), order._computed(0)
    assert read is not None
    for name in ("sequences", "offsets", "samples"):
        assert getattr(read, name).tolist() == getattr(computed, name).tolist(), name
    assert read.sequences.itemsize == (8 if wide == 10 else 4) and read.samples.itemsize == (8 if wide == 21 else 4)


@pytest.mark.parametrize("change", [{"content": "abd"}, {"seq_length": 8}, {"seed": 4}, {"number": 0}])
def test_whatever_decides_the_order_is_in_the_name(tmp_path: Path, change: dict[str, object]) -> None:
    values = {"content": "abc", "seq_length": SEQ, "seed": 3, "number": 1}
    assert OrderIndex(tmp_path, **values).path(0) != OrderIndex(tmp_path, **{**values, **change}).path(0)


def test_the_file_is_as_it_always_was(tmp_path: Path) -> None:
    """Another reading of an older file would be another order."""
    index = OrderIndex(tmp_path, "abc", SEQ, 3, 1)
    order = SampleOrder(LENGTHS, SEQ, 3, 1, index)
    order.write_epoch(0)
    epoch = order._computed(0)
    header = b"ORTHORD1" + (10).to_bytes(8, "little") * 2 + b"\x04\x04" + bytes(6)
    arrays = (epoch.offsets.astype("<i8"), epoch.sequences.astype("<u4"), epoch.samples.astype("<u4"))
    assert index.path(0).read_bytes() == header + b"".join(array.tobytes() for array in arrays)
    assert index.path(0).name == "0e6293d3db81672f681b03a6-0.order"
    assert (_width(2**32), _width(2**32 + 1)) == (4, 8) and (_dtype(4), _dtype(8)) == (np.uint32, np.uint64)


def test_a_damaged_epoch_is_refused(tmp_path: Path) -> None:
    index = OrderIndex(tmp_path, "abc", SEQ, 3, 1)
    order = SampleOrder(LENGTHS, SEQ, 3, 1, index)
    order.write_epoch(0)
    whole = index.path(0).read_bytes()
    for damaged in (whole[:-1], whole + b"x", b"x" + whole[1:], whole[:10]):
        index.path(0).write_bytes(damaged)
        with pytest.raises(WorkError, match="is damaged"):
            SampleOrder(LENGTHS, SEQ, 3, 1, index).pieces(0)


def section(path: Path, tokenizer: Tokenizer) -> DataConfig:
    return DataConfig(sources=(str(path),), tokenizer=TokenizerConfig(path=tokenizer.path), validation_fraction=0.1)


def rows(prepared: PreparedData, config: DataConfig, numbers: range) -> list[list[int]]:
    samples = open_samples(prepared, config, 32, 7, "train")
    return [samples[k].tokens.tolist() for k in numbers]


def test_a_longer_schedule_goes_on_with_the_planned_order(
    tmp_path: Path, bpe: Tokenizer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.samples._WORTH_A_FILE", 0)
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(200))
    config = section(path, bpe)
    prepared = prepare(config, tmp_path / "data", 32, lines)

    def plan(steps: int) -> object:
        return plan_data(prepared, config, 32, 8, 7, steps, tmp_path, lines)

    plan(10)
    first = read_plan(tmp_path)
    assert first is not None and first.samples == 80
    files = sorted(Path(prepared.index_folder).glob("*.order"))
    assert len(files) == 1
    before = rows(prepared, config, range(80))
    plan(400)  # several epochs
    longer = read_plan(tmp_path)
    assert longer is not None and longer.samples == 3200 and longer.sources[0].epochs > 2
    assert len(sorted(Path(prepared.index_folder).glob("*.order"))) == -(-3202 // longer.sources[0].samples_per_epoch)
    assert rows(prepared, config, range(80)) == before
    computed = rows(PreparedData(**{**vars(prepared), "index_folder": str(tmp_path / "none")}), config, range(3200))
    assert rows(prepared, config, range(3200)) == computed
    plan(10)  # a shorter run forgets nothing
    assert read_plan(tmp_path) == longer
    assert (tmp_path / PLAN).is_file()


def test_a_rewritten_bin_is_never_served_from_what_was_prepared(tmp_path: Path, bpe: Tokenizer, lines: Lines) -> None:
    """Same path, size and time; other tokens."""
    source = find_source(str(write_jsonl(tmp_path / "a.jsonl", some_texts(200))))
    tokenize(Tokenization((source,), bpe, "text", tmp_path / "t"), lines)
    config = section(tmp_path / "t", bpe)
    prepared = prepare(config, tmp_path / "data", 32, lines)
    before = rows(prepared, config, range(20))

    path = bin_path(tmp_path / "t")
    stat = path.stat()
    time.sleep(0.02)
    tokens = np.fromfile(path, dtype=np.uint16)
    swapped = np.where(tokens == 276, 299, np.where(tokens == 299, 276, tokens)).astype(np.uint16)
    path.write_bytes(swapped.tobytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(WorkError, match="is not what its manifest says"):
        prepare(config, tmp_path / "data", 32, lines)

    manifest_path(tmp_path / "t").unlink()  # as if another tool had written it
    again = prepare(config, tmp_path / "data", 32, lines)
    assert again.train_contents != prepared.train_contents and again.index_folder != prepared.index_folder
    after = rows(again, config, range(20))
    assert any(276 in row for row in before) and after != before


def test_what_we_prepared_ourselves_and_someone_rewrote_is_made_again(
    tmp_path: Path, bpe: Tokenizer, lines: Lines
) -> None:
    config = section(write_jsonl(tmp_path / "a.jsonl", some_texts(200)), bpe)
    prepared = prepare(config, tmp_path / "data", 32, lines)
    path = bin_path(prepared.train_prefixes[0])
    whole = path.read_bytes()
    time.sleep(0.02)
    path.write_bytes(bytes(len(whole)))
    assert prepare(config, tmp_path / "data", 32, lines) == prepared
    assert path.read_bytes() == whole


def test_a_manifest_is_believed_only_where_nobody_touched_the_bin(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", 100) as writer:
        writer.add(np.array([1, 2, 3]), [3])
        writer.finish("abc", 3, ())
    hashes = ContentHashes(tmp_path / "hashes.json")
    content = token_file_content(tmp_path / "t", hashes)
    assert content == token_file_content(tmp_path / "t", hashes)
    bin_path(tmp_path / "t").touch()  # the same bytes are the same
    assert content == token_file_content(tmp_path / "t", hashes)
    manifest_path(tmp_path / "t").unlink()
    assert content == token_file_content(tmp_path / "t", hashes)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"format": "orthant.data_plan.1"}', '{"format": "orthant.data_plan.1", "sources": 3}']
)
def test_a_damaged_plan_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / PLAN).write_text(text)
    with pytest.raises(WorkError, match="not a plan of a run's data"):
        read_plan(tmp_path)
