"""What every rank process runs: `python -m launch.rank TASK JOB.json`. Started by `launch.local_ranks`.

Imports nothing heavy at the top: checkpoint writing starts helper processes that import this module again.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def let_ctrl_c_end_this() -> None:
    """Ctrl-C ends this process without a traceback, until a run listens to it and saves. The launcher says so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Run the task; an error that a person can mend is handed to the launcher as one message, without a traceback."""
    let_ctrl_c_end_this()
    from torch.distributed.elastic.multiprocessing.errors.error_handler import ErrorHandler

    from foundation.errors import OrthantError
    from launch.world import world_from_environment

    task, job = sys.argv[1], Path(sys.argv[2])
    world = world_from_environment()
    if world is None:
        raise SystemExit("python -m launch.rank is started by orthant, once a rank")
    handler = ErrorHandler()
    handler.initialize()
    try:
        if task == "train":
            from launch.training_run import train_as_rank

            train_as_rank(job, world)
        elif task == "verify":
            from launch.verification import verify_as_rank

            verify_as_rank(job, world)
        elif task == "generate":
            from launch.generation_run import generate_as_rank

            generate_as_rank(job, world)
        elif task == "evaluate":
            from launch.evaluation_run import evaluate_as_rank

            evaluate_as_rank(job, world)
        elif task == "align":
            from launch.alignment_run import align_as_rank

            align_as_rank(job, world)
        elif task == "ppo":
            from launch.ppo_run import ppo_as_rank

            ppo_as_rank(job, world)
        else:
            raise SystemExit(f"no task {task!r}")
    except OrthantError as error:
        handler.record_exception(error)
        return error.exit_code
    except Exception as error:
        handler.record_exception(error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
