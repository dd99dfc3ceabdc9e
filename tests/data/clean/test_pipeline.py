"""A cleaning as a whole: what stays, what goes, the same bytes however it is run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.clean.pipeline import STAGES, Share, clean
from data.clean.settings import CleanSettings, NearSettings
from data.clean.state import Work
from data.sources import find_source
from foundation.errors import RequestError, WorkError
from tests.data.clean.cases import documents, planted, removed, result, run, write_lines

DEDUP = CleanSettings(rules=None, exact=True, near=NearSettings(), shard_bytes=20_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, one compressed; the first is cut into several shards."""
    folder = tmp_path_factory.mktemp("source")
    records = planted(300)
    write_lines(folder / "a.jsonl", [*records[:150], b"{broken", b"", {"text": 1}, {"body": "x"}, *records[150:200]])
    write_lines(folder / "b.jsonl.gz", records[200:250])
    write_lines(folder / "deep" / "c.jsonl", [*records[250:], {"text": " \n"}])
    return folder


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    run(source, out, DEDUP)
    return out


def test_duplicates_go_and_the_first_stays(source: Path, reference: Path) -> None:
    kept = {record["id"].partition("-")[0] for record in documents(reference)}
    assert len(documents(reference)) == len(kept) == 300
    order = [record["id"] for record in planted(300)]
    for record in documents(reference):
        number = record["id"].partition("-")[0]
        assert record["id"] == next(name for name in order if name.partition("-")[0] == number)
    assert Counter(entry["rule"] for entry in removed(reference)).keys() == {
        "exact duplicate",
        "near duplicate",
        "empty",
    }


def test_every_document_is_accounted_for(source: Path, reference: Path) -> None:
    report = json.loads((reference / "report.json").read_text())
    total = len(planted(300)) + 1
    assert report["documents_in"] == total
    assert report["documents_out"] + sum(report["removed"].values()) == total
    assert len(removed(reference)) == sum(report["removed"].values())
    assert (report["bad_lines"], report["blank_lines"]) == (3, 1)
    manifest = json.loads((reference / "manifest.json").read_text())
    assert sum(file["documents"] for file in manifest["files"]) == manifest["documents"] == 300
    assert not (reference / ".work").exists()


def test_lines_are_named_by_file_and_line(source: Path, reference: Path) -> None:
    """Also where a file was cut into several shards."""
    bad = [json.loads(line) for line in (reference / "bad_lines.ndjson").open()]
    assert [(Path(entry["file"]).name, entry["line"]) for entry in bad] == [("a.jsonl", n) for n in (151, 153, 154)]
    assert "not JSON" in bad[0]["why"] and "no key 'text'" in bad[2]["why"]
    lines = {path.name: path.read_bytes().splitlines() for path in source.glob("*.jsonl")}
    checked = 0
    for entry in removed(reference):
        name = Path(entry["file"]).name
        kept_file, _, kept_line = entry.get("kept", "").rpartition(":")
        if name == "a.jsonl" and Path(kept_file).name == "a.jsonl":
            one, other = (json.loads(lines[name][int(number) - 1]) for number in (entry["line"], kept_line))
            assert one["id"].partition("-")[0] == other["id"].partition("-")[0]
            assert (one["text"] == other["text"]) == (entry["rule"] == "exact duplicate")
            checked += 1
    assert checked > 10


def test_other_keys_pass_through(source: Path, reference: Path) -> None:
    assert any(record.get("more") == {"kept": [1, None]} for record in documents(reference))
    originals = set((source / "a.jsonl").read_bytes().splitlines())
    first = min(reference.glob("documents-*")).read_bytes().splitlines()
    assert first and set(first) <= originals, "a line whose text does not change is written as it came"


def test_workers_give_the_same_bytes(source: Path, reference: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out", DEDUP, workers=2)
    assert result(tmp_path / "out") == result(reference)


def test_shares_give_the_same_bytes(source: Path, reference: Path, tmp_path: Path) -> None:
    """As tasks of a job array do it: each stage to its end, each share of it apart and in any order."""
    sources = [find_source(str(source))]
    for stage in STAGES[:-1]:
        for index in (2, 0, 1):
            assert clean(sources, DEDUP, tmp_path / "out", stage=stage, share=Share(index, 3)) is None
    assert clean(sources, DEDUP, tmp_path / "out", stage="report") is not None
    assert result(tmp_path / "out") == result(reference)


def test_a_stage_before_its_time_is_refused(source: Path, tmp_path: Path) -> None:
    sources = [find_source(str(source))]
    clean(sources, DEDUP, tmp_path / "out", stage="filter", share=Share(0, 2))
    with pytest.raises(WorkError, match="unit 1 of stage filter is not done"):
        clean(sources, DEDUP, tmp_path / "out", stage="buckets")


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_is_lost_is_done_again(
    source: Path, reference: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop in every stage, after the files of a unit are written and before its marker is."""
    marked: Callable[..., None] = Work.mark
    calls = Counter[str]()

    def stop(work: Work, name: str, unit: int, facts: dict[str, object]) -> None:
        calls[name] += 1
        if name == stage and calls[name] == min(3, {"clusters": 1}.get(name, 3)):
            raise KeyboardInterrupt
        marked(work, name, unit, facts)

    monkeypatch.setattr(Work, "mark", stop)
    if stage == "report":
        monkeypatch.setattr("data.clean.report.render_page", lambda _: 1 / 0)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        run(source, tmp_path / "out", DEDUP)
    monkeypatch.undo()
    again = Counter[str]()

    def count(work: Work, name: str, unit: int, facts: dict[str, object]) -> None:
        again[name] += 1
        marked(work, name, unit, facts)

    monkeypatch.setattr(Work, "mark", count)
    run(source, tmp_path / "out", DEDUP)
    assert result(tmp_path / "out") == result(reference)
    before = STAGES[: STAGES.index(stage)]  # type: ignore[arg-type]
    assert not any(again[name] for name in before), "what was done is not done again"


def test_done_stays_done(source: Path, tmp_path: Path) -> None:
    first = run(source, tmp_path / "out", DEDUP)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(source, tmp_path / "out", DEDUP) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_request_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, out, DEDUP)
    other = replace(DEDUP, near=NearSettings(bands=4))
    with pytest.raises(RequestError, match=r"near.bands was 20 and is 4"):
        run(source, out, other)
    assert run(source, out, other, restart=True).settings["near"]["bands"] == 4
    next(out.glob("documents-*")).unlink()
    with pytest.raises(WorkError, match="no longer whole"):
        run(source, out, other)


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", planted(20))
    clean([find_source(str(path))], DEDUP, tmp_path / "out", stage="filter")
    os.utime(path, ns=(1, 1))
    with pytest.raises(RequestError, match=r"a.jsonl has changed"):
        run(path, tmp_path / "out", DEDUP)


def test_strict_refuses_bad_lines(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"a\.jsonl:151: not JSON"):
        run(source, tmp_path / "out", DEDUP, strict=True)
    assert not list((tmp_path / "out").glob("documents-*"))
    run(source, tmp_path / "out", DEDUP)
    with pytest.raises(RequestError, match=r"a\.jsonl:151: not JSON"):
        run(source, tmp_path / "out", DEDUP, strict=True)


def test_what_is_not_ours_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "removed").mkdir()
    (tmp_path / "removed" / "report.txt").write_text("mine too")
    for restart in (False, True):
        with pytest.raises(RequestError, match="is not empty: notes.txt, removed"):
            run(source, tmp_path, DEDUP, restart=restart)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "removed" / "report.txt").read_text() == "mine too"
    with pytest.raises(RequestError, match="lies in the source"):
        run(source, source / "out", DEDUP)


def test_exact_only(source: Path, tmp_path: Path) -> None:
    summary = run(source, tmp_path / "out", replace(DEDUP, near=None))
    assert summary.removed == {"exact duplicate": 12, "empty": 1}


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", planted(50))
    path.write_bytes(path.read_bytes()[:-100])
    write_lines(tmp_path / "b.jsonl", planted(50))
    with pytest.raises(WorkError, match=r"a\.jsonl\.gz cannot be read"):
        run(tmp_path, tmp_path.with_name("out-of-it"), replace(DEDUP, shard_bytes=100), workers=2)
