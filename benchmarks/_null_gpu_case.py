"""One case of benchmarks.gpu on a null GPU, in this process: python -m benchmarks._null_gpu_case CASE LOG

The same code and shapes, three steps instead of fifteen. Prints torch's peak memory, the planner's, and what one step
launches, as one line of JSON. No time of it means anything, and none is printed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import _gpu_case  # first: it installs our platform before anything imports megatron-core
from benchmarks.gpu import Case
from benchmarks.prove.null_gpu import LOG, launches
from launch.config import RunConfig
from launch.one_rank import one_rank
from parallel.layout import ParallelLayout

WARMUP, MEASURED = 2, 1


class CountedStep:
    """A step whose last measured call writes the null GPU's log."""

    def __init__(self, step: _gpu_case.Step, log: Path) -> None:
        self.step, self.log, self.calls = step, log, 0

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        self.calls += 1
        if self.calls != WARMUP + MEASURED:
            return self.step(batches)
        os.environ[LOG] = str(self.log)
        loss = self.step(batches)
        torch.cuda.synchronize()  # the log is written out
        del os.environ[LOG]
        return loss


def main() -> None:
    """Measure the case that is asked for."""
    case, log = Case(**json.loads(sys.argv[1])), Path(sys.argv[2])
    side_of = _gpu_case._side

    def counted_side(case: Case, config: RunConfig) -> tuple[_gpu_case.Step, str]:
        step, kernels = side_of(case, config)
        return CountedStep(step, log), kernels

    _gpu_case._side, _gpu_case.WARMUP, _gpu_case.MEASURED = counted_side, WARMUP, MEASURED
    with one_rank(ParallelLayout()):
        found = _gpu_case.measure(case, {})
    result: dict[str, Any] = {"kernels": found["kernels"]}
    if case.side == "generation":
        result["memory"] = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    else:
        result |= {"parameters": found["parameters"], "memory": found["memory"], "launched_in_a_step": launches(log)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
