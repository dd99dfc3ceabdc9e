"""Predictions for rows of a table: step time, speed, memory, and what was assumed."""

from __future__ import annotations

from dataclasses import replace

from foundation.errors import RequestError
from launch.planner.job import Job
from launch.planner.memory import fits, fullest_stage
from launch.planner.step_time import step_time
from launch.planner.table import Row, Understood, understand

PREDICTED = (
    "predicted_step_time_s",
    "predicted_tokens_per_s_per_gpu",
    "predicted_memory_gib",
    "predicted_fits",
    "predicted_note",
)
"""Columns that a prediction adds."""


def predict(row: Row) -> Row:
    """`row` with the columns of `PREDICTED`; blank but for the note where the row cannot be understood."""
    try:
        understood = understand(row)
    except RequestError as error:
        return {**row, **dict.fromkeys(PREDICTED, ""), "predicted_note": f"not predicted: {_one_line(error)}"}
    job, notes = understood.job, list(understood.notes)
    time = step_time(job)
    job = _least_recomputation_that_fits(understood, notes)
    memory = fullest_stage(job)
    assumed = ["; ".join(("assumed " + notes[0], *notes[1:]))] if notes else []
    contradictory = ["contradictory: " + ", ".join(understood.contradictions)] if understood.contradictions else []
    return {
        **row,
        "predicted_step_time_s": f"{time.total:.4g}",
        "predicted_tokens_per_s_per_gpu": f"{time.tokens_per_second(job):.5g}",
        "predicted_memory_gib": f"{memory.gib:.2f}",
        "predicted_fits": "1" if fits(job, memory) else "0",
        "predicted_note": "; ".join(contradictory + assumed),
    }


def _least_recomputation_that_fits(understood: Understood, notes: list[str]) -> Job:
    """What was measured ran: where a row does not say what is recomputed, as little as memory allows."""
    job = understood.job
    if understood.says_recompute or job.recompute == "full" or fits(job, fullest_stage(job)):
        return job
    again = replace(job, recompute="full")
    if not fits(again, fullest_stage(again)):
        return job
    notes.append("memory with layers recomputed, without which it would not fit")
    return again


def _one_line(error: RequestError) -> str:
    return "; ".join(part for part in (error.what, error.rule) if part)
