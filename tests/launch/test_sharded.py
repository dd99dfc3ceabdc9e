"""`orthant train` with weights sharded over replicas, as a person starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.device_environment import QUEUES

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ("parallel.data_parallel_size=2", "parallel.zero_stage=3", "training.train_steps=2",
            "schedule.warmup_steps=1", "checkpoint.interval=null")  # fmt: skip


def test_weights_are_sharded_wherever_no_queue_was_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "launch", "train", str(ROOT / "configs" / "tiny.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert QUEUES not in environment, "installing the platform let a variable out to every process started here"
    done = subprocess.run(
        [*command, f"run.folder={tmp_path}", *SETTINGS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
