"""What the network between the ranks carries: pairs of nodes, and all-reduce by size. Collective.

Bandwidths are payload bytes a second. Latency is half a round trip of 8 bytes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from foundation.files import write_text

FILE = Path("profile") / "network.json"
ROUND_TRIPS = 30
PAIR_BYTES = 2**22
PAIR_SENDS = 3
ALL_REDUCE_BYTES = tuple(2**power for power in range(12, 27, 2))
"""4 KiB to 64 MiB; it stops after the first that takes LONGEST_SECONDS."""
LONGEST_SECONDS = 0.5
REPEATS = 5


@dataclass(frozen=True)
class Pair:
    """One connection, from the lower rank to the higher one."""

    nodes: tuple[str, str]
    ranks: tuple[int, int]
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class AllReduce:
    """Over all ranks. `bus_bytes_per_second`: what a ring would send over each link (2 (n - 1) / n of the bytes)."""

    bytes: int
    seconds: float
    bus_bytes_per_second: float


class NetworkProbe:
    """Measures before the first step that this process does, and writes RUN/profile/network.json on rank 0."""

    def __init__(self, folder: Path, node: str) -> None:
        self._folder, self._node = folder, node
        self._done = False

    def begin(self, step: int) -> None:
        if not self._done:
            self._done = True
            found = measure_network(self._node)
            if dist.get_rank() == 0:
                write_text(self._folder / FILE, json.dumps(found, indent=1) + "\n")

    def end(self, step: int) -> None: ...


def measure_network(node: str) -> dict[str, Any]:
    """Every pair of nodes, by their first ranks, or of ranks where all are on one node; then all ranks together."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, node)
    several = len(set(names)) > 1
    ends = [rank for rank, name in enumerate(names) if not several or names.index(name) == rank]
    mine: list[Pair] = []
    for meetings in rounds(ends):
        dist.barrier()
        for low, high in meetings:
            if dist.get_rank() in (low, high):
                pair = _meet(low, high, (names[low], names[high]))
                mine += [pair] if dist.get_rank() == low else []
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    pairs = sorted((pair for found in gathered for pair in found), key=lambda pair: pair.ranks)
    return {
        "ranks": dist.get_world_size(),
        "nodes": len(set(names)),
        "backend": dist.get_backend(),
        "pairs": [asdict(pair) for pair in pairs],
        "all_reduce": [asdict(one) for one in _all_reduces()],
    }


def rounds(ends: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, each rank in at most one pair of a round (a round robin by the circle method)."""
    places: list[int | None] = [*ends, *([None] if len(ends) % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def _meet(low: int, high: int, nodes: tuple[str, str]) -> Pair:
    """The round trips and the bulk of one pair, on both of its ranks."""
    device = torch.device(torch.cuda.current_device())
    small = torch.zeros(1, dtype=torch.float64, device=device)
    bulk = torch.zeros(PAIR_BYTES, dtype=torch.uint8, device=device)
    first = dist.get_rank() == low
    trips = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        _there_and_back(small, small, low, high, first)
        trips.append(time.perf_counter() - started)
    sends = []
    for _ in range(PAIR_SENDS + 1):
        started = time.perf_counter()
        _there_and_back(bulk, small, low, high, first)
        sends.append(time.perf_counter() - started)
    round_trip = statistics.median(trips)
    bulk_there = statistics.median(sends[1:])
    seconds = max(bulk_there / 2, bulk_there - round_trip / 2)  # a busy machine may answer later than it sends
    return Pair(nodes, (low, high), round_trip / 2, PAIR_BYTES / seconds)


def _there_and_back(there: torch.Tensor, back: torch.Tensor, low: int, high: int, first: bool) -> None:
    if first:
        dist.send(there, high)
        dist.recv(back, high)
        _ = back[0].item()  # a GPU has it only when the host can read it
    else:
        dist.recv(there, low)
        dist.send(back, low)


def _all_reduces() -> Iterator[AllReduce]:
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    device = torch.device(torch.cuda.current_device())
    for size in ALL_REDUCE_BYTES:
        values = torch.zeros(size // 4, dtype=torch.float32, device=device)
        seconds = []
        for _ in range(REPEATS + 1):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            _ = values[0].item()
            seconds.append(time.perf_counter() - started)
        slowest = torch.tensor([statistics.median(seconds[1:])], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        median = float(slowest)
        yield AllReduce(size, median, 2 * (ranks - 1) / ranks * size / median)
        if median > LONGEST_SECONDS:
            return
