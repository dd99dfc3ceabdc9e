"""The kept documents of all shards as one numbered sequence, and where each of them came from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from data.clean.filter_stage import STAGE
from data.clean.plan import Plan
from data.clean.records import WHERE
from data.clean.state import Work


class Place(NamedTuple):
    """A line of a source file, counted from 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Corpus:
    """What stage filter left. A document's number counts the kept ones over all shards, in the order of the sources."""

    def __init__(self, plan: Plan, work: Work) -> None:
        self._plan, self._work = plan, work
        self.filtered: list[dict[str, Any]] = [work.facts(STAGE, shard) for shard in range(len(plan.shards))]
        self.begins = [0, *accumulate(int(facts["documents_kept"]) for facts in self.filtered)]

    @property
    def documents(self) -> int:
        """Of all shards."""
        return self.begins[-1]

    @cached_property
    def _lines_before(self) -> list[list[int]]:
        """For each piece of each shard the lines of its file that earlier pieces read."""
        seen: dict[int, int] = {}
        before: list[list[int]] = []
        for shard, facts in zip(self._plan.shards, self.filtered, strict=True):
            before.append([])
            for piece, lines in zip(shard, facts["lines"], strict=True):
                before[-1].append(seen.get(piece.file, 0))
                seen[piece.file] = before[-1][-1] + lines
        return before

    def place(self, shard: int, piece: int, line: int) -> Place:
        """Where a line of a piece lies in its file."""
        return Place(self._plan.files[self._plan.shards[shard][piece].file][0], self._lines_before[shard][piece] + line)

    def where(self, shard: int) -> NDArray[Any]:
        """Records of type WHERE of a shard's documents; on disk, not in memory."""
        path = self._work.path(STAGE, shard, ".where")
        if not path.stat().st_size:
            return np.empty(0, WHERE)
        return np.memmap(path, WHERE, "r")

    def places(self, documents: Sequence[int]) -> list[Place]:
        """Where documents came from."""
        numbers = np.asarray(documents, dtype=np.int64)
        shards = np.searchsorted(np.array(self.begins[1:]), numbers, side="right")
        found: list[Place] = [Place("", 0)] * len(numbers)
        for shard in np.unique(shards):
            mine = np.flatnonzero(shards == shard)
            records = self.where(int(shard))[numbers[mine] - self.begins[shard]]
            for at, record in zip(mine, records, strict=True):
                found[at] = self.place(int(shard), int(record["piece"]), int(record["line"]))
        return found

    def text(self, document: int, text_key: str) -> str:
        """The text of a document."""
        shard = int(np.searchsorted(np.array(self.begins[1:]), document, side="right"))
        offset = int(self.where(shard)[document - self.begins[shard]]["offset"])
        with open(self.kept_path(shard), "rb") as handle:
            handle.seek(offset)
            return str(orjson.loads(handle.readline())[text_key])

    def kept_path(self, shard: int) -> Path:
        """The documents of a shard that the rules kept, one JSON object a line."""
        return self._work.path(STAGE, shard, ".kept.jsonl")
