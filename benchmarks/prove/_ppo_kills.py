"""Kill a rank of a PPO run again and again, and compare how it ends."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from alignment.ppo.rows import Rollout
from tests.alignment import task
from tests.alignment.ppo.cases import Game, Played, play, score, write_tokenizer
from tests.ranks import RankFailure, RankPool

ITERATIONS, BATCH = 16, 32
BESIDE: Any = (("actor", "generation"), ("critic", "reference", "reward"))


def killed(pool: RankPool, folder: Path, times: int, name: str = "kills", **told: Any) -> dict[str, Any]:
    """Figures, named after `name`: how the other rank ended each time, and what differs from a run that was left alone.

    A batch with a sample lost or twice ends a run, so that what reaches its end has learned from each answer once.
    """
    write_tokenizer(folder / "tokenizer")
    game = Game({}, tuple(task.prompts(16)), folder / "whole", batch=BATCH, micro=4, group=8, iterations=ITERATIONS)
    game = replace(game, **{"stations": BESIDE, "ranks": (1, 1), "interval": 1, "keeps": True, "timeout": 60.0} | told)
    whole = pool.run(2, play, game, timeout=300)
    hit, draw, ends = replace(game, folder=folder / "hit"), random.Random(7), list[str]()
    reached = 0
    for life in range(times):
        victim, more, delay = draw.randrange(2), draw.randint(0, 2), draw.uniform(0, 0.4)
        at = min(reached + more, ITERATIONS - 1)
        try:
            pool.run(2, play_and_be_killed, hit, victim, at, delay, timeout=120)
            raise RuntimeError(f"life {life} was not ended")
        except RankFailure as failure:
            other = [one for one in failure.failures if one.rank != victim]
            ends.append(f"rank {victim} killed: {other[0].headline if other else 'none'}; {said(other[0].detail)}")
        checkpoints = sorted((hit.folder / "checkpoints").glob("step_*"))
        reached = int(checkpoints[-1].name[-8:]) if checkpoints else 0
        print(f"life {life + 1}, {reached} iterations: {ends[-1]}", flush=True)
    rest = pool.run(2, play, hit, timeout=300)
    left, hurt = hashes(whole), hashes(rest)
    apart = sum(left[model] != hurt[model] for model in left)
    return {name: times, f"{name}_ends": ends, f"{name}_iterations": ITERATIONS, f"{name}_apart": float(apart)}


def play_and_be_killed(game: Game, victim: int, at: int, delay: float) -> Played:
    """Rank `victim` gets SIGKILL `delay` seconds into iteration `at`."""
    here = dist.get_rank()

    def arm() -> None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    def begun(iteration: int, what: str) -> None:
        if here == victim and (iteration, what) == (at, "order"):
            arm()

    def judged(rollout: Rollout) -> list[float]:
        if here == victim and int(rollout.sample_ids[0]) == at * game.batch:
            arm()
        return score(rollout)

    return play(game, hook=begun, scored=judged)


def said(detail: str) -> str:
    """The message in a traceback."""
    lines = [line for line in detail.splitlines() if "lost rank" in line]
    return lines[0].strip()[:140] if lines else "no message"


def hashes(played: list[Played]) -> dict[str, str]:
    """Of weights and moments, by their names, of all stations."""
    return {name: value for one in played for name, value in one.hashes.items()}
