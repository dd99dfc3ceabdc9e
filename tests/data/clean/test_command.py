"""`orthant data clean` and `orthant data classifier`: names, files, messages, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from tests.data.clean.cases import documents, planted, write_lines


def orthant(*words: object) -> subprocess.CompletedProcess[str]:
    """As a person calls it: exit code, stdout and stderr."""
    command = [sys.executable, "-m", "launch", "data", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "a.jsonl"
    return write_lines(path, [*planted(100), b"{broken"])


def test_clean_says_what_came_in_what_went_out_and_why(source: Path, tmp_path: Path) -> None:
    done = orthant("clean", source, "--out", tmp_path / "out", "--dedup", "--rules", "none", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["documents_in"], report["documents_out"], report["bad_lines"]) == (114, 100, 1)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    for part in (
        "114 documents in, 100 out; 1 bad lines",
        "near duplicate",
        "exact duplicate",
        "a.jsonl:115: not JSON",
    ):
        assert part in done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3 and "near duplicate" in page and "<script" not in page and "http" not in page
    again = orthant("clean", source, "--out", tmp_path / "out", "--dedup", "--rules", "none", "--json")
    assert (again.returncode, again.stdout) == (0, done.stdout) and "is done already" in again.stderr


def test_the_rules_are_on_by_default(source: Path, tmp_path: Path) -> None:
    done = orthant("clean", source, "--out", tmp_path / "out")
    assert done.returncode == 0 and "gopher.min_stop_words" in done.stderr and "no document is left" in done.stderr
    kept = orthant("clean", "orthant:demo", "--out", tmp_path / "demo", "--dedup")
    assert kept.returncode == 0 and len(documents(tmp_path / "demo")) > 400


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strict"], "a.jsonl:115: not JSON"),
        (["--rules", "gofer"], "--rules = 'gofer' is refused"),
        (["--set", "gopher.min_word=3"], "gopher.min_words"),
        (["--exact-only"], "add --dedup"),
        (["--share", "3/2"], "I/N with 0 <= I < N"),
        (["--share", "x"], "I/N"),
        (["--share", "0/2"], "--stage filter"),
        (["--share", "0/2", "--stage", "filter", "--restart"], "no --restart"),
        (["--bands", "0", "--dedup"], "--bands = 0 is refused"),
        (["--shard-mib", "0"], "--shard-mib"),
        (["--shard-mib", "nan"], "--shard-mib = nan is refused"),
        (["--shard-mib", "inf"], "--shard-mib = inf is refused"),
        (["--seed", "-1", "--dedup"], "--seed = -1 is refused"),
        (["--seed", "99999999999999999999", "--dedup"], "2**64 - 1"),
        (["--share", "\u00b2/3", "--stage", "filter"], "I/N"),
        (["--set", "gopher.max_top_2gram=inf"], "finite"),
        (["--text-key", "\udcff"], "is not UTF-8"),
        (["--quality-model", "gone.bin"], "no fastText model at gone.bin"),
    ],
)
def test_requests_that_are_refused(
    source: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "clean", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/documents*"))


def test_a_stage_whose_time_has_not_come(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "clean", str(source), "--out", str(tmp_path / "out"), "--stage", "write"]) == 1
    assert "run stage filter to its end first" in capsys.readouterr().err
    words = ["--stage", "filter", "--share", "0/1", "--json"]
    assert main(["data", "clean", str(source), "--out", str(tmp_path / "out"), *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"stage": "filter", "share": "0/1"}


def test_a_classifier_is_trained_and_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_lines(tmp_path / "good.jsonl", [{"text": f"oven butter {n} simmer whisk onion"} for n in range(300)])
    bad = write_lines(tmp_path / "bad.jsonl", [{"text": f"mast harbour {n} rudder tide keel"} for n in range(300)])
    model = tmp_path / "models" / "quality.bin"
    done = orthant("classifier", f"good={good}", f"bad={bad}", "--out", model, "--json")
    assert done.returncode == 0, done.stderr
    assert min(json.loads(done.stdout)["auc"].values()) > 0.99 and "held out" in done.stderr
    out = tmp_path / "out"
    both = orthant("clean", good, bad, "--out", out, "--rules", "none", "--quality-model", model)
    assert both.returncode == 0 and len(documents(out)) == 300
    for words, said in ((["good"], "good=good"), ([f"good={good}"], "one label only")):
        assert main(["data", "classifier", *words, "--out", str(tmp_path / "m.bin")]) == 2
        assert said in capsys.readouterr().err


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "src"
    write_lines(folder / "a.jsonl", [{"text": "x"}])
    (folder / "no\udcff").write_bytes(b"")
    command = ["data", "clean", str(folder), "--rules", "none", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["names_not_read"] == [str(folder / "no") + "\\udcff"]
    write_lines(folder / "n\udcff.jsonl", [{"text": "y"}])
    capsys.readouterr()
    assert main([*command, str(tmp_path / "another")]) == 2
    assert "n\\udcff.jsonl' is not UTF-8" in capsys.readouterr().err
