"""The grid at sizes that nobody chose: ranks and coordinates, groups, stages; core's RankGenerator is the judge."""

from __future__ import annotations

import itertools

from hypothesis import assume, given
from hypothesis import strategies as st

from foundation.errors import ConfigError
from parallel.config import ParallelConfig, even_split
from parallel.layout import AXES, ParallelLayout

SIZES = st.integers(1, 5)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    """Grids of up to 625 ranks, experts among context x data."""
    tp, cp, dp, pp = (draw(SIZES) for _ in range(4))
    experts = [size for size in range(1, cp * dp + 1) if cp * dp % size == 0]
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=draw(st.sampled_from(experts)),
    )


@given(layouts(), st.data())
def test_ranks_and_coordinates_are_one_to_one(grid: ParallelLayout, data: st.DataObject) -> None:
    ranks = range(grid.world_size)
    everywhere = [grid.coordinates(rank) for rank in ranks]
    assert len(set(everywhere)) == grid.world_size
    rank = data.draw(st.sampled_from(ranks))
    assert grid.rank(everywhere[rank]) == rank
    assert all(0 <= getattr(everywhere[rank], axis) < getattr(grid, axis) for axis in AXES)


@given(layouts(), st.data())
def test_groups_partition_the_world_and_their_members_agree(grid: ParallelLayout, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.sampled_from(AXES), min_size=1, unique=True))
    for axis in ("-".join(some), "ep"):
        groups = {tuple(grid.ranks_along(axis, rank)) for rank in range(grid.world_size)}
        assert sorted(itertools.chain.from_iterable(groups)) == list(range(grid.world_size))
        for group in groups:
            assert list(group) == sorted(group)
            assert all(tuple(grid.ranks_along(axis, member)) == group for member in group)


@given(layouts(), st.data())
def test_groups_are_those_of_core(grid: ParallelLayout, data: st.DataObject) -> None:
    from megatron.core.parallel_state import RankGenerator

    some = data.draw(st.lists(st.sampled_from(AXES), min_size=1, unique=True))
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order=order)
    shards = grid.cp * grid.dp // grid.ep
    experts = RankGenerator(tp=grid.tp, ep=grid.ep, dp=shards, pp=grid.pp, cp=1, order=order)
    for axis, generator in (("-".join(some), dense), ("ep", experts)):
        for group in generator.get_ranks(axis):
            for rank in group:
                assert grid.ranks_along(axis, rank) == list(group), f"{axis} at rank {rank} of {grid.describe()}"


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 40))
def test_every_layer_has_one_place_or_the_cure_works(pp: int, vpp: int, num_layers: int) -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    try:
        places = grid.stage_layers(num_layers)
    except ConfigError as refusal:
        assert num_layers % (pp * vpp)
        assert refusal.cure is not None
        if "pipeline_layers=[" in refusal.cure:
            uneven = ParallelLayout(pipeline_model_parallel_size=pp, pipeline_layers=tuple(even_split(num_layers, pp)))
            places, vpp = uneven.stage_layers(num_layers), 1
        else:
            return
    met = [layer for chunk in range(vpp) for stage in places for layer in stage[chunk]]
    assert met == list(range(num_layers)), "a micro-batch meets the layers in their order"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(-2, 2))
def test_uneven_stages_hold_what_they_were_told(sizes: list[int], off: int) -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=len(sizes), pipeline_layers=tuple(sizes))
    assume(sum(sizes) + off >= 1)
    try:
        places = grid.stage_layers(sum(sizes) + off)
    except ConfigError:
        assert off
        return
    assert not off and [len(stage[0]) for stage in places] == sizes
    assert [layer for stage in places for layer in stage[0]] == list(range(sum(sizes)))


@given(st.tuples(SIZES, SIZES, SIZES), st.none() | SIZES, st.none() | st.integers(1, 6), st.sampled_from([0, 0, 1, 3]))
def test_a_config_fills_the_world_or_is_refused(
    sizes: tuple[int, int, int], replicas: int | None, whole_replicas: int | None, spare: int
) -> None:
    tp, cp, pp = sizes
    world_size = None if whole_replicas is None else tp * cp * pp * whole_replicas + spare
    config = ParallelConfig(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=replicas,
    )
    fits = world_size is None or (
        world_size == tp * cp * pp * replicas if replicas else not world_size % (tp * cp * pp)
    )
    try:
        grid = ParallelLayout.from_config(config, world_size)
    except ConfigError:
        assert not fits
        return
    assert fits and grid.world_size == (world_size or tp * cp * pp * (replicas or 1))
