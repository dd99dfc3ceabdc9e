"""Kill -9 at random moments of saves: whatever the moment, `latest` points to a whole checkpoint, every checkpoint with
a name is whole, and the run that is started again and again ends with the figures of one that was never broken.

The run saves after every step, in turn at once and in a fork; two ranks on a tensor-parallel layout. Part of
`make prove AREA=checkpoints`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.record import write_result
from checkpoint_tools.manifest import damage, read_manifest
from tests.training.test_killed_rank import CONFIG, finish, metrics, rank_processes, repeated, start, write_corpus
from training.checkpoint.folder import CheckpointFolder

KILLS = 30
STEPS = 200
LONGEST_SECONDS = 2.0


def main() -> int:
    """The campaign; 3 where something was lost."""
    draw = random.Random(1)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    killed, unbroken = folder / "killed", folder / "unbroken"
    corpus = write_corpus(folder)
    wrong: list[str] = []
    moments: list[dict[str, Any]] = []
    while len(moments) < KILLS:
        config = _config(folder, corpus, asynchronous=len(moments) % 2 == 1)
        moment = _killed_once(config, killed, draw)
        if moment is None:
            break
        moments.append(moment)
        wrong += _what_is_broken(killed)
        print(f"kill {len(moments)}: {moment}; {len(wrong)} wrong", flush=True)
    config = _config(folder, corpus, asynchronous=False)
    for run in (killed, unbroken):
        code, said = finish(start(config, run))
        if code != 0:
            wrong.append(said)
    if repeated(killed) != repeated(unbroken):
        wrong.append("the figures differ from those of the unbroken run")
    while_saving = sum(moment["unfinished"] for moment in moments)
    result = {"kills": moments, "while_saving": while_saving, "steps": len(metrics(unbroken)), "wrong": wrong}
    print(write_result("checkpoints_save", result))
    print(f"{len(moments)} kills, {while_saving} of them while a checkpoint was written, {len(wrong)} wrong")
    return 3 if wrong or len(moments) < KILLS or not while_saving else 0


def _config(folder: Path, corpus: Path, *, asynchronous: bool) -> Path:
    path = folder / "config.yaml"
    text = CONFIG.replace("SOURCE", str(corpus)).replace("train_steps: 30", f"train_steps: {STEPS}")
    text = text.replace(
        "checkpoint: {interval: 5}", f"checkpoint: {{interval: 1, asynchronous: {str(asynchronous).lower()}}}"
    )
    path.write_text("run: {folder: unused}\n" + text.replace("evaluation: {interval: 10", "evaluation: {interval: 100"))
    return path


def _killed_once(config: Path, run: Path, draw: random.Random) -> dict[str, Any] | None:
    """Start or resume, let it do a step, kill a rank or everything at a random moment. None: it came to its end."""
    before = len(metrics(run))
    process = start(config, run)
    while len(metrics(run)) <= before:
        if process.poll() is not None:
            _, said = finish(process)
            raise RuntimeError(f"ended before its first step:\n{said}")
        time.sleep(0.005)
    delay = draw.uniform(0, LONGEST_SECONDS)
    everything = draw.random() < 0.5
    time.sleep(delay)
    victims = rank_processes(process.pid) if process.poll() is None else []
    if not victims:
        finish(process)
        return None
    step = len(metrics(run))
    for victim in [psutil.Process(process.pid), *victims] if everything else [draw.choice(victims)]:
        _kill(victim)
    unfinished = bool(list((run / "checkpoints").glob(".step_*")))
    finish(process)
    for victim in victims:
        psutil.wait_procs([victim], timeout=30)
    return {"step": step, "seconds": round(delay, 3), "all": everything, "unfinished": unfinished}


def _kill(process: psutil.Process) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself just now


def _what_is_broken(run: Path) -> list[str]:
    folder = CheckpointFolder(run / "checkpoints")
    named = [folder.of_step(step) for step in folder.steps()]
    pointer = folder.path / "latest"
    wrong = []
    if pointer.is_file() and not (folder.path / pointer.read_text().strip()).is_dir():
        wrong.append(f"latest points to {pointer.read_text().strip()}, which is not there")
    for checkpoint in named:
        files = read_manifest(checkpoint).files
        wrong += [found for name, record in files.items() if (found := damage(checkpoint, name, record))]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
