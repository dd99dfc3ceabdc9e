"""What ranks that srun or torchrun started tell each other before they join: that one ends, or that all are there.

A file that is missing on one node is refused there alone. The launcher of another node may not know of that one's ranks
(torchrun does not), and its ranks would wait for them until the join's timeout.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from foundation.errors import FaultError, LostRankError, OrthantError, RequestError, WorkError
from launch.terminal import say
from launch.world import World

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # not in its __all__

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 60.0
"""How long a rank that ends waits for the others to hear of it; they may be starting still."""
SILENCE_SECONDS = 2.0
"""After that long it says why it has not ended yet."""
JOIN_SECONDS = 1800.0
ENDED, HEARD, GONE, JOB, READY = "ended", "heard", "gone", "job", "ready"


class RollCall:
    """One rank's part, from `with` to its end, through the store that torch.distributed will join by.

    An error that leaves the block before `ready` ends the run on every rank: where one refuses the request, all do.
    """

    def __init__(self, world: World, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._world, self._patience = world, patience_seconds
        self._pace = POLL_SECONDS + world.world_size / 4000  # of rank 0's node, which answers all
        self._store: Store | None = None
        self._failure: Exception | None = None
        self._all_there = False
        self._connecting = threading.Thread(target=self._connect, daemon=True)

    def __enter__(self) -> RollCall:
        self._connecting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._all_there:
            self._end(error)

    def listen(self) -> None:
        """Called wherever this rank waits.

        Raises:
            RequestError, WorkError: another rank has ended the run: its words.
            LostRankError: the store is gone, and rank 0's node with it.
        """
        if self._failure is not None:
            raise self._lost(self._failure) from None
        if self._store is None:
            return
        try:
            said = json.loads(self._store.get(ENDED)) if self._store.check([ENDED]) else None
        except RuntimeError as error:
            raise self._lost(error) from None
        if said is not None:
            raise _as_error(said)

    def announce(self, digest: str) -> None:
        """Rank 0: the job with that digest is there.

        Raises:
            LostRankError: nobody can be told.
        """
        self._connecting.join()
        try:
            if self._store is not None:
                self._store.set(JOB, digest)
        except RuntimeError as error:
            raise self._lost(error) from None
        self.listen()

    def announced(self) -> str | None:
        """The digest of rank 0's job, None where there is none yet.

        Raises:
            LostRankError: nobody can be asked.
        """
        try:
            there = self._store is not None and self._store.check([JOB])
            return self._store.get(JOB).decode() if there and self._store is not None else None
        except RuntimeError as error:
            raise self._lost(error) from None

    def ready(self, timeout_seconds: float = JOIN_SECONDS) -> None:
        """Wait until every rank is as far. Collective.

        Raises:
            RequestError, WorkError, LostRankError: as `listen`; or ranks did not come.
        """
        end = time.monotonic() + timeout_seconds
        there = 0
        while there < self._world.world_size:
            self.listen()
            if self._store is not None:
                there = self._count(self._store, 0 if there else 1)
            if time.monotonic() > end:
                came = f"{there} of {self._world.world_size} ranks came within {timeout_seconds:g} s"
                raise self._lost(TimeoutError(came))
            if there < self._world.world_size:
                time.sleep(self._pace)
        self._all_there = True
        if self._world.rank > 0:
            self._store = None  # rank 0 may be the one that hosts it, and the join finds it there

    def _count(self, store: Store, more: int) -> int:
        try:
            return store.add(READY, more)
        except RuntimeError as error:
            raise self._lost(error) from None

    def _connect(self) -> None:
        """To the store that the launcher's agent or rank 0 hosts, once that is there."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # as above

        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=self._world.rank == 0 and not by_agent,
                timeout=timedelta(seconds=JOIN_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # the join's store shares the server
            )
        except RuntimeError as error:
            self._failure = error
            return
        self._store = PrefixStore(f"roll_call/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _end(self, error: Exception) -> None:
        """Tell the others, and stay until they have heard: this rank's launcher may end the store with it.

        Of a fault most know by themselves, as the look at the nodes tells all of them; it is waited for less.
        """
        patience = self._patience / 12 if isinstance(error, FaultError) else self._patience
        began, told, said = time.monotonic(), False, False
        heard = 0
        while heard < self._world.world_size and (waited := time.monotonic() - began) <= patience:
            try:
                if self._store is not None:
                    heard = self._tell(self._store, error, told=told)
                    told = True
            except RuntimeError as gone:
                self._failure = gone
            if self._failure is not None:
                return  # this rank has its own words
            if waited > SILENCE_SECONDS and not said:
                said = True
                say(f"rank {self._world.rank} ends, and says why once all ranks know, or in {patience:g} s")
            time.sleep(self._pace)
        if self._store is not None:
            self._go(self._store)

    def _tell(self, store: Store, error: Exception, *, told: bool) -> int:
        """Says how many have heard."""
        if not told:
            store.compare_set(ENDED, "", json.dumps(_as_values(error, self._world)))
        return store.add(HEARD, 0 if told else 1)

    def _go(self, store: Store) -> None:
        """Rank 0, which may host the store, as the last: torch prints a trace for each that still asks."""
        end = time.monotonic() + SILENCE_SECONDS
        with suppress(RuntimeError):  # it is gone
            gone = store.add(GONE, 1)
            while self._world.rank == 0 and gone < self._world.world_size and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
                gone = store.add(GONE, 0)

    def _lost(self, error: Exception) -> LostRankError:
        return LostRankError(
            f"rank {self._world.rank} on {socket.gethostname()} did not meet all other ranks",
            where=next(iter(str(error).splitlines()), type(error).__name__),
            cure="the log of the rank that ended first says why; run the same command again to continue",
        )


def _as_values(error: Exception, world: World) -> dict[str, Any]:
    said: dict[str, Any] = {"rank": world.rank, "node": socket.gethostname(), "code": 1, "what": f"{error}"}
    if isinstance(error, OrthantError):
        said["code"] = error.exit_code
    else:
        said["what"] = f"{type(error).__name__}: {error}"
    if isinstance(error, RequestError):
        said |= {"what": error.what, "where": error.where, "rule": error.rule, "cure": error.cure}
    return said


def _as_error(said: dict[str, Any]) -> OrthantError:
    """What another rank said, as this rank says it."""
    what = f"rank {said['rank']} on {said['node']}: {said['what']}"
    if said["code"] == RequestError.exit_code:
        return RequestError(what, where=said["where"], rule=said["rule"], cure=said["cure"])
    return FaultError(what) if said["code"] == FaultError.exit_code else WorkError(what)
