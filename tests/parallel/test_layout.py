"""The grid: ranks, coordinates and groups against megatron-core's own rank generator; layers of the stages."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from foundation.errors import ConfigError
from parallel.config import ParallelConfig, even_split
from parallel.layout import ParallelLayout, RankCoordinates


def layout(tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1, ep: int = 1) -> ParallelLayout:
    return ParallelLayout(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )


GRIDS = [layout(*sizes) for sizes in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 3))]
SIZES = [f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "expert_model", "context", "data")]
TOKENS = ("tp", "cp", "dp", "pp", "tp-pp", "tp-cp", "dp-cp", "tp-dp-cp", "cp-dp-pp", "tp-cp-dp-pp")


@pytest.mark.parametrize("grid", GRIDS, ids=ParallelLayout.describe)
def test_rank_and_coordinates_are_a_bijection(grid: ParallelLayout) -> None:
    seen = {grid.coordinates(rank) for rank in range(grid.world_size)}
    assert len(seen) == grid.world_size == grid.tp * grid.cp * grid.dp * grid.pp
    assert [grid.rank(grid.coordinates(rank)) for rank in range(grid.world_size)] == list(range(grid.world_size))


@pytest.mark.parametrize("grid", GRIDS, ids=ParallelLayout.describe)
@pytest.mark.parametrize("axis", TOKENS)
def test_groups_partition_the_world(grid: ParallelLayout, axis: str) -> None:
    groups = {tuple(grid.ranks_along(axis, rank)) for rank in range(grid.world_size)}
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(grid.world_size))
    assert all(rank in grid.ranks_along(axis, rank) for rank in range(grid.world_size))


@pytest.mark.parametrize("grid", [*GRIDS, layout(2, 2, 4, 2), layout(8, 1, 4, 4)], ids=ParallelLayout.describe)
def test_groups_are_those_of_core(grid: ParallelLayout) -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    core = state.RankGenerator(tp=grid.tp, ep=1, dp=grid.dp, pp=grid.pp, cp=grid.cp, order="tp-cp-ep-dp-pp")
    for axis in TOKENS:
        theirs = [list(group) for group in core.get_ranks(axis)]
        for group in theirs:
            for rank in group:
                assert grid.ranks_along(axis, rank) == group, f"{axis} at rank {rank}"


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1, 2), (2, 1, 4, 2, 4), (2, 2, 2, 1, 4), (1, 2, 6, 3, 3)])
def test_expert_groups_are_those_of_core(sizes: tuple[int, ...]) -> None:
    state = pytest.importorskip("megatron.core.parallel_state")
    grid = layout(*sizes)
    core = state.RankGenerator(
        tp=grid.tp, ep=grid.ep, dp=grid.cp * grid.dp // grid.ep, pp=grid.pp, cp=1, order="tp-cp-ep-dp-pp"
    )
    for group in core.get_ranks("ep"):
        for rank in group:
            assert grid.ranks_along("ep", rank) == list(group)


def test_tensor_ranks_are_neighbours_and_stages_are_far() -> None:
    grid = layout(tp=2, dp=2, pp=2)
    assert grid.ranks_along("tp", 5) == [4, 5]
    assert grid.ranks_along("dp", 5) == [5, 7]
    assert grid.ranks_along("pp", 5) == [1, 5]
    assert grid.coordinates(6) == RankCoordinates(tp=0, cp=0, dp=1, pp=1)


def test_what_is_outside_the_grid_is_refused() -> None:
    grid = layout(tp=2, pp=2)
    with pytest.raises(ValueError, match="rank 4 is outside a world of 4 ranks"):
        grid.coordinates(4)
    with pytest.raises(ValueError, match=r"dp coordinate 1 is outside 0\.\.0"):
        grid.rank(RankCoordinates(tp=0, cp=0, dp=1, pp=0))
    with pytest.raises(ValueError, match="no axis 'zz'"):
        grid.ranks_along("tp-zz", 0)


def test_description_is_short() -> None:
    assert layout(tp=2, pp=2).describe() == "TP2 x PP2 x DP1"
    full = ParallelLayout(2, 2, 3, 2, 2, 2)
    assert full.describe() == "TP2 x CP2 x PP2 x VPP3 x EP2 x DP2"


@pytest.mark.parametrize(("pp", "vpp"), list(itertools.product((1, 2, 4), (None, 1, 2, 3))))
def test_every_layer_has_one_place(pp: int, vpp: int | None) -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp)
    places = grid.stage_layers(24)
    assert len(places) == pp and all(len(chunks) == (vpp or 1) for chunks in places)
    # Chunk by chunk over the stages is the order in which a micro-batch meets the layers.
    met = [layer for chunk in range(vpp or 1) for stage in range(pp) for layer in places[stage][chunk]]
    assert met == list(range(24))


def test_interleaved_stages_hold_layers_from_all_over_the_model() -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    assert grid.stage_layers(8) == ((range(2), range(4, 6)), (range(2, 4), range(6, 8)))


def test_uneven_stages_follow_pipeline_layers() -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=3, pipeline_layers=(1, 3, 2))
    assert grid.stage_layers(6) == ((range(1),), (range(1, 4),), (range(4, 6),))
    with pytest.raises(ConfigError, match=r"\[1, 3, 2\].*(.|\n)*add up to model.num_layers 7"):
        grid.stage_layers(7)
    with pytest.raises(ConfigError, match=r"parallel.pipeline_layers=\[2,3,2\]"):
        ParallelLayout(pipeline_model_parallel_size=3).stage_layers(7)


def test_spare_layers_go_between_the_first_and_the_last_stage() -> None:
    assert even_split(14, 4) == [3, 4, 4, 3]
    assert even_split(9, 4) == [2, 3, 2, 2]
    assert even_split(11, 4) == [3, 3, 3, 2]
    assert all(sum(even_split(layers, stages)) == layers for layers in range(1, 40) for stages in range(1, layers + 1))


def test_replicas_fill_the_world() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert ParallelLayout.from_config(config, 16).dp == 4
    assert ParallelLayout.from_config(config, 4).dp == 1
    assert ParallelLayout.from_config(config).world_size == 4
    with pytest.raises(ConfigError, match="world size = 6"):
        ParallelLayout.from_config(config, 6)
    with pytest.raises(ConfigError, match="world size = 2"):
        ParallelLayout.from_config(config, 2)


def test_replicas_that_do_not_fit_the_world_are_refused_with_the_number_that_does() -> None:
    config = ParallelConfig(tensor_model_parallel_size=2, data_parallel_size=3)
    assert ParallelLayout.from_config(config).world_size == 6
    with pytest.raises(ConfigError, match=r"parallel\.data_parallel_size=4"):
        ParallelLayout.from_config(config, 8)


def test_one_virtual_chunk_is_no_interleaving() -> None:
    config = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=1)
    assert ParallelLayout.from_config(config).virtual_pipeline_model_parallel_size is None


def test_sizes_of_a_layout_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor_model_parallel_size = 0"):
        layout(tp=0)
    with pytest.raises(ConfigError, match=r"parallel\.expert_model_parallel_size = 3"):
        layout(dp=4, ep=3)


def test_nothing_asked_for_is_one_rank() -> None:
    plain = ParallelLayout()
    assert plain == ParallelLayout.from_config(ParallelConfig())
    values = dataclasses.asdict(plain)
    assert {values.pop(name) for name in SIZES} == {1}
    assert values.pop("zero_stage") == 1 and values.pop("grad_reduce_in_fp32") and values.pop("zero_implementation")
    assert not any(values.values()), "everything else is asked for by name"
    assert (plain.world_size, plain.vpp, plain.describe()) == (1, 1, "TP1 x PP1 x DP1")


def test_every_setting_reaches_the_layout() -> None:
    sizes = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 3,
        "virtual_pipeline_model_parallel_size": 2,
        "context_parallel_size": 2,
        "expert_model_parallel_size": 4,
        "data_parallel_size": 2,
    }
    flags = {"sequence_parallel": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 77}
    sharded = {"zero_stage": 3, "zero_implementation": "fsdp2", "grad_reduce_in_fp32": False}
    uneven = {"pipeline_model_parallel_size": 2, "pipeline_layers": (3, 1)}
    for given in (sizes | flags, sharded, uneven):
        grid = ParallelLayout.from_config(ParallelConfig.model_validate(given))
        assert {name: getattr(grid, name) for name in given} == given


@pytest.mark.parametrize(
    ("stage", "implementation", "fully_sharded", "distributed"),
    [
        (0, "megatron_fsdp", False, False),
        (1, "megatron_fsdp", False, True),
        (2, "megatron_fsdp", True, True),
        (3, "megatron_fsdp", True, True),
        (2, "fsdp2", True, False),
        (3, "fsdp2", True, False),
    ],
)
def test_who_shards_what(stage: int, implementation: str, fully_sharded: bool, distributed: bool) -> None:
    grid = ParallelLayout(data_parallel_size=2, zero_stage=stage, zero_implementation=implementation)  # type: ignore[arg-type]
    assert (grid.fully_sharded, grid.distributed_optimizer) == (fully_sharded, distributed)


def test_ends_of_the_grid() -> None:
    grid = layout(tp=2, cp=3)
    assert grid.coordinates(5) == RankCoordinates(tp=1, cp=2, dp=0, pp=0) and grid.coordinates(0).cp == 0
    for rank in (-1, 6):
        with pytest.raises(ValueError, match=f"rank {rank} is outside a world of 6"):
            grid.coordinates(rank)
    for tp, cp in ((-1, 0), (2, 0), (0, -1), (0, 3)):
        with pytest.raises(ValueError, match=r"coordinate (-1|2|3) is outside 0\.\.[12]"):
            grid.rank(RankCoordinates(tp=tp, cp=cp, dp=0, pp=0))


@pytest.mark.parametrize(
    ("stages", "chunks", "num_layers", "cure"),
    [
        (3, None, 7, "parallel.pipeline_layers=[2,3,2], or model.num_layers=6"),
        (3, None, 8, "parallel.pipeline_layers=[3,3,2], or model.num_layers=9"),
        (4, None, 3, "parallel.pipeline_model_parallel_size=3"),
        (4, 2, 1, "model.num_layers=8"),
        (2, 2, 6, "model.num_layers=8"),
        (2, 2, 9, "model.num_layers=8"),
    ],
)
def test_layers_that_cannot_be_cut_come_with_a_number_that_can(
    stages: int, chunks: int | None, num_layers: int, cure: str
) -> None:
    grid = ParallelLayout(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=chunks)
    with pytest.raises(ConfigError) as caught:
        grid.stage_layers(num_layers)
    assert caught.value.cure == cure


@pytest.mark.parametrize(
    ("sizes", "num_layers", "cure"),
    [
        ((2, 2), 4, "parallel.pipeline_layers=[1,2,1]"),
        ((0, 2, 2), 4, "parallel.pipeline_layers=[1,2,1]"),
        ((1, 1, 1), 4, "parallel.pipeline_layers=[1,2,1]"),
        ((1, 1, 1), 2, "no parallel.pipeline_layers"),
        ((1, 1, 2), 3, "parallel.pipeline_layers=[1,1,1]"),
    ],
)
def test_uneven_stages_that_do_not_fit(sizes: tuple[int, ...], num_layers: int, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelLayout(pipeline_model_parallel_size=3, pipeline_layers=sizes).stage_layers(num_layers)
    assert caught.value.cure == cure
    both = ParallelLayout(1, 3, 2, pipeline_layers=(1, 1, 1))
    with pytest.raises(ConfigError, match="gives one chunk a stage"):
        both.stage_layers(3)


@pytest.mark.parametrize(
    ("given", "world_size", "field", "cure"),
    [
        ({}, 6, "world size", "start 8 ranks"),
        ({}, 2, "world size", "start 4 ranks"),
        ({}, 9, "world size", "start 12 ranks"),
        ({"data_parallel_size": 2}, 6, "world size", "start 8 ranks"),
        ({"data_parallel_size": 2}, 4, "parallel.data_parallel_size", "parallel.data_parallel_size=1, or leave it out"),
        ({"data_parallel_size": 2}, 12, "parallel.data_parallel_size", "parallel.data_parallel_size=3"),
    ],
)
def test_worlds_that_the_grid_does_not_fill(given: dict[str, int], world_size: int, field: str, cure: str) -> None:
    config = ParallelConfig.model_validate({"tensor_model_parallel_size": 2, "context_parallel_size": 2} | given)
    with pytest.raises(ConfigError) as caught:
        ParallelLayout.from_config(config, world_size)
    assert caught.value.field == field and str(caught.value.cure).startswith(cure)
    assert "tensor 2 x context 2 x pipeline 1" in str(caught.value.rule)
    assert " 4 ranks" in str(caught.value.rule) or "= 8, and" in str(caught.value.rule)


def test_what_zero_does_not_go_with_is_refused_with_the_layout() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.zero_stage = 2"):
        ParallelLayout(zero_stage=2)


def test_a_replica_is_tensor_times_context_times_pipeline_ranks() -> None:
    config = ParallelConfig.model_validate(
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "pipeline_model_parallel_size": 3}
    )
    assert ParallelLayout.from_config(config, 24).dp == 2
    with pytest.raises(ConfigError, match="start 24 ranks"):
        ParallelLayout.from_config(config, 14)
    assert "VPP2" in ParallelLayout(1, 2, 2).describe()
