"""What the ranks of `zero3_stress` do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from parallel.platform import install

install()

import torch  # noqa: E402  (core comes after the platform)
import torch.distributed as dist  # noqa: E402
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer  # noqa: E402

from parallel.layout import ParallelLayout  # noqa: E402
from tests.training.parity_cases import run_case  # noqa: E402
from training.parity import ParityRecord  # noqa: E402

STEPS = 3
LAYOUT = ParallelLayout(data_parallel_size=2, zero_stage=3)


@dataclass
class Freed:
    """Buffers of gathered weights that a rank has freed.

    Attributes:
        buffers: all of them.
        too_early: those whose gather was not done.
    """

    buffers: int = 0
    too_early: int = 0


def watched_run() -> tuple[ParityRecord | None, Freed]:
    """One training on the ranks of a pool, every free of a buffer watched."""
    with watch_frees() as freed:
        return run_case("llama", LAYOUT, steps=STEPS), freed


@contextmanager
def watch_frees() -> Iterator[Freed]:
    """Count the buffers that Megatron-FSDP frees, and those of them that a gather still writes."""
    freed, gathers = Freed(), {}
    pipeline = param_and_grad_buffer.AllGatherPipeline
    gather, free = pipeline.all_gather_params, param_and_grad_buffer._free_storage

    def gather_and_note(self: Any, *args: Any, **options: Any) -> None:
        gather(self, *args, **options)
        for (bucket, backward), (event, _) in self.param_gather_event_map.items():
            buckets = self.get_fsdp_buffer(bucket, backward).temporary_bucket_allocator.buckets
            gathers[buckets[bucket].data.untyped_storage().data_ptr()] = event

    def free_and_count(tensor: torch.Tensor) -> None:
        event = gathers.pop(tensor.untyped_storage().data_ptr(), None)
        if event is not None:
            freed.buffers += 1
            freed.too_early += not all(work.is_completed() for work in event.works)
        free(tensor)

    with (
        patch.object(pipeline, "all_gather_params", gather_and_note),
        patch.object(param_and_grad_buffer, "_free_storage", free_and_count),
    ):
        yield freed


def train_and_end(rank: int, store: str) -> None:
    """A rank in a process of its own that ends as soon as it has trained."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    run_case("llama", LAYOUT, steps=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    train_and_end(int(sys.argv[1]), sys.argv[2])
