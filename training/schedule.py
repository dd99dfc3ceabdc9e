"""The learning rate as a pure function of the step, so that resuming can not move it."""

from __future__ import annotations

import math

from training.config import TrainingSections, decay_steps, wsd_decay_steps


def learning_rate(step: int, sections: TrainingSections) -> float:
    """The rate of optimizer step `step`, counted from 0.

    Warm-up climbs linearly and reaches the peak at step `warmup_steps` (its first step is already above 0); then cosine
    (Loshchilov & Hutter 2017), linear, WSD (Hu et al. 2024) or constant. From `decay_steps` on it stays at `min_lr`.
    """
    peak, schedule = sections.optimizer.lr, sections.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return peak
    end = decay_steps(sections)
    start = end - wsd_decay_steps(sections) if schedule.kind == "wsd" else schedule.warmup_steps
    # The sections' rules keep `start` below `end`.
    fallen = min(1.0, max(0.0, (step - start) / (end - start)))
    remaining = 0.5 * (1 + math.cos(math.pi * fallen)) if schedule.kind == "cosine" else 1.0 - fallen
    return schedule.min_lr + (peak - schedule.min_lr) * remaining
