"""`orthant rehearse CONFIG.yaml --world-size N [section.key=value ...]`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foundation.accelerators import GIB
from foundation.errors import RequestError, WorkError
from launch.checks import check_sizes
from launch.config import RunConfig, as_values, load_config
from launch.planner.from_config import PlannedBytes, planned_bytes
from launch.planner.vocabulary import vocabulary_of
from launch.terminal import say
from parallel.layout import ParallelLayout

PROCESSES = 2
"""Stages rehearsed at once; each process takes about 1 GB."""

CORES_WORDS: tuple[tuple[str, str, str], ...] = (
    (
        "is out of range",
        "training.recompute_num_layers takes more layers than are left in the stage's chunk",
        "training.recompute_num_layers=1",
    ),
    ("must be divisible", "one size does not divide another", "sizes under parallel and model that divide"),
    ("not supported", "megatron-core does not support the combination", "one of the two settings left out"),
)
"""(words in core's message, what they mean, what helps)."""


@dataclass(frozen=True)
class Rehearsed:
    """A stage as it was built, beside what the planner said it would hold."""

    found: dict[str, Any]
    planned: PlannedBytes


def rehearse(config_path: Path, overrides: list[str], *, world_size: int, as_json: bool) -> None:
    """Build and run every stage of a run at its world size, on no memory.

    Raises:
        RequestError: the configuration cannot run, by our rules or by core's.
        WorkError: a rehearsing process died.
    """
    config = load_config(config_path, overrides)
    layout = check_sizes(config, world_size=world_size)
    vocab_size = vocabulary_of(config)
    started = time.monotonic()
    say(f"rehearsing {layout.pp} stages of {layout.describe()}, {world_size} ranks")
    stages = _rehearse_all(config, layout, vocab_size)
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps(_as_values(stages, layout, seconds), indent=2))
    else:
        _print_table(stages, layout, seconds)


def _rehearse_all(config: RunConfig, layout: ParallelLayout, vocab_size: int) -> list[Rehearsed]:
    job = {"config": as_values(config), "world_size": layout.world_size, "vocab_size": vocab_size}
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="orthant-rehearse-") as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        workers = min(PROCESSES, layout.pp)
        # Ends first: the stages that differ from the rest tell most.
        order = sorted(range(layout.pp), key=lambda stage: min(stage, layout.pp - 1 - stage))
        logs = [Path(folder) / f"{number}.log" for number in range(workers)]
        processes = [_start(path, order[number::workers], log) for number, log in enumerate(logs)]
        try:
            for process, log in zip(processes, logs, strict=True):
                found += _results(process, layout.pp, log)
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    return [
        Rehearsed(one, _planned(config, layout, vocab_size, one))
        for one in sorted(found, key=lambda one: one["stage"])
    ]  # fmt: skip


def _start(job: Path, stages: list[int], log: Path) -> subprocess.Popen[str]:
    """Its warnings go to a file: the pipes of processes that are not heard yet would fill, and they wait for ever."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "launch.rehearsal_worker", str(job), *map(str, stages)]
    with open(log, "wb") as errors:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)


def _results(process: subprocess.Popen[str], stages: int, log: Path) -> list[dict[str, Any]]:
    found = []
    assert process.stdout is not None
    for line in process.stdout:
        one = json.loads(line)
        if one["found"] == "Refused":
            raise refusal(one)
        if one["found"] == "Impossible":
            raise WorkError(one["what"], cure=one["cure"])
        found.append(one)
        say(f"stage {one['stage']} of {stages} built and run")
    if process.wait():
        said = log.read_text(errors="replace")
        last = said.strip().splitlines()[-1] if said.strip() else f"exit code {process.returncode}"
        raise WorkError(f"a rehearsing process died: {last}", cure="more memory, or report it with the lines above")
    return found


def refusal(found: dict[str, Any]) -> RequestError:
    """What core refused, in our words, with its own beside them."""
    message = " ".join(str(found["message"]).split()) or "it says nothing"
    known = next(((rule, cure) for words, rule, cure in CORES_WORDS if words in message.lower()), None)
    rule = known[0] if known else "megatron-core asserts it does not hold here"
    return RequestError(
        f"megatron-core refuses this configuration at stage {found['stage']}, {found['phase']}",
        where=f"{found['place']} ({found['kind']})",
        rule=f"{rule}; core says: {message}",
        cure=known[1] if known else "change the setting that core's message names",
    )


def _planned(config: RunConfig, layout: ParallelLayout, vocab_size: int, found: dict[str, Any]) -> PlannedBytes:
    return planned_bytes(config, layout, vocab_size, found["stage"], found["micro_batches"])


def _as_values(stages: list[Rehearsed], layout: ParallelLayout, seconds: float) -> dict[str, Any]:
    return {
        "layout": layout.describe(),
        "world_size": layout.world_size,
        "seconds": round(seconds, 1),
        "stages": [{**one.found, "planned": asdict(one.planned)} for one in stages],
    }


def _print_table(stages: list[Rehearsed], layout: ParallelLayout, seconds: float) -> None:
    print(f"{layout.describe()}: {layout.pp} stages built and run at {layout.world_size} ranks in {seconds:.0f} s")
    print("GiB of the first rank of each stage, counted / planned; activations of the micro-batches that were run\n")
    print("  stage  parameters         weights       gradients       optimizer     activations   tensors to save")
    for one in stages:
        cells = "".join(
            f"{one.found[name] / GIB:>8.2f}/{getattr(one.planned, name) / GIB:<7.2f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        print(
            f"  {one.found['stage']:>5}  {one.found['parameters'] / 1e9:>8.3f} B{cells}  "
            f"{one.found['checkpoint_tensors']:>6}"
        )
