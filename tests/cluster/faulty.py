"""`python -m tests.cluster.faulty -m launch train ...`: a rank of a run that a test slows down and hurts. So does the
rank of torchrun, `-u -m launch.logged_rank LOGS train ...`; what starts ranks (`-m launch.torchrun`) is left as it is.

Files in the run's folder say how, while it runs: `pace` (seconds that a step takes at least), `nan-RANK` (poison the
gradients of that rank once), `sleep-RANK` (that rank sleeps for an hour), `stop-RANK` and `kill-RANK` (it stops or
kills itself) and `nudge-RANK` (each weight of that rank moves by at most half a rounding, on all ranks alike); all but
the first are taken away when seen.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

PACE, NAN, SLEEP, NUDGE = "pace", "nan-{rank}", "sleep-{rank}", "nudge-{rank}"
SIGNALS = {"stop-{rank}": signal.SIGSTOP, "kill-{rank}": signal.SIGKILL}


def hurt(folder: Path, rank: int, trainer: Any) -> None:
    """Let `trainer` look for faults after each backward pass."""

    def gradients_ready(step: int, state: Any) -> None:
        from training.slices import gradient_slices

        began = time.monotonic()
        if _taken(folder / SLEEP.format(rank=rank)):
            time.sleep(3600)
        for name, number in SIGNALS.items():
            if _taken(folder / name.format(rank=rank)):
                os.kill(os.getpid(), number)
        if _taken(folder / NAN.format(rank=rank)):
            for part in gradient_slices(state):  # all of it: of one value another replica may own the update
                part.tensor.fill_(float("nan"))
        if _taken(folder / NUDGE.format(rank=rank)):
            _nudge(state)
        while (left := began + _pace(folder) - time.monotonic()) > 0:  # the pace may change meanwhile
            time.sleep(min(left, 0.05))

    trainer._gradients_ready = gradients_ready


def _nudge(state: Any) -> None:
    import torch

    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for chunk in state.chunks:
            for weight in chunk.parameters():
                weight.mul_(1 + (torch.rand(weight.shape, generator=draw) - 0.5) * torch.finfo(torch.float32).eps)


def _taken(path: Path) -> bool:
    """Whether the file was there."""
    there = path.exists()
    path.unlink(missing_ok=True)
    return there


def _pace(folder: Path) -> float:
    try:
        return float((folder / PACE).read_text())
    except (OSError, ValueError):
        return 0.0


def with_faults(assemble: Any) -> Any:
    """`launch.training_run.assemble_trainer`, whose trainers look for faults."""

    def assemble_with_faults(sections: Any, folder: Path, *others: Any) -> Any:
        trainer = assemble(sections, folder, *others)
        world = next(other for other in others if type(other).__name__ == "World")
        hurt(folder, world.rank, trainer)
        return trainer

    return assemble_with_faults


if __name__ == "__main__":
    words = sys.argv[1:]
    module = words[words.index("-m") + 1]
    if module != "launch.torchrun":
        import launch.training_run as training_run

        training_run.assemble_trainer = with_faults(training_run.assemble_trainer)
    sys.argv = words[words.index("-m") + 1 :]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
