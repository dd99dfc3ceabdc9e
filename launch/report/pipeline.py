"""The pipeline's steps as they were recorded: what each stage did when, and what it waited for.

A stage that runs no pass waits for a pass of its neighbour to end (the bubble) or, where that has ended, for what it
sends: communication. A stage whose last pass is over may sum up gradients while others still work; that counts as
bubble, since it is those that all wait for.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.planner.pipeline import Slot, stage_order
from launch.run_records import read_object
from training.profiling.intervals import Interval, length, union

FOLDER = Path("profile") / "timeline"
NEEDED = ("step", "stage", "stages", "chunks", "micro_batches", "begin", "end", "schedule", "forward", "backward")
"""Of every stage's record."""
KINDS = {
    "forward": "forward passes",
    "backward": "backward passes",
    "communication": "activations and their gradients on their way between stages",
    "bubble": "waiting for another stage's pass",
    "gradients": "gradients summed over replicas and stages, the wait for them included",
    "rest": "the optimizer, the gradients' norm, weights gathered",
}
"""What a stage's step is made of."""


@dataclass(frozen=True)
class Block:
    """A stretch of a stage's step, in seconds since the step began.

    Attributes:
        kind: one of KINDS.
        chunk, micro_batch: of a pass; None otherwise.
    """

    kind: str
    begin: float
    end: float
    chunk: int | None = None
    micro_batch: int | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class PipelineStep:
    """One step of all stages.

    Attributes:
        stages: of each stage its blocks, in order, from the step's first moment to its last.
        chunks: virtual stages of a rank.
    """

    step: int
    chunks: int
    micro_batches: int
    stages: tuple[tuple[Block, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first stage's begin to the last one's end."""
        return max(blocks[-1].end for blocks in self.stages)

    @property
    def ideal_bubble(self) -> float:
        """(p - 1) / (m v) of the time that passes take (Narayanan et al. 2021, section 2.2)."""
        return ideal_bubble(len(self.stages), self.chunks, self.micro_batches)

    @property
    def bubble(self) -> float:
        """Measured: time in which the stage with most work waits for another's pass, over its time in passes."""
        stage = max(range(len(self.stages)), key=self.working)
        return self.total("bubble", stage) / self.working(stage)

    @property
    def idle(self) -> float:
        """The bubble and communication together: time without a pass over time in passes, of the same stage."""
        passes = [[(b.begin, b.end) for b in blocks if b.micro_batch is not None] for blocks in self.stages]
        return min(idle_over_busy(passes))

    def working(self, stage: int) -> float:
        """Seconds in passes."""
        return self.total("forward", stage) + self.total("backward", stage)

    def total(self, kind: str, stage: int) -> float:
        """Seconds of one kind on a stage."""
        return sum(block.seconds for block in self.stages[stage] if block.kind == kind)

    def share(self, kind: str) -> float:
        """Of all stages' time."""
        return sum(self.total(kind, stage) for stage in range(len(self.stages))) / (self.seconds * len(self.stages))


def ideal_bubble(stages: int, chunks: int, micro_batches: int) -> float:
    """(p - 1) / (m v)."""
    return (stages - 1) / (micro_batches * chunks)


def idle_over_busy(passes: Sequence[Sequence[Interval]]) -> list[float]:
    """Of each stage, its time without a pass over that in passes, from the first pass of all to the end of the last."""
    whole = max(end for stage in passes for _, end in stage) - min(begin for stage in passes for begin, _ in stage)
    return [whole / length(union(stage)) - 1 for stage in passes]


def read_timeline(folder: Path) -> list[PipelineStep]:
    """The steps of a run's folder whose stages have all been recorded, in order; none where there are none.

    Raises:
        RequestError: a record is damaged.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for file in sorted((folder / FOLDER).glob("step-*-stage-*.json")):
        record = read_object(file, NEEDED)
        by_step.setdefault(int(record["step"]), []).append(record)
    return [
        pipeline_step(records)
        for _, records in sorted(by_step.items())
        if len(records) == records[0]["stages"] and all(record["forward"] for record in records)
    ]


def pipeline_step(records: Sequence[Mapping[str, Any]]) -> PipelineStep:
    """One step from what its stages recorded."""
    records = sorted(records, key=lambda record: int(record["stage"]))
    stages, chunks, count = (int(records[0][name]) for name in ("stages", "chunks", "micro_batches"))
    zero = min(float(record["begin"]) for record in records)
    passes = [_passes(record, zero) for record in records]
    ended = _ended(passes)
    pipeline_end = max(block.end for blocks in passes for block in blocks)
    return PipelineStep(
        int(records[0]["step"]),
        chunks,
        count,
        tuple(
            tuple(_filled(own, stage, record, zero, stages, chunks, ended, pipeline_end))
            for stage, (own, record) in enumerate(zip(passes, records, strict=True))
        ),
    )


def median_step(steps: Sequence[PipelineStep]) -> PipelineStep:
    """The one whose length is the median's."""
    middle = statistics.median_low([step.seconds for step in steps])
    return next(step for step in steps if step.seconds == middle)


def as_values(steps: Sequence[PipelineStep]) -> dict[str, Any] | None:
    """Medians over recorded steps, for JSON."""
    if not steps:
        return None
    return {
        "steps": [step.step for step in steps],
        "stages": len(steps[0].stages),
        "chunks": steps[0].chunks,
        "micro_batches": steps[0].micro_batches,
        "bubble_ideal": steps[0].ideal_bubble,
        "bubble_measured": statistics.median(step.bubble for step in steps),
        "idle_measured": statistics.median(step.idle for step in steps),
        "shares": {kind: statistics.median(step.share(kind) for step in steps) for kind in KINDS},
    }


def _passes(record: Mapping[str, Any], zero: float) -> list[Block]:
    """Forward and backward passes of a stage in order, each with its chunk and micro-batch by core's schedule."""
    found = [
        Block(kind, float(begin) - zero, float(end) - zero)
        for kind in ("forward", "backward")
        for begin, end in record[kind]
    ]
    found.sort(key=lambda block: block.begin)
    chunks, count = int(record["chunks"]), int(record["micro_batches"])
    order = _order(int(record["stages"]), chunks, count, int(record["stage"]))
    if [slot[0] for slot in order] != [block.kind == "forward" for block in found]:
        order = _by_counting(found)
    return [
        Block(block.kind, block.begin, block.end, chunk, batch)
        for block, (_, chunk, batch) in zip(found, order, strict=True)
    ]


def _order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[Slot]:
    if stages == 1:
        return [(forward, 0, batch) for batch in range(micro_batches) for forward in (True, False)]
    return stage_order(stages, chunks, micro_batches, stage)


def _by_counting(found: Iterable[Block]) -> list[Slot]:
    """Where a step ran in another order than expected: micro-batches as they came, all as of one chunk."""
    numbers = {"forward": 0, "backward": 0}
    slots = []
    for block in found:
        slots.append((block.kind == "forward", 0, numbers[block.kind]))
        numbers[block.kind] += 1
    return slots


def _ended(passes: Sequence[Sequence[Block]]) -> dict[Slot, float]:
    """When each pass ended: (forward, position in the model, micro-batch)."""
    return {
        (block.kind == "forward", (block.chunk or 0) * len(passes) + stage, block.micro_batch or 0): block.end
        for stage, blocks in enumerate(passes)
        for block in blocks
    }


def _ready(block: Block, stage: int, stages: int, chunks: int, ended: Mapping[Slot, float]) -> float:
    """When the neighbour's pass that `block` goes on from had ended; 0 where it goes on from none."""
    position, batch = (block.chunk or 0) * stages + stage, block.micro_batch or 0
    if block.kind == "forward":
        return ended.get((True, position - 1, batch), 0.0)
    if position == stages * chunks - 1:
        return 0.0
    return ended.get((False, position + 1, batch), 0.0)


def _filled(
    own: Sequence[Block],
    stage: int,
    record: Mapping[str, Any],
    zero: float,
    stages: int,
    chunks: int,
    ended: Mapping[Slot, float],
    pipeline_end: float,
) -> Iterable[Block]:
    """The passes of a stage with what lies between them."""
    at = float(record["begin"]) - zero
    for number, block in enumerate(own):
        ready = _ready(block, stage, stages, chunks, ended)
        waited = min(max(at, ready), block.begin)
        yield from _block("bubble", at, waited)
        yield from _block("communication" if stages > 1 and (number or ready) else "rest", waited, block.begin)
        yield block
        at = block.end
    schedule_end = max(at, max((float(end) - zero for _, end in record["schedule"]), default=at))
    drained = min(pipeline_end, schedule_end)
    yield from _block("bubble", at, drained)
    yield from _block("gradients", drained, schedule_end)
    yield from _block("rest", schedule_end, float(record["end"]) - zero)


def _block(kind: str, begin: float, end: float) -> Iterable[Block]:
    if end > begin:
        yield Block(kind, begin, end)
