"""A rank that leaves gathers in flight and ends: `python -m tests.parallel.gather_and_end RANK STORE`."""

from __future__ import annotations

import sys

from parallel.platform import install

install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402


def main(rank: int, store: str) -> None:
    """The group stays in a module's variable, as core's do: it outlives destroy_process_group."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    sys.modules["__main__"].__dict__["kept"] = group = dist.new_group([0, 1])
    part = torch.ones(300_000)
    for _ in range(100):
        dist.all_gather_into_tensor(torch.empty(600_000), part, group=group, async_op=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
