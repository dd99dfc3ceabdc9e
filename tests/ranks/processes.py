"""Starting, signalling and ending the template and its workers, as seen from pytest."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from tests.ranks.messages import send

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 180.0
STACKS_SECONDS = 60.0
STACKS_SIGNAL = signal.SIGUSR1
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def free_port() -> int:
    """One of this machine that nobody listens at; whoever uses it is quick."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Template:
    """The process that forks workers."""

    def __init__(self, folder: Path) -> None:
        """Start it and return at once; the first request waits until it has imported everything."""
        self.folder = folder
        self.log = folder / "template.log"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        search_path = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | dict.fromkeys(ONE_THREAD, "1")
        environment |= {
            "PYTHONPATH": os.pathsep.join(search_path),
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "",  # the ranks of tests are gloo on CPU, on a GPU machine too
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-P", "-m", "tests.ranks.template", str(theirs.fileno())]
        with open(self.log, "ab") as log, theirs:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is pytest's to handle
            )
        self.control = ours
        self.ready = False

    def fork(self, slot: int) -> Worker:
        """A new worker for rank `slot`."""
        if not self.ready:
            self._answer(START_SECONDS)
            self.ready = True
        ours, theirs = Pipe(duplex=True)
        stacks = self.folder / f"stacks-{slot}.txt"
        with theirs:
            socket.send_fds(self.control, [pickle.dumps(("fork", str(stacks)))], [theirs.fileno()])
            pid = self._answer(START_SECONDS)
        return Worker(slot, pid, ours, stacks)

    def reap(self, pid: int) -> int:
        """Wait for a worker that ended or was killed; its exit code, negative for a signal.

        Until then its pid stays taken, so a signal can never reach somebody else's process.
        """
        self.control.send(pickle.dumps(("reap", pid)))
        return int(self._answer(START_SECONDS))

    def gone(self) -> bool:
        """Whether it has ended (and every worker with it)."""
        return self.process.poll() is not None

    def close(self) -> None:
        """End it, and with it every worker."""
        self.control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _answer(self, seconds: float) -> Any:
        self.control.settimeout(seconds)
        try:
            answer = self.control.recv(65536)
        except TimeoutError:
            answer = b""
        if not answer:
            self.process.kill()
            code = self.process.wait()
            log = self.log.read_text(errors="replace")
            raise RuntimeError(f"the template of the rank pool did not start or ended (code {code}):\n{log}")
        return pickle.loads(answer)


@dataclass
class Worker:
    """A rank process."""

    slot: int
    pid: int
    connection: Connection
    stacks: Path

    def tell(self, message: object) -> bool:
        """False when the worker is gone."""
        try:
            send(self.connection, message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def gone(self) -> bool:
        """Whether an idle worker has ended: idle ones never speak, so anything to read is the end of the file."""
        return self.connection.poll()

    def kill(self) -> None:
        """Harmless for one that has ended but was not reaped."""
        os.kill(self.pid, signal.SIGKILL)


def stacks_of(workers: list[Worker]) -> dict[int, str]:
    """What every thread of each worker is doing now, by slot."""
    before = {worker.slot: _size(worker.stacks) for worker in workers}
    for worker in workers:
        os.kill(worker.pid, STACKS_SIGNAL)
    end, last = time.monotonic() + STACKS_SECONDS, dict(before)
    while time.monotonic() < end:
        time.sleep(0.1)
        now = {worker.slot: _size(worker.stacks) for worker in workers}
        if now == last and all(now[slot] > size for slot, size in before.items()):
            break
        last = now
    return {worker.slot: _tail(worker.stacks, before[worker.slot]) for worker in workers}


def is_alive(pid: int) -> bool:
    """Whether a process has not ended. One that has may stay as a zombie: a container's first process need not take
    orphans in."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tail(path: Path, offset: int) -> str:
    if _size(path) <= offset:
        return f"(it wrote no stacks within {STACKS_SECONDS:g} s: stopped, or it does not take signals)"
    with open(path, "rb") as handle:
        handle.seek(offset)
        return handle.read().decode(errors="replace")
