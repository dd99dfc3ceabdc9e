"""A rank of a real run is killed with SIGKILL; the same command run again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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


FAULT = """
import os, sys
if "launch.rank" in sys.orig_argv and os.environ["RANK"] == "1":
    from parallel.platform import install
    install()
    import launch.training_run as training_run
    assemble = training_run.assemble_trainer
    def assemble_with_fault(*given):
        trainer = assemble(*given)
        trainer._gradients_ready = lambda step, _: step != STEP or os.kill(os.getpid(), SIGNAL)
        return trainer
    training_run.assemble_trainer = assemble_with_fault
"""


def fault(folder: Path, number: signal.Signals, step: int) -> Path:
    """For `start`: rank 1 sends itself the signal in the middle of `step`, however fast it or this process is."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULT.replace("STEP", str(step)).replace("SIGNAL", str(int(number))))
    return folder


def start(config: Path, folder: Path, modules: Path | None = None) -> subprocess.Popen[str]:
    """`orthant train`; modules in the folder `modules` are found first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {
        "PYTHONPATH": f"{modules}:{REPOSITORY}" if modules else str(REPOSITORY),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "launch", "train", str(config), f"run.folder={folder}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=500)
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_repeats_the_unbroken_one(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {folder: unused}\n" + CONFIG.replace("SOURCE", str(write_corpus(tmp_path))))
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"

    code, said = finish(start(config, killed, fault(tmp_path / "fault", signal.SIGKILL, 8)))
    assert code == 1 and "rank 1 was ended by SIGKILL" in said.splitlines()[-2], said
    assert "run the same command again" in said.splitlines()[-1]
    assert len(metrics(killed)) == 7

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
