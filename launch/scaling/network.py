"""What the ranks of a size measured of their network (`training.profiling.network`)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.run_records import read_object

FILE = Path("profile") / "network.json"
SLOWEST = 12
"""Pairs that the page lists, the slowest first."""


@dataclass(frozen=True)
class Network:
    """Pairs and all-reduces as they were written down; `pairs` may be empty."""

    several_nodes: bool
    backend: str
    pairs: Sequence[Mapping[str, Any]]
    all_reduces: Sequence[Mapping[str, Any]]

    @property
    def pair_rate(self) -> float | None:
        """Bytes a second of the median pair."""
        return statistics.median(pair["bytes_per_second"] for pair in self.pairs) if self.pairs else None

    @property
    def bus_rate(self) -> float | None:
        """Bytes a second that each rank sends in the largest all-reduce."""
        return float(self.all_reduces[-1]["bus_bytes_per_second"]) if self.all_reduces else None

    @property
    def smallest_seconds(self) -> float | None:
        """What an all-reduce takes however few its bytes. More bytes never take less: the smallest takes no longer than
        whatever size was the fastest, and was held up where it seemed to."""
        return min((float(one["seconds"]) for one in self.all_reduces), default=None)

    def describe(self) -> str:
        """For people."""
        said = []
        if self.pair_rate is not None:
            said.append(f"a pair of {self.ends} alone carries {gigabits(self.pair_rate)} Gbit/s")
        if self.bus_rate is not None:
            said.append(f"all-reduce {gigabits(self.bus_rate)}")
        return ", ".join(said)

    def as_values(self) -> dict[str, Any]:
        """For JSON."""
        return {"backend": self.backend, "pairs": list(self.pairs), "all_reduce": list(self.all_reduces)}

    @property
    def ends(self) -> str:
        """What a pair is of."""
        return "nodes" if self.several_nodes else "ranks"


def read_network(folder: Path) -> Network | None:
    """Of a run; None where it did not measure, or where one rank has nobody to talk to.

    Raises:
        RequestError: what it wrote is damaged.
    """
    if not (folder / FILE).is_file():
        return None
    found = read_object(folder / FILE, ("nodes", "backend", "pairs", "all_reduce"))
    return (
        Network(found["nodes"] > 1, found["backend"], found["pairs"], found["all_reduce"]) if found["pairs"] else None
    )


def gigabits(bytes_per_second: float) -> str:
    """Gbit/s."""
    return f"{bytes_per_second * 8 / 1e9:.3g}"


def network_part(network: Network | None) -> list[dict[str, Any]]:
    """Tables of the page."""
    if network is None:
        return []
    slowest = sorted(network.pairs, key=lambda pair: float(pair["bytes_per_second"]))
    pairs = {
        "title": f"Pairs of {network.ends}, {len(slowest)} measured, the slowest first",
        "header": ["between", "latency µs", "Gbit/s"],
        "rows": [
            [_ends(pair), f"{pair['latency_seconds'] * 1e6:,.0f}", gigabits(pair["bytes_per_second"])]
            for pair in slowest[:SLOWEST]
        ],
        "note": "",
    }
    reduced = {
        "title": "All-reduce over all ranks",
        "header": ["KiB", "ms", "Gbit/s each rank sends"],
        "rows": [
            [f"{one['bytes'] / 1024:,.0f}", f"{one['seconds'] * 1e3:,.2f}", gigabits(one["bus_bytes_per_second"])]
            for one in network.all_reduces
        ],
        "note": "Rates count what a ring would send: 2 (n - 1) / n of the bytes.",
    }
    return [pairs, reduced]


def _ends(pair: Mapping[str, Any]) -> str:
    (one, other), (low, high) = pair["nodes"], pair["ranks"]
    return f"{one} – {other}" if one != other else f"rank {low} – rank {high}"
