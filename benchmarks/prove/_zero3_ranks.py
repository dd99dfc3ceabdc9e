"""What the ranks of `zero3_stress` do."""

from __future__ import annotations

import sys

from parallel.platform import install

install()

import torch  # noqa: E402  (core comes after the platform)
import torch.distributed as dist  # noqa: E402

from parallel.layout import ParallelLayout  # noqa: E402
from tests.training.parity_cases import run_case  # noqa: E402
from training.parity import ParityRecord  # noqa: E402

STEPS = 3
LAYOUT = ParallelLayout(data_parallel_size=2, zero_stage=3)


def one_run() -> ParityRecord | None:
    """One training on the ranks of a pool."""
    return run_case("llama", LAYOUT, steps=STEPS)


def train_and_end(rank: int, store: str) -> None:
    """A rank in a process of its own that ends as soon as it has trained."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    run_case("llama", LAYOUT, steps=1)
    dist.destroy_process_group()


if __name__ == "__main__":
    train_and_end(int(sys.argv[1]), sys.argv[2])
