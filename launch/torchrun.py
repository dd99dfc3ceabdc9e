"""The ranks of one node of a Slurm job: `srun --ntasks-per-node=1 python -m launch.torchrun RANKS LOGS COMMAND ...`.

torchrun, and what it lacks under Slurm: ranks are numbered in Slurm's order of the nodes, USR1 (the request to save, of
which torchrun would die) is passed on to the ranks, each of them writes LOGS/NODE-RANK.log, and the exit code is that
of the rank that failed first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping

from foundation.errors import FaultError, RequestError
from launch.local_ranks import usr1_reaches_ranks
from launch.terminal import print_error

NEEDED = ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "MASTER_ADDR", "MASTER_PORT")

TIME_TO_SAVE = "3600"
"""Seconds that ranks get after a TERM, in place of 30. Slurm ends them earlier, after its GraceTime or KillWait."""


def main() -> int:
    """Start the ranks of this node and wait for them.

    Returns:
        0, or the exit code of the rank of this node that failed first: 128 + N where signal N ended it.

    Raises:
        RequestError: Slurm or the batch script does not say which node this is.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks say it themselves
    arguments = torchrun_arguments(int(sys.argv[1]), sys.argv[2], sys.argv[3:], os.environ)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE)
    try:
        with usr1_reaches_ranks():
            run(parse_args(arguments))
    except ChildFailedError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another node that ends first has srun end this one: code 143
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"rank {rank} ended first, with exit code {code}", file=sys.stderr)
        return code
    except SignalException as error:
        print(f"ended by {error.sigval.name}", file=sys.stderr)
        return FaultError.exit_code
    return 0


def torchrun_arguments(ranks: int, logs: str, command: list[str], environment: Mapping[str, str]) -> list[str]:
    """What torchrun is told on this node.

    Args:
        ranks: on each node.
        logs: folder of the ranks' logs.
        command: of `orthant`, with its arguments.
        environment: of this task of the step.

    Raises:
        RequestError: a variable of NEEDED is not set.
    """
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise RequestError(
            f"{', '.join(missing)} is not set",
            rule="python -m launch.torchrun is one task of srun on each node",
            cure="ORTHANT_LAUNCHER=torchrun sbatch slurm/pretrain.sbatch CONFIG.yaml",
        )
    node, nodes, address, port = (environment[name] for name in NEEDED)
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        f"--nproc-per-node={ranks}",
        f"--master-addr={address}",
        f"--master-port={port}",
        "--max-restarts=0",  # the job is requeued instead
        "--module",
        "launch.logged_rank",
        logs,
        *command,
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RequestError as error:
        print_error(error)
        sys.exit(error.exit_code)
