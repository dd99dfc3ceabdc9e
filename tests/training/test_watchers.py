"""metrics.jsonl over resumes, crashes and rollbacks; TensorBoard and Weights & Biases as their own readers see them."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from foundation.errors import RequestError, WorkError
from training.config import LoggingConfig
from training.records import StepRecord, Watcher
from training.survival.events import append_event
from training.watchers import MetricsFile, TensorBoard, WeightsAndBiases, file_watchers


def record(step: int, loss: float | None = None, **fields: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 1 / step if loss is None else loss,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens": 64 * step,
        "tokens_per_second": 100.0,
        "step_seconds": 0.64,
        "mfu": None,
        "mfu_full_attention": None,
        "validation_loss": None,
        "guard": None,
    }
    return StepRecord(**values | fields)


def feed(watcher: Watcher, steps: Iterable[int], first: int | None = None) -> None:
    steps = list(steps)
    watcher.begin(steps[0] if first is None else first, 100)
    for step in steps:
        watcher.step_done(record(step))


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_line_a_step_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    feed(metrics, [1, 2])
    metrics.step_done(record(3, 1 / 3, mfu=0.25, validation_loss=0.75, guard="warn: spike"))
    found = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in found] == [1, 2, 3]
    assert found[2]["loss"] == 1 / 3 and found[2]["mfu"] == 0.25 and found[2]["guard"] == "warn: spike"
    assert found[0]["mfu"] is None and "guard" not in found[0] and "validation_loss" not in found[0]
    metrics.end()


def test_resuming_drops_the_lines_past_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    feed(MetricsFile(path), range(1, 8))  # killed: no end
    feed(MetricsFile(path), [4, 5], first=4)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4, 5]
    feed(MetricsFile(path), [1], first=1)
    assert [line["step"] for line in lines(path)] == [1]


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    feed(MetricsFile(path), [1, 2, 3])
    path.write_text(path.read_text()[:-20])
    feed(MetricsFile(path), [3, 4], first=3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("second", "rule"),
    [
        (b'{"step": 2, "loss" 1.0}', "it is JSON"),
        (b"\x00\x00\x00\x00", "it is JSON"),
        (b'{"step": 2, "guard": "\xff"}', "it is JSON"),
        (b"[2]", "it is one JSON object"),
        (b'{"loss": 1.0}', "it has step"),
        (b'{"step": "2"}', "its step is a whole number"),
    ],
)
def test_a_line_that_is_damaged_is_named_and_nothing_is_lost(second: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    feed(MetricsFile(path), [1, 2, 3])
    first, _, third = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, second, third, b""]))
    before = path.read_bytes()
    with pytest.raises(RequestError, match=f"{path}, line 2") as caught:
        MetricsFile(path).begin(3, 100)
    assert rule in str(caught.value) and "take that line away" in str(caught.value)
    assert path.read_bytes() == before


def test_resuming_keeps_the_lines_before_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1,  "note": "a\xe2\x80\xa8b"}\n{"step": 2}\n')
    MetricsFile(path).begin(2, 100)
    assert path.read_bytes() == b'{"step":1,  "note": "a\xe2\x80\xa8b"}\n'


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """What a write says itself, "No space left on device", leaves open which."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    metrics = MetricsFile(path)
    metrics._handle = path.open("w")
    with pytest.raises(WorkError, match=f"{path} cannot be written: No space left") as caught:
        metrics.step_done(record(1))
    assert "free disk space" in str(caught.value)
    with suppress(OSError):
        metrics._handle.close()


def test_a_full_disk_names_the_file_of_events(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(WorkError, match=r"events.jsonl cannot be written: No space left"):
        append_event(tmp_path, 1, "begin")


def test_a_rollback_takes_lines_back(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    feed(metrics, range(1, 6))
    metrics.rolled_back(3)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    metrics.step_done(record(4, 0.125))
    metrics.end()
    assert [line["loss"] for line in lines(tmp_path / "metrics.jsonl")][3] == 0.125


def test_a_skipped_step_whose_loss_is_no_number_is_valid_json(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.begin(1, 2)
    metrics.step_done(record(1, math.nan, grad_norm=math.inf, guard="skip: loss is nan"))
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["grad_norm"] is None and line["guard"] == "skip: loss is nan"


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader shows, over all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: {event.step: event.value for event in reader.Scalars(name)} for name in reader.Tags()["scalars"]}


def test_tensorboard_files_are_readable(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    feed(board, [1, 2])
    board.step_done(record(3, mfu=0.25, validation_loss=0.75))
    board.end()
    found = curves(tmp_path / "tensorboard")
    assert found["loss"] == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert found["validation_loss"] == {3: 0.75} and found["mfu"] == {3: 0.25}
    assert set(found) == {"loss", "grad_norm", "lr", "tokens_per_second", "mfu", "validation_loss"}


def test_tensorboard_forgets_what_a_rollback_took_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    feed(board, range(1, 6))
    board.rolled_back(3)
    board.step_done(record(4, 0.125))
    board.end()
    assert curves(tmp_path)["loss"] == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3), 4: 0.125}


def test_a_full_disk_names_the_folder_of_tensorboard(tmp_path: Path) -> None:
    """Its writer is a thread, whose error comes out of whatever call is the next one."""

    class Full:
        def __init__(self, *_: object, **__: object) -> None: ...

        def add_scalar(self, *_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        close = add_scalar

    board = TensorBoard(tmp_path / "tensorboard")
    board._open = Full
    board.begin(1, 2)
    for call in (lambda: board.step_done(record(1)), lambda: board.rolled_back(1), board.end):
        with pytest.raises(WorkError, match="tensorboard cannot be written: No space left"):
            call()


def test_a_refusal_of_weights_and_biases_is_told_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.AuthenticationError("API key verification failed for host https://api.wandb.ai")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(WorkError, match="API key verification failed") as caught:
        WeightsAndBiases(tmp_path, "project", "name", {}).begin(1, 2)
    assert "WANDB_API_KEY" in str(caught.value)


@pytest.fixture
def quiet_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no network, no words, nothing outside of the test's folder."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    for name in ("WANDB__DISABLE_STATS", "WANDB__DISABLE_META", "WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):
        monkeypatch.setenv(name, "true")


def appears(part: bytes, path: Path) -> bool:
    """W&B writes in a process of its own, a moment later."""
    end = time.monotonic() + 300
    while part not in path.read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    return part in path.read_bytes()


@pytest.mark.usefixtures("quiet_wandb")
def test_weights_and_biases_writes_offline_below_the_folder(tmp_path: Path) -> None:
    watcher = WeightsAndBiases(tmp_path / "run", "project", "name", {"training": {"seed": 7}})
    feed(watcher, [1, 2])
    watcher.rolled_back(1)
    watcher.step_done(record(2, 0.125))
    watcher.end()
    (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(appears(part, written) for part in (b"training", b"grad_norm", b"tokens_per_second"))


def test_the_config_says_who_watches(tmp_path: Path) -> None:
    def kinds(**logging: Any) -> list[type]:
        return [type(watcher) for watcher in file_watchers(tmp_path, LoggingConfig.model_validate(logging), {})]

    assert kinds() == [MetricsFile]
    assert kinds(tensorboard=True) == [MetricsFile, TensorBoard]
    assert kinds(tensorboard=True, wandb=True) == [MetricsFile, TensorBoard, WeightsAndBiases]
