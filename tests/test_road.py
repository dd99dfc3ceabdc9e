"""The road's script: its stages follow each other, stop at the first failure, go on there; its sets and its dirt."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.alignment_config import load_alignment_config
from launch.checks import check_sizes
from launch.config import load_config
from scripts import road, road_sets
from tests.cluster.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A road of three stages, the second of which fails as often as the list holds "fail"."""
    walked: list[str] = []

    def first(way: road.Road) -> str:
        """Begin."""
        walked.append("first")
        return "began"

    def second(way: road.Road) -> str:
        """Go on."""
        if "fail" in walked:
            way.run("orthant", "config", "show", "nowhere.yaml")
        walked.append("second")
        return "went on"

    def third(way: road.Road) -> str:
        """End."""
        road.demand("differs" not in walked, "the result differs")
        walked.append("third")
        return "ended"

    monkeypatch.setattr(road, "STAGES", (first, second, third))
    monkeypatch.setattr(sys, "argv", ["road.py", "--folder", str(tmp_path / "way")])
    return walked


def test_a_failed_stage_is_named_and_the_same_command_goes_on(
    walk: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    walk.append("fail")
    assert road.main() == 1
    said = capsys.readouterr()
    assert "stage second failed: orthant config ended with exit code 2" in said.err
    assert "nowhere.yaml does not exist" in said.err and "[3/3]" not in said.out
    walk.remove("fail")
    assert road.main() == 0
    assert walk == ["first", "second", "third"] and "done before: began" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--restart"])
    assert road.main() == 0 and walk.count("first") == 2


def test_a_result_that_is_not_what_it_should_be_ends_the_road(
    walk: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    walk.append("differs")
    assert road.main() == 1
    assert "stage third failed: the result differs" in capsys.readouterr().err


def test_ctrl_c_waits_for_a_command_that_is_saving(tmp_path: Path) -> None:
    saves = (
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(1)\n    pathlib.Path(sys.argv[1], 'saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\ntime.sleep(0.5)\n"  # by then the road waits for it
        "pathlib.Path(sys.argv[1], 'begun').touch()\ntime.sleep(600)\n"
    )
    walks = (
        "import pathlib, signal, sys\nfrom scripts import road\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background jobs ignore
        "road.Road(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], 'log')).run(sys.executable, '-c', sys.argv[2],"
        " sys.argv[1])\n"
    )
    words = [sys.executable, "-c", walks, str(tmp_path), saves]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # PYTHONSAFEPATH may keep the working folder out
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, start_new_session=True) as walker:
        wait_until("the command has begun", (tmp_path / "begun").exists, 300)
        os.killpg(walker.pid, signal.SIGINT)  # as a terminal does: to the road and to its command
        _, said = walker.communicate(timeout=300)
    assert b"waiting for the command" in said and (tmp_path / "saved").exists()


def test_a_folder_of_something_else_is_left_alone(
    walk: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "way").mkdir()
    (tmp_path / "way" / "thesis.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--restart"])
    assert road.main() == 2 and walk == []
    assert "holds something else" in capsys.readouterr().err and (tmp_path / "way" / "thesis.txt").exists()


def test_its_configurations_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert check_sizes(load_config(Path("configs/road/pretrain.yaml")), world_size=None).world_size == 4
    for kind in ("sft", "reward", "ppo"):
        load_alignment_config(kind, Path(f"configs/road/{kind}.yaml"), [])


def test_what_ships_as_dirt_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runpy.run_path(str(ROOT / "data/demo/make_raw.py"))
    shipped = (ROOT / "data/demo/raw/crawl.jsonl").read_text(encoding="utf-8")
    (tmp_path / "corpus").mkdir()
    for part in (ROOT / "data/demo/corpus").iterdir():
        (tmp_path / "corpus" / part.name).symlink_to(part)
    made["main"].__globals__["HERE"] = tmp_path
    made["main"]()
    assert (tmp_path / "raw/crawl.jsonl").read_text(encoding="utf-8") == shipped
    with gzip.open(next((ROOT / "data/demo/corpus").glob("*.gz")), "rt", encoding="utf-8") as lines:
        assert json.loads(next(lines))["text"] not in ("", shipped)


def test_sets_are_made_of_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"The number {n} column holds some values there. It goes on about other tables." for n in range(60))
    (tmp_path / "documents-0.jsonl").write_text(json.dumps({"text": text}) + "\n")
    for name, count in (("INSTRUCTIONS", 30), ("PAIRS", 20), ("PROMPTS", 5)):
        monkeypatch.setattr(road_sets, name, count)
    monkeypatch.setattr(sys, "argv", ["road_sets", str(tmp_path), str(tmp_path / "sets")])
    road_sets.main()

    def rows(name: str) -> list[dict[str, object]]:
        return [json.loads(line) for line in (tmp_path / "sets" / f"{name}.jsonl").read_text().splitlines()]

    assert [len(rows(name)) for name in ("instructions", "preferences", "prompts")] == [30, 20, 5]
    for row in rows("preferences"):
        assert str(row["chosen"]).endswith(".") and len(str(row["rejected"])) > len(str(row["chosen"]))
    monkeypatch.setattr(road_sets, "INSTRUCTIONS", 1000)
    with pytest.raises(SystemExit, match="short sentences"):
        road_sets.main()
