"""How sources are cut into shards, and which of them count as finished; whole tokenisations are in test_tokenize.py."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from data.indexed import bin_path, idx_path
from data.manifest import Manifest, manifest_path
from data.shards import (
    SHARD_BYTES,
    PieceHash,
    Shard,
    ShardRecord,
    Workshop,
    cut,
    identity_of,
    open_workshop,
    refuse_changed,
)
from data.sources import Source, SourceFile, find_source
from foundation.errors import WorkError

RECORD = ShardRecord("reference", (3, 1), 2, 1, (("a.jsonl", 4, "not JSON"),), 7, (PieceHash("a.jsonl", 0, 9, "ab"),))


def source_of(folder: Path, **sizes: int) -> Source:
    folder.mkdir()
    for name, size in sizes.items():
        (folder / name.replace("_", ".", 1).replace("_", ".")).write_bytes(b"x" * size)
    return find_source(str(folder))


def ranges(shards: tuple[Shard, ...]) -> list[list[tuple[str, int, int | None]]]:
    return [[(file.path.name, file.begin, file.end) for file in shard.files] for shard in shards]


def test_files_are_put_together_up_to_the_size_of_a_shard(tmp_path: Path) -> None:
    one, two = source_of(tmp_path / "one", a_txt=10, b_txt=15, c_txt=30, d_txt=5), source_of(tmp_path / "two", e_txt=1)
    shards = cut((one, two), 25)
    assert [[name for name, _, _ in files] for files in ranges(shards)] == [["a.txt", "b.txt"], ["c.txt"], ["d.txt"],
                                                                           ["e.txt"]]  # fmt: skip
    assert [(shard.number, shard.source, shard.byte_count()) for shard in shards] == [(0, 0, 25), (1, 0, 30), (2, 0, 5),
                                                                                     (3, 1, 1)]  # fmt: skip
    full = source_of(tmp_path / "full", a_txt=20, b_txt=10, c_txt=15)
    assert [len(files) for files in ranges(cut((full,), 25))] == [1, 2], "the next one begins with nothing"
    assert len(cut((one, two))) == 2 and SHARD_BYTES == 256 * 1024**2
    assert cut((Source("nothing"),)) == ()


def test_a_plain_jsonl_alone_is_cut(tmp_path: Path) -> None:
    source = source_of(tmp_path / "one", a_jsonl=60, b_jsonl=25, c_jsonl_gz=60)
    assert ranges(cut((source,), 25)) == [[("a.jsonl", 0, 25)], [("a.jsonl", 25, 50)], [("a.jsonl", 50, 60)],
                                          [("b.jsonl", 0, None)], [("c.jsonl.gz", 0, None)]]  # fmt: skip
    assert ranges(cut((source,), 35))[1] == [("a.jsonl", 35, 60)]


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(
        tmp_path / "out" / "corpus", ("train", "valid"), cut((source_of(tmp_path / "s", a_txt=4),)), "x"
    )


SHARD = Shard(3, 0, ())


def finish(workshop: Workshop, record: ShardRecord = RECORD) -> None:
    for prefix in workshop.prefixes(SHARD):
        bin_path(prefix).write_bytes(b"1234")
        idx_path(prefix).write_bytes(b"")
        manifest_path(prefix).write_text(Manifest(1, 1, 2, "uint16", 9, 0, "", 0.0, 4, "", "").to_json())
    workshop.keep(SHARD, record)


def test_a_record_comes_back_where_its_token_files_are_whole(workshop: Workshop) -> None:
    assert workshop.finished(SHARD) is None
    finish(workshop)
    assert workshop.finished(SHARD) == RECORD
    assert [path.name for path in workshop.prefixes(SHARD)] == ["000003.train", "000003.valid"]
    assert [tuple(bad) for bad in RECORD.bad_after(10)] == [(Path("a.jsonl"), 14, "not JSON")]
    last = workshop.prefixes(SHARD)[1]
    for path, damage in ((bin_path(last), b"12345"), (manifest_path(last), b"{"), (bin_path(last), None),
                         (idx_path(last), None), (manifest_path(last), None)):  # fmt: skip
        path.unlink() if damage is None else path.write_bytes(damage)
        assert workshop.finished(SHARD) is None, path
        finish(workshop)


@pytest.mark.parametrize("text", ["{", "{}", "[]", "5", '{"pieces": [{"size": 1}]}', '{"pieces": [], "bad": [1]}'])
def test_a_damaged_record_is_none(workshop: Workshop, text: str) -> None:
    finish(workshop)
    (workshop.folder / "000003.json").write_text(text)
    assert workshop.finished(SHARD) is None


def test_what_a_distrusted_encoder_wrote_is_done_again(workshop: Workshop) -> None:
    finish(workshop, replace(RECORD, encoder="fast"))
    assert workshop.finished(SHARD) is not None and not workshop.distrusted()
    workshop.distrust()
    assert workshop.distrusted() and workshop.finished(SHARD) is None
    finish(workshop)
    assert workshop.finished(SHARD) == RECORD


def test_one_at_a_time_works_on_a_shard(workshop: Workshop) -> None:
    def taken() -> bool:
        with open(workshop.folder / "000003.lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    with workshop.locked(SHARD):
        assert taken()
    assert not taken()


def test_a_workshop_is_that_of_its_sources_and_settings(tmp_path: Path) -> None:
    shards = cut((source_of(tmp_path / "s", a_txt=4),))

    def folder(names: tuple[str, ...] = ("train",), settings: str = "x") -> Path:
        return open_workshop(tmp_path / "out" / "corpus", names, shards, settings).folder

    first = folder()
    assert first.parent == tmp_path / "out" / ".corpus.parts" and len(first.name) == 16 and first == folder()
    with mock.patch("data.shards._VERSION", 1):
        assert first == folder(), "another version would throw away what is kept"
    assert len({first, folder(names=("train", "valid")), folder(settings="y")}) == 3
    (tmp_path / "s" / "a.txt").write_text("more")
    changed = folder()
    assert changed != first
    open_workshop(tmp_path / "out" / "corpus", ("train",), shards, "x").remove()
    assert not first.parent.exists()
    Workshop(first, ("train",)).remove()  # gone already


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    (file,) = source_of(tmp_path / "s", a_txt=4).files
    before = [identity_of(file)]
    refuse_changed([file], before)
    (tmp_path / "s" / "a.txt").write_text("longer")
    with pytest.raises(WorkError, match="changed while it was read"):
        refuse_changed([file], before)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        refuse_changed([], before)
    assert SourceFile(tmp_path / "s" / "a.txt", "text").byte_count() == 6
