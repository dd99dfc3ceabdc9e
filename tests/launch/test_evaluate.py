"""`orthant evaluate`: what is asked of it, and its answer as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.cli import main
from launch.commands import evaluate as command
from launch.evaluation_run import EvaluationJob, show
from parallel.layout import ParallelLayout


def test_figures_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"perplexity": 2.0, "nats_per_token": math.nan, "tasks": {"one": {"acc": math.inf, "alias": "one"}}}
    show(EvaluationJob("checkpoint", as_json=True), found)

    def refuse(name: str) -> Any:
        raise AssertionError(f"JSON has no {name}")

    told = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert told == {"perplexity": 2.0, "nats_per_token": None, "tasks": {"one": {"acc": None, "alias": "one"}}}


def test_names_of_tasks_are_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[EvaluationJob] = []

    def evaluate_here(job: EvaluationJob, _: ParallelLayout) -> dict[str, Any]:
        asked.append(job)
        return {}

    monkeypatch.setattr(command, "evaluate_here", evaluate_here)
    monkeypatch.setattr(command, "find_checkpoint", lambda path: path)
    monkeypatch.setattr(command, "read_manifest", lambda _: SimpleNamespace(model=SimpleNamespace(num_experts=None)))
    monkeypatch.setattr(command, "check_model_fits_layout", lambda *_: None)
    assert main(["evaluate", str(tmp_path), "--tasks", "arc_easy, hellaswag,", "--json"]) == 0
    assert [job.tasks for job in asked] == [("arc_easy", "hellaswag")]
    assert main(["evaluate", str(tmp_path), "--tasks", " , "]) == 2
