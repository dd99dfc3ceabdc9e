"""A tiny training run on the cluster that faults are done to, and the same run unbroken."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.cluster import Cluster
from tests.cluster.faulty import NAN, PACE, SLEEP
from tests.cluster.jobs import Job
from tests.cluster.waiting import PATIENCE, Found, wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "slurm" / "pretrain.sbatch"
EXACT = ("step", "loss", "grad_norm", "lr", "tokens")
SECONDS = 2 * PATIENCE
LIMIT_MINUTES = 30
QUICK = 0.4
"""Pace at which steps are waited for; at a run's own, slower one its steps last while another one is waited for."""
CONFIG = """
run: {folder: run}
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2,
        max_position_embeddings: 32}
parallel: {parallel}
data: {sources: [SOURCE], tokenizer: {kind: byte-bpe, vocab_size: 280}}
training: {train_steps: STEPS, global_batch_size: 4, seq_length: 32}
optimizer: {lr: 1.0e-3, adam_eps: 1.0e-6}
schedule: {warmup_steps: 3}
checkpoint: {interval: INTERVAL, keep_last: 2}
guards: {on_nan: rollback, max_rollbacks: 1000}
watchdog: {timeout_seconds: TIMEOUT}
preflight: {min_free_gib: 0.1}
"""


@dataclass(frozen=True)
class Shape:
    """What is trained: steps, checkpoint interval, the watchdog's patience and the layout."""

    steps: int
    interval: int = 5
    timeout: float = 10.0
    parallel: str = "{}"


def write_config(folder: Path, shape: Shape) -> Path:
    """A corpus and a configuration in `folder`."""
    words = "the lake was calm and the wind turned over the reeds while birds slept".split()
    texts = [" ".join(words[(start * 7 + i * i) % len(words)] for i in range(40)) for start in range(120)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(texts)))
    given = {
        "{parallel}": shape.parallel,
        "SOURCE": str(corpus),
        "STEPS": str(shape.steps),
        "INTERVAL": str(shape.interval),
        "TIMEOUT": str(float(shape.timeout)),
    }
    text = CONFIG
    for name, value in given.items():
        text = text.replace(name, value)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; one that is being written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in lines if text[-1] == "\n"]


def figures(folder: Path) -> list[dict[str, Any]]:
    """What has to agree of each line of metrics.jsonl."""
    return [{name: line[name] for name in EXACT} for line in lines_of(folder / "metrics.jsonl")]


def write_interpreter(folder: Path) -> Path:
    """What starts ranks that a test slows down and hurts (tests.cluster.faulty), in place of an interpreter."""
    path = folder / "rank"
    path.write_text(f'#!/bin/bash\nexec "{REPOSITORY}/.venv/bin/python" -m tests.cluster.faulty "$@"\n')
    path.chmod(0o755)
    return path


def unbroken(folder: Path, shape: Shape, world_size: int) -> subprocess.Popen[str]:
    """The same run on this machine, without faults, in `folder`/run."""
    folder.mkdir(parents=True)
    config = write_config(folder, shape)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    return subprocess.Popen(
        [*ranks, "-m", "launch", "train", str(config)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


class HurtRun:
    """One run, submitted with slurm/pretrain.sbatch, and what is done to it."""

    def __init__(self, cluster: Cluster, folder: Path, shape: Shape, *size: str, pace: float, partition: str = "all"):
        self.cluster, self.home, self.shape = cluster, folder, shape
        self.folder = folder / "run"
        self.folder.mkdir(parents=True)
        self.pace = pace
        self.set_pace(pace)
        config, python = write_config(folder, shape), write_interpreter(folder)
        self.size = (f"--partition={partition}", "--cpus-per-task=1", "--gpus-per-node=0", *size)
        self.environment = {
            "ORTHANT_HOME": str(REPOSITORY),
            "ORTHANT_PYTHON": str(python),
            "ORTHANT_INTERFACE": "eth0",
            "ORTHANT_MAX_FAULTS": "1000",
        }
        self._config = config
        self.number = self.submit(*self.size)

    def submit(self, *size: str) -> int:
        """Start it (again) as another job."""
        self.number = self.cluster.sbatch(*size, SCRIPT, self._config, cwd=self.home, environment=self.environment)
        return self.number

    # What it has done

    def job(self) -> Job:
        return self.cluster.job(self.number)

    def saved(self) -> int:
        """Step of the newest checkpoint."""
        return int((self.folder / "checkpoints" / "latest").read_text().removeprefix("step_"))

    def done(self) -> int:
        """Steps in metrics.jsonl."""
        lines = figures(self.folder)
        return lines[-1]["step"] if lines else 0

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Of this run, of one kind."""
        return [event for event in lines_of(self.folder / "events.jsonl") if event["event"] == kind]

    def lives(self) -> int:
        """Starts that came as far as their first step."""
        return len(self.events("begin"))

    def said(self) -> str:
        """Everything that the jobs and their ranks wrote."""
        paths = sorted(self.home.glob("*.out")) + sorted(self.home.glob("logs/*/*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths)

    def wait_steps(self, more: int, seconds: float = SECONDS) -> int:
        """Until `more` steps are done than now."""
        wanted = self.done() + more

        def done() -> int | None:
            return self.done() if self.done() >= wanted and self.runs() else None

        return self._wait_quickly(f"job {self.number} has done step {wanted}", done, seconds)

    def runs(self) -> bool:
        return self.job().state == "RUNNING"

    def wait_life(self, number: int, seconds: float = SECONDS) -> None:
        """Until it has begun for the `number`th time and done a step."""

        def lives_and_steps() -> bool:
            begun = self.events("begin")
            return len(begun) >= number and self.done() >= begun[-1]["first_step"]

        self._wait_quickly(f"life {number} of job {self.number} steps", lives_and_steps, seconds)

    def _wait_quickly(self, what: str, look: Callable[[], Found | None], seconds: float) -> Found:
        self.set_pace(min(self.pace, QUICK))
        try:
            return wait_until(what, look, seconds, self.said)
        finally:
            self.set_pace(self.pace)

    # What is done to it

    def set_pace(self, seconds: float) -> None:
        """A step takes at least so long."""
        (self.folder / PACE).write_text(str(seconds))

    def poison(self, rank: int) -> None:
        """A gradient of `rank` becomes NaN in the next step."""
        (self.folder / NAN.format(rank=rank)).touch()

    def let_stop(self, rank: int) -> None:
        """A rank stops itself in its next step: where a test looks at what the others wait in, and not in a save."""
        self.set_pace(QUICK)
        (self.folder / f"stop-{rank}").touch()

    def let_die(self, rank: int) -> None:
        """A rank kills itself in its next step."""
        self.set_pace(QUICK)
        (self.folder / f"kill-{rank}").touch()

    def send_to_sleep(self, rank: int) -> None:
        """A rank hangs in its own code, alive."""
        (self.folder / SLEEP.format(rank=rank)).touch()

    def nodes(self) -> list[str]:
        """Of the job, in the order of its ranks."""
        return self.cluster.controller.run("scontrol", "show", "hostnames", self.job().nodes).stdout.split()

    def process(self, rank: int) -> psutil.Process:
        """The process of a rank, as it is counted out here."""

        def look() -> psutil.Process | None:
            for process in psutil.process_iter(["cmdline"]):
                try:
                    if "tests.cluster.faulty" not in (process.info["cmdline"] or ()):
                        continue
                    environment = process.environ()
                    if environment.get("ORTHANT_PYTHON") != self.environment["ORTHANT_PYTHON"]:
                        continue  # another cluster on this computer counts its jobs from 1, too
                    parent = process.parent()
                    is_child = parent is not None and "faulty" in " ".join(parent.cmdline())
                except psutil.Error:  # it has ended meanwhile
                    continue
                who = environment.get("SLURM_JOB_ID"), environment.get("SLURM_PROCID")
                if who == (str(self.number), str(rank)) and not is_child:
                    return process
            return None

        return wait_until(f"rank {rank} of job {self.number} is there", look, otherwise=self.said)

    def stop(self, rank: int) -> None:
        """Stop a rank, as a debugger or a broken driver does."""
        self.process(rank).send_signal(signal.SIGSTOP)

    def kill(self, rank: int) -> None:
        """Kill a rank without a last word."""
        self.process(rank).send_signal(signal.SIGKILL)

    def shorten_time(self) -> None:
        """Bring the job's time limit so near that Slurm sends its warning."""
        answer = self.cluster.controller.run("squeue", "--noheader", f"--job={self.number}", "--format=%M")
        minutes = int(re.split("[:-]", answer.stdout.strip())[-2])  # [[days-]hours:]minutes:seconds, below an hour here
        self.cluster.controller.run("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes + 2}")

    def give_time_back(self) -> bool:
        """The time limit that the job had, or a later life would be warned at once; whether Slurm takes it now."""
        command = ("scontrol", "update", f"JobId={self.number}", f"TimeLimit={LIMIT_MINUTES}")
        return self.cluster.controller.run(*command, check=False).returncode == 0

    def finish(self, seconds: float = SECONDS, states: Sequence[str] = ("COMPLETED",)) -> Job:
        """At full speed to the end."""
        self.pace = 0.0
        self.set_pace(0.0)
        return self.cluster.wait(self.number, states, seconds)
