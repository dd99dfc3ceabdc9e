"""Checkpoints that a fork writes while training goes on: the same bytes, the same resume, faults told."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from parallel.layout import ParallelLayout
from tests.ranks import RankPool
from tests.training.test_checkpoint import begin_from, compare_tensors, run_at
from tests.training.trainer_cases import Fault, Run, Seen, train
from training.checkpoint import store, writing
from training.checkpoint.forked import Forked

TP2_DP2 = ParallelLayout(tensor_model_parallel_size=2, data_parallel_size=2, sequence_parallel=True)
ZERO_3 = ParallelLayout(data_parallel_size=2, zero_stage=3)
LATER = {"interval": 2, "asynchronous": True, "keep_last": 10}
AT_ONCE = {"interval": 2, "keep_last": 10}


@pytest.mark.parametrize("layout", [TP2_DP2, ZERO_3], ids=lambda layout: f"{layout.describe()} ZeRO{layout.zero_stage}")
def test_the_same_as_written_at_once(ranks: RankPool, tmp_path: Path, token_file: Path, layout: ParallelLayout) -> None:
    at_once = run_at(ranks, Run(tmp_path / "at once", token_file, layout, checkpoint=AT_ONCE))
    later = run_at(ranks, Run(tmp_path / "later", token_file, layout, checkpoint=LATER))
    assert later.figures == at_once.figures
    assert len(later.said("saved")) == len(at_once.said("saved")) == 3
    for step in (2, 4, 6):
        name = f"checkpoints/step_{step:08d}"
        different, moments = ranks.run(1, compare_tensors, tmp_path / "at once" / name, tmp_path / "later" / name)[0]
        assert different == [] and moments > 10, step


def test_a_run_resumes_from_one(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path / "whole", token_file, TP2_DP2, checkpoint=LATER)
    whole = run_at(ranks, run)
    resumed = run_at(ranks, run.but(folder=begin_from(run, 4, tmp_path / "again")))
    assert resumed.begun_at == 5
    assert resumed.figures == whole.figures[4:]


def train_with_slow_writers(run: Run) -> tuple[Seen, list[str]]:
    """A run whose forks take longer than its steps, and what of its folder was there when each step was done."""
    seen: list[str] = []

    def write_slowly(request: Any, buckets: list[Any], write: Callable[..., Any] = writing._write) -> Any:
        import time

        time.sleep(1.0)
        return write(request, buckets)

    def look(done: Callable[[Forked], bool] = Forked.done) -> Any:
        def done_and_look(self: Forked) -> bool:
            answer = done(self)
            seen.append(" ".join(sorted(path.name for path in (run.folder / "checkpoints").iterdir())))
            return answer

        return done_and_look

    with patch.object(writing, "_write", write_slowly), patch.object(Forked, "done", look()):
        return train(run), seen


def test_training_goes_on_while_it_is_written(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path, token_file, ZERO_3, steps=6, checkpoint={"interval": 3, "asynchronous": True})
    seen, while_written = ranks.run(2, train_with_slow_writers, run)[0]
    assert seen.error is None, seen.error
    assert any(".step_00000003.unfinished" in there and "latest" not in there for there in while_written)
    assert [text.split(":")[0] for text in seen.said("saved")] == ["step 3", "step 6"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000006\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_guard_at_its_limit_leaves_the_checkpoint_that_is_being_written(
    ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, ParallelLayout(tensor_model_parallel_size=2), checkpoint=LATER)
    limited = run.but(guards={"on_nan": "skip", "max_skips": 0}, fault=Fault("nan", 3, rank=1))
    seen, _ = ranks.run(2, train_with_slow_writers, limited)[0]
    assert seen.error is not None and "stops at skip number 1" in seen.error
    assert seen.said("step 2: saved"), seen.events


def train_with_small_files(run: Run, most: int) -> Seen:
    """A run whose ranks may write files of `most` bytes: a disk that fills up in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        return train(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_ends_the_run_in_one_message(
    ranks: RankPool, tmp_path: Path, token_file: Path, asynchronous: bool
) -> None:
    run = Run(tmp_path, token_file, ZERO_3, steps=2, checkpoint={"interval": 2})
    run_at(ranks, run)
    longer = run.but(steps=8, checkpoint={"interval": 2, "asynchronous": asynchronous})
    for seen in ranks.run(2, train_with_small_files, longer, 30_000):
        assert seen.error is not None and "could not be written" in seen.error and "free the disk" in seen.error
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000002\n"
    assert run_at(ranks, longer).begun_at == 3


def train_on_a_full_disk(run: Run) -> Seen:
    usage = namedtuple("usage", "total used free")
    with patch.object(store.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000)):
        return train(run)


def test_a_full_disk_is_seen_before_anything_is_written(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    for seen in ranks.run(2, train_on_a_full_disk, Run(tmp_path, token_file, ZERO_3)):
        assert seen.error is not None and "needs more than 0.07 GB and the disk has 0.00 GB left" in seen.error
    assert list((tmp_path / "checkpoints").iterdir()) == []


def train_with_killed_writer(run: Run) -> Seen:
    def be_killed(request: Any, buckets: list[Any]) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(writing, "_write", be_killed):
        return train(run)


def test_a_killed_writer_ends_the_run_and_the_checkpoint_before_it_stays(
    ranks: RankPool, tmp_path: Path, token_file: Path
) -> None:
    run = Run(tmp_path, token_file, ZERO_3, steps=2, checkpoint={"interval": 2})
    run_at(ranks, run)
    longer = run.but(steps=8, checkpoint={"interval": 2, "asynchronous": True})
    for seen in ranks.run(2, train_with_killed_writer, longer):
        assert seen.error is not None and "killed by SIGKILL" in seen.error
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000002\n"
    assert run_at(ranks, longer).begun_at == 3


def train_where_a_rank_cannot_fork(run: Run) -> Seen:
    def forked(work: Callable[[], Any]) -> Forked:
        if torch.distributed.get_rank() == 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return Forked(work)

    with patch.object(writing, "Forked", forked):
        return train(run)


def test_a_rank_that_cannot_fork_ends_the_run_in_one_message(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    """The others would wait for it."""
    run = Run(tmp_path, token_file, ZERO_3, checkpoint=LATER)
    for seen in ranks.run(2, train_where_a_rank_cannot_fork, run):
        assert seen.error is not None and "Cannot allocate memory" in seen.error


def train_where_metadata_cannot_be_written(run: Run) -> Seen:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(writing.Plan, "finish", full):
        return train(run)


def test_a_disk_that_is_full_when_all_tensors_are_written(ranks: RankPool, tmp_path: Path, token_file: Path) -> None:
    run = Run(tmp_path, token_file, ParallelLayout())
    (seen,) = ranks.run(1, train_where_metadata_cannot_be_written, run)
    assert seen.error is not None and "No space left" in seen.error and "free the disk" in seen.error
