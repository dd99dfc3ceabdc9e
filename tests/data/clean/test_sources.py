"""Every kind of source is cleaned, whole or in pieces, with its other columns."""

from __future__ import annotations

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.clean.pipeline import clean
from data.clean.settings import CleanSettings
from data.sources import find_source
from foundation.errors import RequestError, WorkError
from tests.data.clean.cases import documents, result, run, write_lines

PLAIN = CleanSettings(rules=None)
ROWS = 250


def table() -> pa.Table:
    return pa.table(
        {
            "text": [None if n % 50 == 7 else f"document {n} \u00e9" for n in range(ROWS)],
            "n": list(range(ROWS)),
            "when": [datetime.date(2026, 1, 1)] * ROWS,
            "tags": [["a", "b"]] * ROWS,
            "image": [b"\xff\x00"] * ROWS,
        }
    )


@pytest.mark.parametrize("shard_bytes", [1 << 20, 700])
def test_parquet(tmp_path: Path, shard_bytes: int) -> None:
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=40)
    summary = run(tmp_path / "a.parquet", tmp_path / "out", CleanSettings(rules=None, shard_bytes=shard_bytes))
    found = documents(tmp_path / "out")
    assert [row["n"] for row in found] == [n for n in range(ROWS) if n % 50 != 7]
    assert found[1] == {"text": "document 1 \u00e9", "n": 1, "when": "2026-01-01", "tags": ["a", "b"]}
    assert summary.columns_left_out == ["image"] and "image" in "\n".join(summary.lines())
    assert summary.bad_lines == 5 and summary.first_bad_line is not None
    assert summary.first_bad_line.endswith("a.parquet:8: 'text' holds NoneType, not a string")
    lines = (tmp_path / "out" / "bad_lines.ndjson").read_text().splitlines()
    assert ['"line":58' in lines[1], '"line":208' in lines[-1]] == [True, True]
    assert (shard_bytes == 700) == (len(list((tmp_path / "out").glob("documents-*"))) > 1)


@pytest.mark.parametrize("shard_bytes", [1 << 20, 700])
def test_saved_dataset(tmp_path: Path, shard_bytes: int) -> None:
    from datasets import Dataset

    Dataset(table()).select(range(10, ROWS)).save_to_disk(str(tmp_path / "saved"))
    run(tmp_path / "saved", tmp_path / "out", CleanSettings(rules=None, shard_bytes=shard_bytes))
    assert [row["n"] for row in documents(tmp_path / "out")] == [n for n in range(10, ROWS) if n % 50 != 7]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_bytes(b"one\n\ftwo\f \f\xff")
    (tmp_path / "src" / "b.txt").write_text("three")
    summary = run(tmp_path / "src", tmp_path / "out", PLAIN)
    assert [(row["text"], Path(row["file"]).name) for row in documents(tmp_path / "out")] == [
        ("one", "a.txt"),
        ("two", "a.txt"),
        ("three", "b.txt"),
    ]
    assert (summary.bad_lines, summary.blank_lines) == (1, 1)


def test_zstandard_and_a_changed_text(tmp_path: Path) -> None:
    line = b'{"id": 12345678901234567890123, "text": "a\\r\\nb"}\n{"id": 2, "text": "as it is",  "x":1.0}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line))
    run(tmp_path / "a.jsonl.zst", tmp_path / "out", PLAIN)
    written = next((tmp_path / "out").glob("documents-*")).read_bytes().splitlines()
    assert written[0] == b'{"id": 12345678901234567890123, "text": "a\\nb"}'
    assert written[1] == b'{"id": 2, "text": "as it is",  "x":1.0}'


def test_nothing_left_is_said(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "short"}])
    summary = run(source, tmp_path / "out", CleanSettings())
    said = "\n".join(summary.lines())
    assert summary.documents_out == 0 and "no document is left" in said and "refuses such a folder" in said


def test_what_a_cleaning_wrote_about_its_documents_is_no_source_that_was_passed_over(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "one"}, b"{"])
    run(source, tmp_path / "out", CleanSettings(rules=None, exact=True))
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"report.json", "report.html", "manifest.json", "bad_lines.ndjson", ".request.json"} < names
    (tmp_path / "out" / "notes.md").write_text("mine")
    (tmp_path / "out" / "removed" / "why.csv").write_text("mine")
    found = find_source(str(tmp_path / "out"))
    assert [path.name for path in found.ignored] == ["notes.md", "why.csv"]
    (tmp_path / "out" / ".request.json").unlink()
    assert len(find_source(str(tmp_path / "out")).ignored) == len(names), "of a cleaning that did not finish"


def test_an_empty_file_is_a_shard_of_nothing(tmp_path: Path) -> None:
    write_lines(tmp_path / "src" / "a.jsonl", [])
    write_lines(tmp_path / "src" / "b.jsonl", [{"text": "x"}])
    run(tmp_path / "src", tmp_path / "out", CleanSettings(rules=None, exact=True, shard_bytes=1))
    assert [row["text"] for row in documents(tmp_path / "out")] == ["x"]


def test_however_a_file_is_cut(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"t{n}" * (n % 7 + 1)} for n in range(12)])
    whole = tmp_path / "whole"
    run(source, whole, PLAIN)
    for size in (10, 33, 100):
        out = tmp_path / f"cut{size}"
        run(source, out, CleanSettings(rules=None, shard_bytes=size))
        assert documents(out) == documents(whole)


def test_damaged_and_wrong_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no parquet")
    with pytest.raises(WorkError, match=r"a\.parquet cannot be read"):
        run(tmp_path / "a.parquet", tmp_path / "out", PLAIN)
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(RequestError, match="no column 'text'"):
        run(tmp_path / "b.parquet", tmp_path / "out", PLAIN)
    source = find_source(str(tmp_path / "b.parquet"))
    with pytest.raises(RequestError, match="is named twice"):
        clean([source, source], PLAIN, tmp_path / "out")


def test_numbers_that_json_cannot_spell_are_told(tmp_path: Path) -> None:
    nan = float("nan")
    columns = {
        "text": ["x", "y", "z"],
        "a": [1.5, nan, None],
        "b": [1.5, 2.0, None],
        "c": [{"d": [1.0]}, {"d": [-float("inf")]}, None],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    from datasets import Dataset

    Dataset(pa.table(columns)).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        summary = run(tmp_path / name, tmp_path / f"out-{name}", PLAIN)
        assert [told[:5] for told in summary.columns_left_out] == ["a (it", "c (it"]
        second = documents(tmp_path / f"out-{name}")[1]
        assert second == {"text": "y", "a": None, "b": 2.0, "c": {"d": [None]}}


def test_a_date_beyond_the_calendar_is_one_message(tmp_path: Path) -> None:
    days = pa.array([2**30], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"text": ["x"], "when": days}), tmp_path / "a.parquet")
    with pytest.raises(WorkError, match=r"a\.parquet cannot be read: a date"):
        run(tmp_path / "a.parquet", tmp_path / "out", PLAIN)


def test_the_result_is_a_source(tmp_path: Path) -> None:
    """OUT as a whole, with its lists and report beside the documents, reads as the documents alone."""
    source = write_lines(tmp_path / "a.jsonl", [{"text": f"t{n % 5}"} for n in range(9)])
    run(source, tmp_path / "out", CleanSettings(rules=None, exact=True))
    run(tmp_path / "out", tmp_path / "again", CleanSettings(rules=None, exact=True))
    assert [row["text"] for row in documents(tmp_path / "again")] == [f"t{n}" for n in range(5)]
    assert any(name.startswith("removed") for name in result(tmp_path / "out"))


def test_no_document_at_all_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"body": "x"}])
    with pytest.raises(RequestError, match=r"a\.jsonl:1: no key 'text'; keys here: body"):
        run(source, tmp_path / "out", PLAIN)
    assert not list((tmp_path / "out").glob("documents-*"))
    again = CleanSettings(rules=None, text_key="body")
    assert run(source, tmp_path / "out", again, restart=True).documents_out == 1


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "src" / "a.jsonl", [{"text": "x"}])
    for number in range(7):
        (tmp_path / "src" / f"{number}.md").write_text("not read")
    summary = run(tmp_path / "src", tmp_path / "out", PLAIN)
    assert summary.files_not_read == 7 and len(summary.names_not_read) == 5
    assert "7 files not read, by their names" in "\n".join(summary.lines())
    assert "0.md" in (tmp_path / "out" / "report.html").read_text()
