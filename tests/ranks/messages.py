"""What pytest and a worker say to each other. Everything is pickled; both ends are our own processes."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One rank's share of a run."""

    module: str
    qualified_name: str
    arguments: bytes
    """pickle of (args, kwargs); opened in the rank, so that what fails to import there is that rank's failure."""
    rank: int
    world_size: int
    timeout: float
    """Seconds that pytest waits; collectives wait longer, so that pytest is the first to speak."""
    log: Path
    """Takes stdout and stderr of the rank while the job runs. The store of the run lies beside it."""


@dataclass(frozen=True)
class Returned:
    """The function returned: pickle of its value."""

    value: bytes


@dataclass(frozen=True)
class Raised:
    """The function raised."""

    at: float
    """time.monotonic() in the rank: one clock for all processes of a machine."""
    traceback: str
    exception: bytes | None
    """pickle of the exception, None where it can't be pickled."""


@dataclass(frozen=True)
class Clean:
    """Asks a rank to take down its process groups. Sent only when no other rank of the run needs them any more."""


@dataclass(frozen=True)
class Cleaned:
    """The rank is as it was before the run, or `problem` says why not; `worn` where something keeps threads alive."""

    problem: str | None
    worn: bool = False


def reference_to(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and qualified name under which a worker finds `function`.

    Raises:
        TypeError: it isn't an importable top-level function (a lambda, a nested function, a bound method).
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module in (None, "__main__") or name is None or resolve(module, name) is not function:
        raise TypeError(
            f"{function!r} can't be sent to ranks: they import it by name, so it must be a function "
            "at the top level of a module (no lambda, no nested function, no bound method)"
        )
    return module, name


def resolve(module: str, qualified_name: str) -> Any:
    """The object of that name, None when the name leads nowhere."""
    found: Any = importlib.import_module(module)
    for part in qualified_name.split("."):
        found = getattr(found, part, None)
    return found


def send(connection: Connection, message: object) -> None:
    """Plain pickle: Connection.send would use torch's reductions, which pass tensors through shared memory files."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """The next message. Raises EOFError when the other end is gone."""
    try:
        message = connection.recv_bytes()
    except OSError as error:  # reset, or ended in the middle of a message
        raise EOFError from error
    return pickle.loads(message)
