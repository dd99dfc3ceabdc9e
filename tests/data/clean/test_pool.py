"""Workers: every unit once, errors with their text, and a worker that dies."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from data.clean.pool import Workers
from foundation.errors import ConfigError, RequestError, WorkError
from foundation.interrupts import children_without_ctrl_c


class Notes:
    """Writes down who did what; unit 3 ends as asked."""

    def __init__(self, folder: Path, end: str = "") -> None:
        self.folder, self.end = folder, end

    def __call__(self) -> Notes:
        return self

    def run(self, unit: int) -> None:
        if unit == 3 and self.end:
            self.fail()
        with open(self.folder / str(unit), "a") as handle:
            handle.write(f"{os.getpid()}\n")

    def fail(self) -> None:
        if self.end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.end == "refuse":
            raise ConfigError("--x", 1, "a rule", "a cure")
        if self.end == "fail":
            raise WorkError("it broke", where="here", cure="mend it")
        raise OSError(28, "No space left on device")


def said(folder: Path) -> dict[int, list[str]]:
    return {int(path.name): path.read_text().split() for path in folder.iterdir()}


def test_every_unit_once_over_several_stages(tmp_path: Path) -> None:
    done: list[int] = []
    with Workers(2) as workers:
        for stage in ("one", "two"):
            (tmp_path / stage).mkdir()
            workers.run(stage, Notes(tmp_path / stage), range(20), done.append)
    assert sorted(done) == sorted([*range(20)] * 2)
    found = [said(tmp_path / stage) for stage in ("one", "two")]
    assert all(len(who) == 1 for stage in found for who in stage.values())
    assert len({who[0] for stage in found for who in stage.values()}) <= 2
    assert str(os.getpid()) not in {who[0] for stage in found for who in stage.values()}


def test_one_worker_is_this_process(tmp_path: Path) -> None:
    with Workers(1) as workers:
        workers.run("one", Notes(tmp_path), range(3), lambda _: None)
        workers.run("none", Notes(tmp_path), [], lambda _: None)
    assert {who[0] for who in said(tmp_path).values()} == {str(os.getpid())}


@pytest.mark.parametrize(
    ("end", "error", "text"),
    [
        ("kill", WorkError, "a worker process died"),
        ("refuse", RequestError, "--x = 1 is refused\n  rule: a rule\n  cure: a cure"),
        ("fail", WorkError, "it broke\n  where: here\n  do: mend it"),
        ("full", OSError, "No space left on device"),
    ],
)
def test_a_unit_that_fails(tmp_path: Path, end: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught, Workers(2) as workers:
        workers.run("one", Notes(tmp_path, end), range(6), lambda _: None)
    assert text in str(caught.value)


def interruptible(unit: int) -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_ctrl_c_does_not_reach_processes_that_begin() -> None:
    assert interruptible(0)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with children_without_ctrl_c():
            begun = pool.submit(interruptible, 0)
        assert interruptible(0) and not begun.result(timeout=300)
