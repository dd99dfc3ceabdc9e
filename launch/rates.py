"""What a device does: the rate of a matrix product and of a copy, on random data, the median of some runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARMUP = 3


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median seconds of `run`; on a GPU between events, so that what starts it is not counted."""
    for _ in range(WARMUP):
        run()
    taken: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            run()
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def product_rate(device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of two square matrices of `size`."""
    draw = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=draw, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    operations = 2.0 * size * size * size
    return operations / seconds_of(lambda: torch.mm(left, right, out=out), device)


def copy_rate(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes/s read and written together by copying `size` bytes inside the device's memory."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)
