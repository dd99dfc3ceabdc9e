"""torch.distributed over gloo as core calls it: averages, device arguments, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh

from tests.ranks import RankFailure, RankPool


def own_values() -> torch.Tensor:
    return torch.arange(4.0) + 10 * dist.get_rank()


def averages() -> dict[str, list[float]]:
    whole = own_values()
    dist.all_reduce(whole, op=dist.ReduceOp.AVG)
    positional = own_values()
    dist.all_reduce(positional, dist.ReduceOp(dist.ReduceOp.AVG))  # the operation's other class
    shard, base = torch.zeros(2), torch.zeros(2)
    dist.reduce_scatter_tensor(shard, own_values(), op=dist.ReduceOp.AVG)
    dist._reduce_scatter_base(base, own_values(), op=dist.ReduceOp.AVG)  # type: ignore[attr-defined]
    waited = own_values()
    dist.all_reduce(waited, op=dist.ReduceOp.AVG, async_op=True).wait()
    total = own_values()
    dist.all_reduce(total)
    alone = own_values()
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    dist.all_reduce(alone, op=dist.ReduceOp.AVG, group=groups[dist.get_rank()])
    return {
        "all_reduce": whole.tolist(),
        "positional": positional.tolist(),
        "reduce_scatter": shard.tolist(),
        "base": base.tolist(),
        "async": waited.tolist(),
        "sum": total.tolist(),
        "alone": (alone - own_values()).tolist(),
    }


def test_averages_are_means(ranks: RankPool) -> None:
    mean = [5.0, 6.0, 7.0, 8.0]
    for rank, said in enumerate(ranks.run(2, averages)):
        assert said["all_reduce"] == said["positional"] == said["async"] == mean
        assert said["reduce_scatter"] == said["base"] == mean[2 * rank : 2 * rank + 2]
        assert said["sum"] == [10.0, 12.0, 14.0, 16.0]
        assert said["alone"] == [0.0] * 4


def alone() -> list[list[float]]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    gathered, scattered, own = torch.zeros(1, 4), torch.zeros(2, 2), own_values()
    dist.all_gather_into_tensor(gathered, own, group=group)
    dist.reduce_scatter_tensor(scattered, own, group=group, async_op=True).wait()
    dist.all_reduce(own, op=dist.ReduceOp.MAX, group=group)
    dist.all_gather_into_tensor(own.view(4), own, group=group)  # in place, as core's buffers do
    with pytest.raises(RuntimeError):
        dist.all_gather_into_tensor(torch.zeros(3), own, group=group)
    return [found.flatten().tolist() for found in (gathered, scattered, own)]


def test_one_rank_alone_keeps_its_own(ranks: RankPool) -> None:
    assert ranks.run(2, alone) == [[[0.0, 1.0, 2.0, 3.0]] * 3, [[10.0, 11.0, 12.0, 13.0]] * 3]


def premultiplied(scatter: bool) -> None:
    operation = dist._make_nccl_premul_sum(0.5)  # type: ignore[attr-defined]
    if scatter:
        dist.reduce_scatter_tensor(torch.zeros(2), own_values(), op=operation)
    else:
        dist.all_reduce(own_values(), op=operation)


@pytest.mark.parametrize("scatter", [False, True])
def test_premultiplied_sums_are_refused_by_name(ranks: RankPool, scatter: bool) -> None:
    with pytest.raises(RankFailure, match="a pre-multiplied reduction needs NCCL"):
        ranks.run(2, premultiplied, scatter)


def groups_for_nccl() -> tuple[str, str, float]:
    group = dist.new_group([0, 1], backend="nccl", pg_options=None, device_id=None)
    dist.barrier(group=group, device_ids=[0])
    mesh = device_mesh.init_device_mesh("cuda", (2,))
    value = own_values().sum()
    dist.all_reduce(value, group=mesh.get_group())
    return dist.get_backend(group), mesh.device_type, float(value)


def test_groups_and_meshes_for_cuda_are_gloo_on_the_cpu(ranks: RankPool) -> None:
    assert ranks.run(2, groups_for_nccl) == [("gloo", "cpu", 52.0)] * 2


def parts_of_any_size(sizes: list[int]) -> tuple[list[float], list[float]]:
    """Each rank's tensor gathered everywhere; each rank's part of a sum over ranks."""
    rank = dist.get_rank()
    gathered = torch.zeros(sum(sizes))
    dist.all_gather(list(gathered.split(sizes)), torch.full((sizes[rank],), float(rank + 1)))
    summed = torch.zeros(sizes[rank])
    whole = torch.arange(float(sum(sizes))) * (rank + 1)
    dist.reduce_scatter(summed, list(whole.split(sizes)))
    assert whole.tolist() == (torch.arange(float(sum(sizes))) * (rank + 1)).tolist(), "the input was used up"
    return gathered.tolist(), summed.tolist()


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 1, 2], [0, 4, 1], [0, 0, 0]])
def test_parts_may_have_any_size(ranks: RankPool, sizes: list[int]) -> None:
    borders = [0, sizes[0], sizes[0] + sizes[1], sum(sizes)]
    for rank, (gathered, summed) in enumerate(ranks.run(3, parts_of_any_size, sizes)):
        assert gathered == [float(owner + 1) for owner, size in enumerate(sizes) for _ in range(size)]
        assert summed == [6.0 * place for place in range(borders[rank], borders[rank + 1])]


def asked_for_asynchronously() -> dict[str, bool]:
    """Which collectives had their results when the call returned, before anybody waited."""
    size = 300_000  # large enough that gloo's threads would still be at it
    rank, seen = dist.get_rank(), {}
    gathered = torch.zeros(2 * size)
    work = dist.all_gather_into_tensor(gathered, torch.full((size,), rank + 1.0), async_op=True)
    seen["gather"] = work.is_completed() and gathered[[0, -1]].tolist() == [1.0, 2.0]
    part = torch.zeros(size)
    work = dist.reduce_scatter_tensor(part, torch.full((2 * size,), rank + 1.0), async_op=True)
    seen["scatter"] = work.is_completed() and part[[0, -1]].tolist() == [3.0, 3.0]
    total = torch.full((size,), rank + 1.0)
    work = dist.all_reduce(total, async_op=True)
    seen["reduce"] = work.is_completed() and total[[0, -1]].tolist() == [3.0, 3.0]
    exchanged = torch.zeros(2 * size)
    work = dist.all_to_all_single(exchanged, torch.full((2 * size,), rank + 1.0), async_op=True)
    seen["exchange"] = work.is_completed() and exchanged[[0, -1]].tolist() == [1.0, 2.0]
    seen["no work unasked"] = dist.all_reduce(total) is None
    return seen


def test_a_collective_is_done_when_it_returns(ranks: RankPool) -> None:
    for seen in ranks.run(2, asked_for_asynchronously):
        assert all(seen.values()), seen


def gather_in_overlapping_blocks(rounds: int) -> int:
    """Wrong results of gathers as Megatron-FSDP asks for them: some tensors together, then the next ones."""
    rank, wrong = dist.get_rank(), 0
    blocks = [[1536, 512], [48], [16, 2048]]
    for _ in range(rounds):
        group = dist.new_group([0, 1])
        for _ in range(10):
            asked = []
            for block in blocks:
                with dist._coalescing_manager(group, async_ops=True) as works:  # type: ignore[attr-defined]
                    for size in block:
                        asked.append((works, torch.zeros(2 * size), size))
                        part = torch.full((size,), size + rank, dtype=torch.float32)
                        dist.all_gather_into_tensor(asked[-1][1], part, group=group, async_op=True)
            for works, gathered, size in asked:
                works.wait()
                wrong += gathered.tolist() != [size] * size + [size + 1] * size
        dist.destroy_process_group(group)
    return wrong


def test_coalesced_gathers_never_mix(ranks: RankPool) -> None:
    """torch's own over gloo break the heap or mix messages in some processes, not in all (docs/decisions.md)."""
    assert ranks.run(2, gather_in_overlapping_blocks, 20) == [0, 0]
