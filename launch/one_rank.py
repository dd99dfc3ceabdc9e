"""This process as a world of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.layout import ParallelLayout
from parallel.platform import current_platform, install

SEED = 1234


@contextmanager
def one_rank(layout: ParallelLayout) -> Iterator[None]:
    """Process groups of a layout of one rank, put away at the end."""
    install()
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from parallel.groups import ProcessGroups

    platform = current_platform()
    platform.device(0)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group(platform.backend, store=HashStore(), rank=0, world_size=1)
    try:
        with ProcessGroups(layout, SEED):
            yield
    finally:
        if mine:
            dist.destroy_process_group()
