"""Reading documents: every kind of file, and what is not a document counted and listed."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from data.documents import Reading, read_documents
from data.sources import Source, SourceFile, find_source
from foundation.errors import ConfigError, RequestError, WorkError
from tests.ranks.processes import REPOSITORY

TEXTS = ["first", "two\nlines \u2581 é 😀", "", "last"]
LINES = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS).encode()


def read(path: Path, key: str = "text") -> tuple[list[tuple[str, int]], Reading]:
    reading = Reading(find_source(str(path)))
    return [(document.text, document.line) for document in read_documents(reading, key)], reading


def compress(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".zst"):  # two frames, as parallel compressors write
        half = len(data) // 2
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(compress(name, b"\xef\xbb\xbf" + LINES + b"\n \n" + LINES.rstrip()))
    found, reading = read(tmp_path / name)
    assert [text for text, _ in found] == TEXTS * 2
    assert [line for _, line in found] == [1, 2, 3, 4, 7, 8, 9, 10]
    assert (reading.documents, reading.blank_lines, reading.bad_lines) == (8, 2, 0)
    assert reading.bytes_read == (tmp_path / name).stat().st_size


def test_bad_lines_are_counted_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b'{"text": "cut', b"[1]", b'{"body": "x"}', b'{"text": null}', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    path.write_bytes(b"\n".join([LINES.rstrip(), *bad, b'{"text": "good"}']))
    found, reading = read(path)
    assert [text for text, _ in found] == [*TEXTS, "good"]
    assert reading.bad_lines == len(bad)
    assert [line.line for line in reading.bad] == [5, 6, 7, 8, 9, 10]
    assert all(line.file == path for line in reading.bad)
    assert "keys here: body" in reading.bad[2].why


def test_no_document_at_all_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "x"}\n' * 3)
    with pytest.raises(RequestError, match=r"(?s)3 bad lines.*a\.jsonl:1.*keys here: body"):
        read(path)
    assert [text for text, _ in read(path, "body")[0]] == ["x"] * 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
def test_parts_of_a_file_are_its_lines(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file is cut, each line is read once, by the part in which it begins."""
    monkeypatch.setattr("data.documents._CHUNK", 5)
    data = b"\xef\xbb\xbf" + LINES + b"\n\nbad\n" + LINES.rstrip()
    (tmp_path / "a.jsonl").write_bytes(data)
    whole, all_of_it = read(tmp_path / "a.jsonl")
    texts: list[str] = []
    lines = bad = 0
    for begin in range(0, len(data), size):
        part = SourceFile(tmp_path / "a.jsonl", "jsonl", begin, min(begin + size, len(data)))
        reading = Reading(Source("part", (part,)))
        texts += [document.text for document in read_documents(reading, "text", may_be_empty=True)]
        assert reading.bytes_read == part.byte_count()
        lines += reading.lines
        bad += reading.bad_lines
    assert texts == [text for text, _ in whole]
    assert (lines, bad) == (all_of_it.lines, 1)


def test_text_is_split_on_form_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\n\n\nstill one\x1e\u2028\r\n\ftwo\n\f \n\fthree".encode() + b"\f\xff\f")
    found, reading = read(path)
    assert found == [("one\n\n\nstill one\x1e\u2028\r\n", 1), ("two\n", 5), ("three", 7)]
    assert [(bad.line, "UTF-8" in bad.why) for bad in reading.bad] == [(7, True)]


def test_parquet_and_saved_datasets(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["first", None, "", "last"], "other": [1, 2, 3, 4]})
    odd = tmp_path / "odd [1]*.parquet"  # `datasets` would take this for a pattern
    rows.to_parquet(str(odd))
    rows.save_to_disk(str(tmp_path / "saved"))
    for path in (odd, tmp_path / "saved"):
        found, reading = read(path)
        assert found == [("first", 1), ("", 3), ("last", 4)]
        assert [(bad.line, bad.why) for bad in reading.bad] == [(2, "'text' holds NoneType, not a string")]
        with pytest.raises(RequestError, match=r"(?s)no column 'body'.*text, other"):
            read(path, "body")
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ConfigError, match=r"several splits: test, train"):
        find_source(str(tmp_path / "splits"))
    assert len(read(tmp_path / "splits" / "train")[0]) == 3


READ = """
import sys
from data.documents import Reading, read_documents
from data.sources import find_source
for name in sys.argv[1:]:
    print([document.text for document in read_documents(Reading(find_source(name)), "text")])
"""


def test_no_home_folder_is_needed(tmp_path: Path) -> None:
    """Accounts of services and jobs may have none that can be written; `datasets` keeps its caches there."""
    from datasets import Dataset

    rows = Dataset.from_dict({"text": ["first", "last"]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "a.parquet"), str(tmp_path / "saved")],
        env=environment | {"HOME": "/dev/null/nobody", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "['first', 'last']\n" * 2, done.stderr


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_cut_file_is_not_taken_for_a_short_one(tmp_path: Path, name: str) -> None:
    whole = compress(name, LINES * 100)
    (tmp_path / name).write_bytes(whole[:-5])
    with pytest.raises(WorkError, match=name):
        read(tmp_path / name)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no parquet file PAR1")
    with pytest.raises(WorkError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")


def test_parquet_files_without_rows(tmp_path: Path) -> None:
    """The last file of a sharded table often is one, and a row group may be empty."""
    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"text": ["first", "last"]})
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(rows.slice(0, 0), tmp_path / "folder" / "a.parquet")
    with pytest.raises(RequestError, match="holds no document"):
        read(tmp_path / "folder" / "a.parquet")
    with pyarrow.parquet.ParquetWriter(tmp_path / "folder" / "b.parquet", rows.schema) as writer:
        for table in (rows.slice(0, 0), rows):
            writer.write_table(table)
    assert [text for text, _ in read(tmp_path / "folder")[0]] == ["first", "last"]
