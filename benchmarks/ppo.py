"""PPO's speed: streamed against sequential on the same placement, and beside TRL's PPOTrainer on the same work.

    quiet .venv/bin/python -m benchmarks.ppo [--trl FOLDER] [overlap t1 10m]

FOLDER: `pip install --target FOLDER --no-deps trl==1.12.0 accelerate`; without it TRL is left out. Two ranks of one
thread each. Lengths are heavy-tailed: a model that knows nothing ends an answer with one token in seven.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

from benchmarks.prove._ppo_tasks import play_long, timed  # noqa: E402  (core comes after the platform)
from benchmarks.record import RESULTS, ROOT, write_result  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from tests.alignment import task  # noqa: E402
from tests.alignment.ppo.cases import Game  # noqa: E402
from tests.ranks import RankPool  # noqa: E402

ROUNDS, ITERATIONS = 3, 6
BESIDE: Any = (("actor", "generation"), ("critic", "reference", "reward"))
AHEAD: Any = (("actor", "critic"), ("generation", "reference", "reward"))
WORK: dict[str, Any] = {
    "batch": 64,
    "micro": 8,
    "group": 8,
    "iterations": ITERATIONS,
    "max_new_tokens": 32,
    "beta": 0.05,
    "lr": 1e-6,
    "model": {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "max_position_embeddings": 64},
}
AGAINST_TRL: dict[str, dict[str, Any]] = {
    "t1": {
        "batch": 256,
        "max_new_tokens": 4,
        "vocab_size": 8,
        "iterations": 8,
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "max_position_embeddings": 16,
        },
    },
    "10m": {
        "batch": 32,
        "max_new_tokens": 128,
        "vocab_size": 512,
        "iterations": 3,
        "model": {
            "num_layers": 6,
            "hidden_size": 384,
            "ffn_hidden_size": 1024,
            "num_attention_heads": 6,
            "num_query_groups": 6,
            "max_position_embeddings": 160,
        },
    },
}


def main() -> int:
    """Measure, print, write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help="overlap, t1, 10m; all where none is named")
    parser.add_argument("--trl", type=Path)
    asked = parser.parse_args()
    parts, figures = asked.parts or ["overlap", "t1", "10m"], dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(Path(folder))
        try:
            if "overlap" in parts:
                figures |= overlap(pool, Path(folder))
            for name in (name for name in AGAINST_TRL if name in parts):
                figures |= beside_trl(pool, Path(folder), name, asked.trl)
        finally:
            pool.close()
    path = RESULTS / "ppo_speed.json"
    before = json.loads(path.read_text()) if asked.parts and path.is_file() else {}
    kept = {name: value for name, value in before.items() if name != "surroundings"}
    print(json.dumps(figures, indent=1))
    print(write_result("ppo_speed", kept | figures))
    return 0


def overlap(pool: RankPool, folder: Path) -> dict[str, Any]:
    """Seconds of an iteration, median over rounds that take turns; the first iteration of a run is not counted."""
    game = Game({}, tuple(task.prompts(16)), folder / "run", timeout=600, **WORK)
    stations = {"beside": BESIDE, "ahead": AHEAD}
    runs = {
        f"{name}, {how}": replace(game, stations=stations[name], ranks=(1, 1), ppo=ppo)
        for name, how, ppo in (
            ("beside", "sequential", {"stream": False}),
            ("beside", "streamed", {}),
            ("ahead", "sequential", {"stream": False}),
            ("ahead", "streamed", {}),
            ("ahead", "staleness 1", {"staleness": 1}),
        )
    }
    both = ParallelLayout(data_parallel_size=2)
    runs["all roles on two replicas"] = replace(game, ranks=(2,), layouts={"actor": both}, ppo={})
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, one in runs.items():
            records = pool.run(2, play_long, one, timeout=600)[0].records
            seconds[name].append(statistics.mean(record["step_seconds"] for record in records[1:]))
    taken = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "overlap_work": WORK,
        "overlap_seconds": taken,
        "overlap_all_rounds": seconds,
        "speedup_staleness_0": taken["beside, sequential"] / taken["beside, streamed"],
        "speedup_staleness_1": taken["ahead, sequential"] / taken["ahead, staleness 1"],
    }


def beside_trl(pool: RankPool, folder: Path, name: str, trl: Path | None) -> dict[str, Any]:
    """CPU seconds of an iteration on one rank, ours and TRL's; the first one is not counted."""
    work = AGAINST_TRL[name]
    asked = tuple(task.prompts(16))
    game = Game(
        {},
        asked,
        folder / name,
        batch=work["batch"],
        micro=work["batch"] // 4,
        group=work["batch"],
        iterations=work["iterations"] + 1,
        beta=0.05,
        max_new_tokens=work["max_new_tokens"],
        vocab_size=work["vocab_size"],
        model=work["model"] | {"make_vocab_size_divisible_by": 1},
        timeout=600,
    )
    ends = pool.run(1, timed, game, timeout=900)[0]
    found: dict[str, Any] = {"ours": (ends[-1] - ends[0]) / (len(ends) - 1)}
    if trl is not None:
        job = folder / f"{name}.json"
        job.write_text(json.dumps(work | {"prompts": asked, "iterations": work["iterations"] + 1}))
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks._ppo_trl", str(job)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{trl}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        answer = json.loads(done.stdout.splitlines()[-1])
        found["trl"] = (answer["ends"][-1] - answer["ends"][0]) / (len(answer["ends"]) - 1)
        found["trl_over_ours"] = found["trl"] / found["ours"]
        found["parameters"] = answer["parameters"]
    return {f"cpu_seconds_{name}": found}


if __name__ == "__main__":
    sys.exit(main())
