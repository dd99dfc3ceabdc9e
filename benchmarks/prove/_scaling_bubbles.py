"""Part of the campaign: bubbles of two stages, plain and interleaved, on ranks of this machine."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from launch.report.pipeline import as_values, read_timeline
from launch.run_records import METRICS, read_lines

STEPS, RECORDED = 12, "4-12"
PIPELINES = {"PP2": 1, "PP2 interleaved": 2}
SIZES = (
    "model.preset=null", "model.num_layers=8", "model.hidden_size=256", "model.ffn_hidden_size=688",
    "model.num_attention_heads=4", "model.num_query_groups=2", "model.max_position_embeddings=256",
    "training.global_batch_size=16", "training.micro_batch_size=1", "training.seq_length=256",
    "evaluation.interval=null", "checkpoint.interval=null", "schedule.warmup_steps=2", "logging.log_interval=1",
    "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
)  # fmt: skip
"""As benchmarks/layouts.py has them: two stages with nearly equal work."""


def train(folder: Path, *settings: str) -> None:
    """`orthant train` of the demo's configuration, on ranks of one thread."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "launch", "train", str(ROOT / "configs" / "demo.yaml"), *SIZES]
    command += [f"training.train_steps={STEPS}", f"run.folder={folder}", *settings]
    subprocess.run(command, env=environment, check=True, timeout=280, stdout=subprocess.DEVNULL)


def bubbles(folder: Path, keep: Path | None) -> dict[str, Any]:
    """Of two stages, plain and interleaved, the medians over recorded steps."""
    found = {}
    for name, chunks in PIPELINES.items():
        run = folder / name.replace(" ", "-")
        virtual = [] if chunks == 1 else [f"parallel.virtual_pipeline_model_parallel_size={chunks}"]
        train(run, "parallel.pipeline_model_parallel_size=2", f"profile.timeline={RECORDED}", *virtual)
        found[name] = {**(as_values(read_timeline(run)) or {}), "step_seconds": median_seconds(run)}
        if keep is not None:
            shutil.copytree(run, keep / run.name, ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
    return {"layouts": found}


def median_seconds(run: Path) -> float:
    """Of a run's steps after the first three."""
    return statistics.median(float(line["step_seconds"]) for line in read_lines(run / METRICS)[3:])
