"""Start the ranks of a run on this machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Any
from uuid import uuid4

from foundation.errors import OrthantError, RequestError, WorkError


def run_ranks(world_size: int, module: str, *arguments: str) -> None:
    """Run `python -m module arguments...` as `world_size` ranks and wait for all of them.

    Raises:
        RequestError, WorkError: what the first rank that failed said; the launcher ends the others.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # we say what it would, shorter
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid4().hex,
        max_restarts=0,
        monitor_interval=0.1,
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    os.environ["PYTHONSAFEPATH"] = "1"  # a person's own data.py must not shadow ours
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        raise _what_a_rank_said(error) from None
    except SignalException as error:
        raise WorkError(
            f"stopped by {error.sigval.name}",
            cure="run the same command again: it continues from the newest checkpoint",
        ) from None


def _what_a_rank_said(error: Any) -> OrthantError:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return WorkError(
            f"rank {rank} was ended by {name}",
            cure="run the same command again: it continues from the newest checkpoint",
        )
    message = failure.message if isinstance(failure.message, str) else failure.message["message"]
    if failure.exitcode == RequestError.exit_code:
        return RequestError(message)
    return WorkError(f"rank {rank} failed: {message}")
