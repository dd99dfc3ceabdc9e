"""docs/slurm.md and docs/survival.md: every command of theirs runs as it stands there, every setting is one.

Slurm's own commands are those of tests/cluster/test_docs.py."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from tests.launch.slurm_stubs import stub_slurm
from tests.launch.test_requests import BASE
from tests.launch.test_submit import beginning, post_training
from training.survival.config import PreflightConfig, WatchdogConfig

__all__ = ["beginning"]
DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("slurm.md", "survival.md")


def lines_of(page: str) -> list[str]:
    """Indented lines of a page: commands, settings, what they print."""
    return [line[4:] for line in (DOCS / page).read_text().splitlines() if re.match(r" {4}\S", line)]


COMMANDS = [line for page in PAGES for line in lines_of(page) if line.startswith("orthant ")]


def test_nothing_indented_is_left_out() -> None:
    known = re.compile(
        r"orthant |sbatch |make test-cluster|with Cluster|watchdog: |preflight: |rank 0 ends: |missing: |waiting: "
    )
    assert [line for page in PAGES for line in lines_of(page) if not known.match(line)] == []
    assert len(COMMANDS) >= 6


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages name: CONFIG.yaml, an image, a run; and a Slurm of four nodes of eight GPUs."""
    stubs = stub_slurm(tmp_path / "stubs", monkeypatch)
    nodes = "".join(f"n{number}|gpu:h100:8|128|idle\n" for number in range(4))
    (stubs / "nodes-gpu").write_text(nodes)
    partitions = "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP\n"
    (stubs / "partitions").write_text(partitions)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("A corpus.\n")
    (tmp_path / "image.sqsh").touch()
    run = tmp_path / "RUN"
    run.mkdir()
    step = {"loss": 2.0, "grad_norm": 1.0, "lr": 0.1, "tokens_per_second": 5.0, "step_seconds": 1.0}
    metrics = (json.dumps({"step": number, "tokens": 512 * number, **step}) + "\n" for number in (1, 2))
    (run / "metrics.jsonl").write_text("".join(metrics))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(
    command: str, workplace: Path, beginning: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"training": {**BASE["training"], "global_batch_size": 32}}
    given = BASE | sizes
    if "--task sft" in command:
        sft = post_training("sft", beginning, "ours")
        given = sft | {"training": {**sft["training"], "global_batch_size": 32}}
    (workplace / "CONFIG.yaml").write_text(yaml.safe_dump(given))
    words = shlex.split(command, comments=True)
    assert main(words[1:]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    if words[1] == "submit":
        chain = int(words[words.index("--chain") + 1]) if "--chain" in words else 1
        submitted = len(list((workplace / "stubs").glob("submitted*")))
        assert submitted == (0 if "--dry-run" in words else chain)
        assert ("#!/usr/bin/env bash" in said) == ("--dry-run" in words)
    elif "--json" in words:
        assert json.loads(said)["step"] == 2
    else:
        assert (workplace / "report.html").stat().st_size > 1000


def test_settings_of_the_pages_are_the_defaults() -> None:
    watchdog, preflight = (yaml.safe_load(line) for line in lines_of("survival.md")[::1] if re.match(r"\w+: {", line))
    assert WatchdogConfig(**watchdog["watchdog"]) == WatchdogConfig()
    assert PreflightConfig(**preflight["preflight"]) == PreflightConfig()
