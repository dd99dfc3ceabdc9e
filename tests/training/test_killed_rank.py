"""A rank of a real run is killed with SIGKILL; the same command run again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ranks.processes import REPOSITORY

STEPS = 30
CONFIG = """
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
        max_position_embeddings: 32}
parallel: {tensor_model_parallel_size: 2, sequence_parallel: true}
data: {sources: [SOURCE], tokenizer: {kind: byte-bpe, vocab_size: 280}, validation_fraction: 0.1}
training: {train_steps: 30, global_batch_size: 4, seq_length: 32}
optimizer: {lr: 3.0e-3}
schedule: {warmup_steps: 3}
evaluation: {interval: 10, batches: 2}
checkpoint: {interval: 5}
"""


def write_corpus(folder: Path) -> Path:
    words = "the lake was calm and the wind turned over the reeds while birds slept".split()
    texts = [" ".join(words[(start * 7 + i * i) % len(words)] for i in range(40)) for start in range(120)]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(texts)))
    return path


def start(config: Path, folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch", "train", str(config), f"run.folder={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def repeated(folder: Path) -> list[tuple[Any, ...]]:
    """What has to be equal bit for bit."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss")
    return [tuple(line.get(name) for name in names) for line in metrics(folder)]


def rank_processes(launcher: int) -> list[psutil.Process]:
    """The rank processes below `launcher`, by rank; processes that they start themselves are left out."""
    found = {}
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            command, parent = process.cmdline(), process.parent()
            if "launch.rank" in command and parent is not None and "launch.rank" not in parent.cmdline():
                found[int(process.environ()["RANK"])] = process
        except psutil.Error:
            continue  # ended meanwhile
    return [process for _, process in sorted(found.items())]


def kill_a_rank_after(steps: int, process: subprocess.Popen[str], folder: Path) -> None:
    end = time.monotonic() + 300
    while len(metrics(folder)) < steps:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"no {steps} steps:\n{finish(process)[1]}")
        time.sleep(0.005)
    first, second = rank_processes(process.pid)
    second.send_signal(signal.SIGKILL)
    first.wait(60)  # the launcher ends the others


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_repeats_the_unbroken_one(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {folder: unused}\n" + CONFIG.replace("SOURCE", str(write_corpus(tmp_path))))
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"

    process = start(config, killed)
    kill_a_rank_after(7, process, killed)
    code, said = finish(process)
    assert code == 1 and "rank 1 was ended by SIGKILL" in said.splitlines()[-2]
    assert "run the same command again" in said.splitlines()[-1]
    done = len(metrics(killed))
    assert 7 <= done < STEPS, "killed too late to show anything"

    code, said = finish(start(config, killed))
    assert code == 0, said
    assert "resumed from" in said
    code, said = finish(start(config, unbroken))
    assert code == 0, said
    assert "resumed from" not in said

    assert [line[0] for line in repeated(killed)] == list(range(1, STEPS + 1))
    assert repeated(killed) == repeated(unbroken)
    losses = [line["loss"] for line in metrics(killed)]
    assert losses[-1] < losses[0] - 0.5
