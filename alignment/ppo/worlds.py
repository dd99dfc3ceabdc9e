"""Process groups of a run whose roles are apart: each station is a world of its own, and links join all ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from alignment.ppo.links import Links
from alignment.ppo.placement import Placement
from parallel.platform import current_platform


def join_run(placement: Placement, rank: int, world_size: int, timeout_seconds: float, store: Any = None) -> Links:
    """Join the world of this rank's station and the links between all ranks. Every rank of the run calls it.

    Inside its station everything of ours and of core's sees the station alone: rank 0 is its leader.

    Args:
        rank, world_size: of the run, as torchrun or srun announced them.
        timeout_seconds: how long a collective or a message is waited for.
        store: where ranks find each other; None: the one that the environment names.
    """
    if store is None:
        store, rank, world_size = next(vars(dist)["rendezvous"]("env://", rank, world_size))
    patience = timedelta(seconds=timeout_seconds)
    store.set_timeout(patience)
    number = placement.station_at(rank)
    dist.init_process_group(
        current_platform().backend,
        store=dist.PrefixStore(f"station_{number}", store),  # type: ignore[attr-defined]  # not in its __all__
        rank=rank - placement.leader(number),
        world_size=placement.ranks[number],
        timeout=patience,
    )
    make: Any = vars(distributed_c10d)["ProcessGroupGloo"]  # the platform may have put its own there
    together = make(dist.PrefixStore("links", store), rank, world_size, patience)  # type: ignore[attr-defined]  # as above
    return Links(together, rank, placement.describe)
