"""A run's folder has one start at work in it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from foundation.errors import RequestError
from launch.commands.alignment import align, ppo
from launch.commands.train import train
from launch.run_folder import WATCH, refuse_while_it_runs
from training.survival.heartbeat import Beat, Who, write_beat
from training.survival.processes import own_processes, start_of


def _this_process(rank: int = 0) -> Who:
    pid = os.getpid()
    return Who(rank, rank, "here", pid, own_processes(), start_of(pid))


def _beats(run: Path, *ranks: Who) -> None:
    life = run / WATCH / "life-0001-00000000"
    life.mkdir(parents=True)
    for who in ranks:
        write_beat(life, Beat(who, 1, 5, "forward and backward", 0.0))


def test_a_run_whose_ranks_live_on_this_machine_is_left_alone(tmp_path: Path) -> None:
    _beats(tmp_path, _this_process())
    with pytest.raises(RequestError, match=f"its run goes on in process {os.getpid()} of this machine") as caught:
        refuse_while_it_runs(tmp_path)
    assert f"kill {os.getpid()} (it saves first)" in str(caught.value)


def test_what_an_ended_run_left_is_no_run(tmp_path: Path) -> None:
    own = _this_process()
    used_again = replace(own, started=own.started + "0")
    elsewhere = replace(own, rank=1, processes="another machine")
    _beats(tmp_path, used_again, elsewhere)
    refuse_while_it_runs(tmp_path)
    refuse_while_it_runs(tmp_path / "of no run yet")


def test_every_run_that_starts_its_own_ranks_looks_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _beats(run, _this_process())
    configs = Path(__file__).parents[2] / "configs"
    checkpoint = f"init.checkpoint={tmp_path}"
    with pytest.raises(RequestError, match="its run goes on"):
        train(configs / "tiny.yaml", [f"run.folder={run}"])
    with pytest.raises(RequestError, match="its run goes on"):
        align("sft", configs / "sft" / "demo.yaml", [f"run.folder={run}", checkpoint])
    with pytest.raises(RequestError, match="its run goes on"):
        ppo(configs / "ppo" / "grpo_demo.yaml", [f"run.folder={run}", checkpoint])
