"""Losses of one run in two settings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import RequestError, WorkError
from launch.cli import main
from launch.commands import against as command
from launch.commands.against import compare, verify_against
from tests.launch.test_requests import workplace  # noqa: F401

AGAINST = ["training.precision=bf16"]


def test_means_of_windows_are_compared() -> None:
    second = [4.0 - 0.01 * step for step in range(100)]
    first = [loss * (1.004 if step == 50 else 1.0) for step, loss in enumerate(second)]
    found = compare(first, second)
    assert found.of_one_step == pytest.approx(0.004) and found.largest == pytest.approx(0.0002, rel=0.05)
    assert 51 <= found.at <= 70 and found.last == 0.0
    assert compare(second[:3], second[:3]).window == 3


def test_what_is_not_finite_is_apart() -> None:
    assert compare([1.0, math.nan], [1.0, 1.0]).largest == math.inf
    assert compare([1.0, 1.0], [1.0, math.inf], window=1).largest == math.inf
    with pytest.raises(WorkError, match="2 and 1 losses"):
        compare([1.0, 1.0], [1.0])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the runs were told; the one in bf16 is half a percent off."""
    told: list[list[str]] = []

    def train(_: Path, settings: list[str]) -> None:
        told.append(settings)
        folder = Path(settings[-1].removeprefix("run.folder="))
        folder.mkdir(parents=True)
        factor = 1.005 if AGAINST[0] in settings else 1.0
        steps = int(next(one for one in settings if "train_steps" in one).partition("=")[2])
        lines = [json.dumps({"step": step, "loss": factor * (4 - 0.01 * step)}) for step in range(steps)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    monkeypatch.setattr(command, "train", train)
    return told


@pytest.mark.usefixtures("workplace")
def test_both_settings_run_and_are_compared(trained: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["verify", "run.yaml", "training.seed=5", "--against", *AGAINST, "--steps", "40"]
    assert main(arguments) == 0
    assert "5.0e-03 apart" in capsys.readouterr().out.replace("4.98e-03", "5.0e-03")
    first, second = trained
    assert "training.seed=5" in first and AGAINST[0] not in first and AGAINST[0] in second
    with pytest.raises(RequestError, match="earlier comparison"):
        verify_against(Path("run.yaml"), [], AGAINST, steps=4, within=0.01, as_json=True)


@pytest.mark.usefixtures("workplace")
def test_a_difference_above_the_bound_is_exit_code_3(trained: list[list[str]]) -> None:
    assert main(["verify", "run.yaml", "--against", *AGAINST, "--steps", "40", "--within", "0.004"]) == 3


@pytest.mark.usefixtures("workplace")
def test_a_wrong_setting_is_refused_before_anything_runs(trained: list[list[str]]) -> None:
    for setting in ("training.precision=fp7", "training.seq_length=4096", "data.sources=[nowhere.jsonl]"):
        with pytest.raises(RequestError):
            verify_against(Path("run.yaml"), [], [setting], steps=40, within=0.01, as_json=False)
    assert not trained


@pytest.mark.usefixtures("workplace")
def test_what_a_short_run_leaves_out_does_not_refuse_the_configuration(trained: list[list[str]]) -> None:
    kept = ["checkpoint.interval=50", "checkpoint.keep_every=100", "guards.on_nan=rollback", "guards.on_spike=rollback"]
    profiled = ["profile.steps=90-92", "profile.timeline=95"]
    assert main(["verify", "run.yaml", *kept, *profiled, "--against", *AGAINST, "--steps", "40"]) == 0
    assert len(trained) == 2 and all("guards.on_nan=stop" in settings for settings in trained)


@pytest.mark.usefixtures("workplace")
def test_a_loss_that_is_not_finite_differs_and_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(_: Path, settings: list[str]) -> None:
        folder = Path(settings[-1].removeprefix("run.folder="))
        folder.mkdir(parents=True)
        loss = None if AGAINST[0] in settings else 1.0
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")

    monkeypatch.setattr(command, "train", train)
    assert main(["verify", "run.yaml", "--against", *AGAINST, "--steps", "2", "--json"]) == 3

    def refuse(name: str) -> Any:
        raise AssertionError(f"JSON has no {name}")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["within"] is False and found["largest"] is None
