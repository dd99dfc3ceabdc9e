"""The pipeline's schedule, simulated: how much longer a step takes than its fullest stage computes.

1F1B and its interleaved form (arXiv 2104.04473), in core's order: a stage warms up, alternates one forward and one
backward, and drains. Costs are relative; a transfer takes `transfer` on top of what it waits for.
"""

from __future__ import annotations

from functools import cache

Slot = tuple[bool, int, int]
"""(whether forward, virtual chunk, micro-batch)."""


@cache
def makespan(stages: int, chunks: int, micro_batches: int, costs: tuple[float, ...], backward_share: float) -> float:
    """Time from the first forward to the last backward.

    Args:
        stages, chunks, micro_batches: pp, vpp and micro-batches of one replica.
        costs: forward and backward of one micro-batch on each stage, all its chunks together.
        backward_share: part of that which is backward.

    Returns:
        In the unit of `costs`. Beyond three rounds the schedule only repeats: the rest is added at the fullest stage's
        pace.
    """
    if stages == 1:
        return micro_batches * costs[0]
    simulated = min(micro_batches, 3 * stages)
    if chunks > 1 and simulated % stages:
        simulated = max(stages, simulated // stages * stages)
    length = _simulate(stages, chunks, simulated, costs, backward_share)
    return length + (micro_batches - simulated) * max(costs)


def _simulate(stages: int, chunks: int, micro_batches: int, costs: tuple[float, ...], backward_share: float) -> float:
    orders = [stage_order(stages, chunks, micro_batches, stage) for stage in range(stages)]
    forward = [cost * (1 - backward_share) / chunks for cost in costs]
    backward = [cost * backward_share / chunks for cost in costs]
    done: dict[tuple[bool, int, int], float] = {}  # (forward, position in the model, micro-batch)
    last = stages * chunks - 1
    clock, next_slot = [0.0] * stages, [0] * stages
    waiting = list(range(stages))
    while waiting:
        moved = False
        for stage in waiting:
            order = orders[stage]
            while next_slot[stage] < len(order):
                is_forward, chunk, batch = order[next_slot[stage]]
                position = chunk * stages + stage
                if is_forward:
                    ready = 0.0 if position == 0 else done.get((True, position - 1, batch))
                elif position == last:
                    ready = done.get((True, last, batch))
                else:
                    ready = done.get((False, position + 1, batch))
                if ready is None:
                    break
                clock[stage] = max(clock[stage], ready) + (forward if is_forward else backward)[stage]
                done[is_forward, position, batch] = clock[stage]
                next_slot[stage] += 1
                moved = True
        waiting = [stage for stage in waiting if next_slot[stage] < len(orders[stage])]
        if waiting and not moved:
            raise AssertionError(f"a schedule of {stages} stages, {chunks} chunks, {micro_batches} batches locks up")
    return max(clock)


def stage_order(stages: int, chunks: int, micro_batches: int, stage: int) -> list[Slot]:
    """What a stage does, in order."""
    total = micro_batches * chunks
    if chunks == 1:
        warmup = min(stages - stage - 1, total)
    else:
        warmup = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
    forwards = [(True, *_chunk_and_batch(index, stages, chunks, forward=True)) for index in range(total)]
    backwards = [(False, *_chunk_and_batch(index, stages, chunks, forward=False)) for index in range(total)]
    order: list[Slot] = forwards[:warmup]
    for index in range(total - warmup):
        order += [forwards[warmup + index], backwards[index]]
    return order + backwards[total - warmup :]


def _chunk_and_batch(index: int, stages: int, chunks: int, *, forward: bool) -> tuple[int, int]:
    """Rounds of `stages` micro-batches go through all chunks before the next round starts."""
    if chunks == 1:
        return 0, index
    round_of, place = divmod(index, stages * chunks)
    chunk, batch = divmod(place, stages)
    return chunk if forward else chunks - 1 - chunk, round_of * stages + batch


def chunks_in_flight(stages: int, chunks: int, micro_batches: int, stage: int) -> int:
    """Most micro-batch chunks whose activations a stage holds at once."""
    total = micro_batches * chunks
    if stages == 1:
        return 1
    if chunks == 1:
        return min(stages - stage, total)
    return min(2 * (stages - stage - 1) + (chunks - 1) * stages + 1, total)
