"""What the tests of gloo's device run on ranks."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist


def network_threads_of_many_groups() -> tuple[int, float]:
    """Threads that run a gloo device in this process with eleven groups, and a sum over the last of them."""
    groups = [dist.new_group() for _ in range(10)]
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total, group=groups[-1])
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return sum(name.startswith("gloo_tcp_loop") for name in names), float(total)
