"""The campaigns behind claims (`make prove AREA=...`): each says by its exit code whether its claim holds."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.prove import data_clean, data_tokenize

FOLDER = Path(__file__).parents[1] / "benchmarks" / "prove"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_campaign_ends_with_the_code_that_its_main_returns(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    mains = [one for one in ast.parse(source).body if isinstance(one, ast.FunctionDef) and one.name == "main"]
    assert [ast.unparse(one.returns) for one in mains if one.returns is not None] == ["int"]
    assert "sys.exit(main(" in source


@pytest.mark.parametrize("finished", [0, 3, 40])
def test_a_process_that_had_finished_is_no_kill(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"finished": finished}

    def kill_once(*_: object) -> dict[str, bool]:
        left["finished"] -= 1
        return {"had_finished": left["finished"] >= 0}

    nowhere = Path("nowhere")
    for module in (data_clean, data_tokenize):
        left["finished"], failures = finished, list[str]()
        monkeypatch.setattr(module, "kill_once", kill_once)
        if module is data_clean:
            kills = data_clean.kill_often(20, nowhere, nowhere, "plan.json", 1.0, {}, failures)
        else:
            kills = data_tokenize.kill_often(nowhere, nowhere, {}, {}, failures)
        assert len(kills) == min(20 + finished, 40)
        assert bool(failures) == (finished == 40)


def test_faults_that_were_not_drawn_are_not_proved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.prove import cluster

    written: list[dict[str, object]] = []
    monkeypatch.setattr(cluster, "write_result", lambda _, result: written.append(json.loads(json.dumps(result))))
    deck = [kind for kind, count in cluster.DECK.items() for _ in range(count)]
    outcomes = [asdict(cluster.Outcome(kind, "1", 3, 0, 1.0, [1], 2.0)) for kind in deck]
    runs = [{"failure": None, "equal": True, "checkpoint": True, "lives": 2}]
    assert cluster.conclude([{"found": [{"outcomes": outcomes, "runs": runs}]}]) == 0
    assert cluster.conclude([{"found": [{"outcomes": outcomes[1:], "runs": runs}]}]) == 3
    assert cluster.conclude([{"found": []}]) == 3
    assert written[1]["failures"] == ["rank stopped: 1 of 12 are still to be drawn"]
