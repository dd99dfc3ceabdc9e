"""Kill a rank of a PPO run again and again, and compare how it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import ROOT
from checkpoint_tools.convert import convert
from checkpoint_tools.planning import Form
from tests.checkpoint_tools.models import saved_model
from tests.launch.test_alignment import write_sets, write_tokenizer
from tests.launch.test_ppo import REWARD, decided, values

ITERATIONS, BATCH = 24, 8
LIMIT = 240.0


def killed(folder: Path, times: int) -> dict[str, Any]:
    """Figures: kills, lives, and whether what was left alone and what was not differ."""
    prepare(folder)
    whole = subprocess.run(command("whole"), cwd=folder, env=environment(), timeout=LIMIT, check=True)
    draw, ends = random.Random(7), []
    for life in range(times):
        ends.append(one_life(folder, draw, life))
        print(f"life {life + 1}: {ends[-1]}", flush=True)
    subprocess.run(command("hit"), cwd=folder, env=environment(), timeout=LIMIT, check=True)
    last = Path("checkpoints") / f"step_{ITERATIONS:08d}"
    apart = [name for name in ("", "critic") if differs(folder / "whole" / name / last, folder / "hit" / name / last)]
    records = [read(folder / run / "metrics.jsonl") for run in ("whole", "hit")]
    samples = [one["sample"] for one in read(folder / "hit" / "samples.jsonl")]
    lost = sorted(set(range(ITERATIONS * BATCH)) ^ set(samples)) + [one for one in samples if samples.count(one) > 1]
    return {
        "kills": times,
        "kills_ends": ends,
        "kills_apart": float(len(apart) + (decided(records[0]) != decided(records[1])) + len(lost)),
        "kills_exit_code": whole.returncode,
    }


def prepare(folder: Path) -> None:
    saved_model("llama3", folder / "hf")
    write_tokenizer(folder / "hf")
    write_sets(folder)
    convert(folder / "hf", folder / "init", Form("distributed"))
    (folder / "rewards.py").write_text(REWARD)
    apart = {"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [1, 1]}
    given = values(folder, "whole", ITERATIONS, placement=apart, init={"checkpoint": str(folder / "init")})
    given["ppo"] |= {"samples_shown": BATCH}
    (folder / "ppo.yaml").write_text(yaml.safe_dump(given | {"checkpoint": {"interval": 1}}))


def one_life(folder: Path, draw: random.Random, life: int) -> str:
    """Start the run, kill one of its ranks once it has gone on by an iteration or two; how the others ended."""
    before, more = len(read(folder / "hit" / "metrics.jsonl")), draw.randint(1, 2)
    run = subprocess.Popen(
        command("hit"), cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + LIMIT
    while len(read(folder / "hit" / "metrics.jsonl")) < before + more:
        if run.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"life {life} did not go on: {run.stderr.read() if run.stderr else ''}")
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.3))
    ranks = children(run.pid)
    os.kill(ranks[draw.randrange(len(ranks))], signal.SIGKILL)
    hit = time.monotonic()
    _, said = run.communicate(timeout=90)
    return f"exit {run.returncode} after {time.monotonic() - hit:.1f} s: {said.strip().splitlines()[-2][:120]}"


def children(parent: int) -> list[int]:
    """Ranks of a launcher: its children that run launch.rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, status = (path / "cmdline").read_bytes(), (path / "stat").read_text()
        except OSError:
            continue
        if b"launch.rank" in line and int(status.rsplit(")", 1)[1].split()[1]) == parent:
            found.append(int(path.name))
    return sorted(found)


def differs(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold other tensors."""
    asked = [sys.executable, "-P", "-m", "launch", "ckpt", "diff", str(one), str(other)]
    return subprocess.run(asked, env=environment(), check=False, stdout=subprocess.DEVNULL).returncode != 0


def command(run: str) -> list[str]:
    return [sys.executable, "-P", "-m", "launch", "ppo", "ppo.yaml", f"run.folder={run}"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def read(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a .jsonl."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
