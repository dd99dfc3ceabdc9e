"""What leaders of nodes ask each other over TCP: are you there, what time is it, how fast can I send to you."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

TOKEN_BYTES = 16
CONNECT_SECONDS = 5.0
CHUNK = bytes(1 << 20)
SEND_BYTES = 32 << 20
SEND_SECONDS = 3.0
AT_ONCE = 32
EXCHANGES = 3
TIME, BULK = b"t", b"b"


@dataclass(frozen=True)
class Leader:
    """The rank of a node that speaks for it."""

    rank: int
    node: str
    address: str
    port: int


@dataclass(frozen=True)
class Links:
    """What a leader found out.

    Attributes:
        unreachable: nodes that it cannot connect to.
        clock_ahead: seconds that this node's clock is ahead of the first leader's; None where that cannot be asked.
        clock_error: half of the fastest exchange's round trip.
        bytes_per_second: to the next leader; 0 where that broke off or took too long, None where not measured.
    """

    node: str
    unreachable: tuple[str, ...]
    clock_ahead: float | None
    clock_error: float
    bytes_per_second: float | None


class Answering:
    """`with Answering(token) as server: server.port`: answers the other leaders in a thread of its own.

    Args:
        token: those who do not bring it are not answered.
        clock: tells the time of this node.
    """

    def __init__(self, token: bytes, clock: Callable[[], float] = time.time) -> None:
        self._token, self._clock = token, clock
        self._server = socket.create_server(("", 0), backlog=512)
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, name="preflight", daemon=True)

    def __enter__(self) -> Answering:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(CONNECT_SECONDS + SEND_SECONDS)
            try:
                if _exactly(connection, TOKEN_BYTES) != self._token:
                    return
                while kind := connection.recv(1):
                    if kind == TIME:
                        connection.sendall(struct.pack("!d", self._clock()))
                    elif kind == BULK:
                        _take_bulk(connection)
                        connection.sendall(b"k")
                    else:
                        return
            except (OSError, EOFError):
                return  # the other end is gone; it will say so itself


def find_links(
    own: Leader, leaders: Sequence[Leader], token: bytes, *, bandwidth: bool, clock: Callable[[], float] = time.time
) -> Links:
    """Ask every other leader; the time that it takes does not grow with nodes that do not answer."""
    others = [leader for leader in leaders if leader.rank != own.rank]
    with ThreadPoolExecutor(max_workers=min(AT_ONCE, len(others)) or 1) as pool:
        clocks = list(pool.map(lambda leader: _ask_time(leader, token, clock), others))
    answers = dict(zip((leader.rank for leader in others), clocks, strict=True))
    first = leaders[0]
    ahead, error = (0.0, 0.0) if first.rank == own.rank else (answers[first.rank] or (None, 0.0))
    place = [leader.rank for leader in leaders].index(own.rank)
    following = leaders[(place + 1) % len(leaders)]
    rate = None
    if bandwidth and following.rank != own.rank and answers[following.rank] is not None:
        rate = _ask_rate(following, token)
    return Links(own.node, tuple(leader.node for leader in others if answers[leader.rank] is None), ahead, error, rate)


def _ask_time(leader: Leader, token: bytes, clock: Callable[[], float]) -> tuple[float, float] | None:
    """(seconds that the own clock is ahead of the leader's, how far off that may be), None without an answer."""
    try:
        with socket.create_connection((leader.address, leader.port), timeout=CONNECT_SECONDS) as connection:
            connection.sendall(token)
            found = []
            for _ in range(EXCHANGES):
                before, started = clock(), time.perf_counter()
                connection.sendall(TIME)
                (theirs,) = struct.unpack("!d", _exactly(connection, 8))
                round_trip = time.perf_counter() - started
                found.append((round_trip / 2, before + round_trip / 2 - theirs))
    except (OSError, EOFError):
        return None
    error, ahead = min(found)
    return ahead, error


def _ask_rate(leader: Leader, token: bytes) -> float:
    """Bytes a second to a leader over one connection; 0 where that broke off or took too long, though it had answered:
    large packets are lost on the way, or next to nothing is carried."""
    try:
        with socket.create_connection((leader.address, leader.port), timeout=CONNECT_SECONDS + SEND_SECONDS) as link:
            link.sendall(token + BULK)
            started, sent = time.perf_counter(), 0
            while sent < SEND_BYTES and time.perf_counter() - started < SEND_SECONDS:
                link.sendall(struct.pack("!I", len(CHUNK)) + CHUNK)
                sent += len(CHUNK)
            link.sendall(struct.pack("!I", 0))
            _exactly(link, 1)
            return sent / (time.perf_counter() - started)
    except (OSError, EOFError):
        return 0.0


def _take_bulk(connection: socket.socket) -> None:
    while True:
        (size,) = struct.unpack("!I", _exactly(connection, 4))
        if size == 0:
            return
        if size > len(CHUNK):
            raise EOFError
        _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes:
    """The next `size` bytes.

    Raises:
        EOFError: the connection ended before.
    """
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 18))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
