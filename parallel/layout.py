"""The parallel grid as one value: sizes, ranks and coordinates, layers of each stage.

Ranks are numbered in megatron-core's default order "tp-cp-ep-dp-pp" (core.parallel_state.RankGenerator): the tensor
coordinate varies fastest, the pipeline coordinate slowest. Expert parallelism takes its ranks out of context x data,
as core does, and is no coordinate of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from foundation.errors import ConfigError
from parallel.config import ParallelConfig, even_split
from parallel.zero_rules import check_zero

AXES = ("tp", "cp", "dp", "pp")
"""The coordinates of a rank, fastest first."""

LayerRanges = tuple[tuple[range, ...], ...]
"""Global layer indices: stage, then virtual chunk."""


@dataclass(frozen=True)
class RankCoordinates:
    """Where a rank stands in the grid; each coordinate counts from 0."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ParallelLayout:
    """The sizes of the grid and the options of its communication. Fields are those of `ParallelConfig`, resolved.

    Raises:
        ConfigError: a size below 1, experts that do not divide context x data parallel ranks, or a ZeRO stage that
            does not go with the rest.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    data_parallel_size: int = 1
    sequence_parallel: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 1
    zero_implementation: Literal["megatron_fsdp", "fsdp2"] = "megatron_fsdp"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False
    cuda_graphs: bool = False
    grad_reduce_in_fp32: bool = True
    bucket_size: int | None = None
    pipeline_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for axis, field in (
            ("tp", "tensor_model_parallel_size"),
            ("cp", "context_parallel_size"),
            ("dp", "data_parallel_size"),
            ("pp", "pipeline_model_parallel_size"),
            ("vpp", "virtual_pipeline_model_parallel_size"),
            ("ep", "expert_model_parallel_size"),
        ):
            if getattr(self, axis) < 1:
                raise ConfigError(f"parallel.{field}", getattr(self, axis), rule="is 1 or more", cure="1")
        if self.cp * self.dp % self.ep:
            raise ConfigError(
                "parallel.expert_model_parallel_size",
                self.ep,
                rule=f"divides context x data parallel ranks = {self.cp} x {self.dp} = {self.cp * self.dp}",
                cure=f"a divisor of {self.cp * self.dp}, or parallel.data_parallel_size={self.ep}",
            )
        check_zero(self)

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int | None = None) -> Self:
        """The layout of `config` over `world_size` ranks.

        Args:
            config: the `parallel` section.
            world_size: ranks that will run; None for a run that starts its own, which gets as many as the config
                asks for (one replica where `data_parallel_size` is not given).

        Raises:
            ConfigError: the grid does not fill the world exactly.
        """
        one_replica = (
            config.tensor_model_parallel_size * config.context_parallel_size * config.pipeline_model_parallel_size
        )
        replicas = config.data_parallel_size
        if replicas is None:
            replicas = 1 if world_size is None else world_size // one_replica
        if world_size is not None and (replicas < 1 or one_replica * replicas != world_size):
            raise _world_error(config, world_size)
        chunks = config.virtual_pipeline_model_parallel_size
        return cls(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            # Core interleaves whatever is not None, so one chunk a stage is told as None.
            virtual_pipeline_model_parallel_size=chunks if chunks is not None and chunks > 1 else None,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            data_parallel_size=replicas,
            sequence_parallel=config.sequence_parallel,
            zero_stage=config.zero_stage,
            zero_implementation=config.zero_implementation,
            overlap_grad_reduce=config.overlap_grad_reduce,
            overlap_param_gather=config.overlap_param_gather,
            tp_comm_overlap=config.tp_comm_overlap,
            cuda_graphs=config.cuda_graphs,
            grad_reduce_in_fp32=config.grad_reduce_in_fp32,
            bucket_size=config.bucket_size,
            pipeline_layers=config.pipeline_layers,
        )

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return self.pipeline_model_parallel_size

    @property
    def vpp(self) -> int:
        """Virtual chunks a stage, 1 without interleaving."""
        return 1 if self.virtual_pipeline_model_parallel_size is None else self.virtual_pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context-parallel ranks."""
        return self.context_parallel_size

    @property
    def ep(self) -> int:
        """Expert-parallel ranks, taken out of context x data."""
        return self.expert_model_parallel_size

    @property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.data_parallel_size

    @property
    def world_size(self) -> int:
        """All ranks: tensor x context x data x pipeline."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def fully_sharded(self) -> bool:
        """Whether gradients (zero_stage 2) or weights too (3) are sharded over replicas."""
        return self.zero_stage >= 2

    @property
    def distributed_optimizer(self) -> bool:
        """Whether core's DistributedOptimizer steps: FSDP2 shards below an optimizer that does not know of it."""
        return self.zero_stage > 0 and not (self.fully_sharded and self.zero_implementation == "fsdp2")

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where `rank` stands.

        Raises:
            ValueError: no such rank in this world.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a world of {self.world_size} ranks ({self.describe()})")
        found: dict[str, int] = {}
        rest = rank
        for axis in AXES:
            rest, found[axis] = divmod(rest, self._size(axis))
        return RankCoordinates(**found)

    def rank(self, coordinates: RankCoordinates) -> int:
        """The rank that stands at `coordinates`.

        Raises:
            ValueError: a coordinate outside its axis.
        """
        rank, stride = 0, 1
        for axis in AXES:
            place, size = getattr(coordinates, axis), self._size(axis)
            if not 0 <= place < size:
                raise ValueError(f"{axis} coordinate {place} is outside 0..{size - 1} ({self.describe()})")
            rank += place * stride
            stride *= size
        return rank

    def ranks_along(self, axis: str, rank: int) -> list[int]:
        """The ranks of `rank`'s group along `axis`, ascending, `rank` included.

        Args:
            axis: "tp", "cp", "dp", "pp", several joined by "-" as in core ("tp-pp", "dp-cp"), or "ep".
            rank: a rank of this world.

        Raises:
            ValueError: an axis or a rank that does not exist.
        """
        here = self.coordinates(rank)
        if axis == "ep":
            return self._expert_ranks(rank)
        axes = axis.split("-")
        unknown = sorted(set(axes) - set(AXES))
        if unknown:
            raise ValueError(f"no axis {unknown[0]!r}; axes are {', '.join(AXES)}, ep")
        group = [self.rank(replace(here, **dict.fromkeys(axes, 0)))]
        stride = 1
        for name in AXES:
            if name in axes:
                group = [first + place * stride for place in range(self._size(name)) for first in group]
            stride *= self._size(name)
        return group

    def stage_layers(self, num_layers: int) -> LayerRanges:
        """The global layer indices of each stage's chunks.

        Chunk v of stage p holds layers that follow those of stage p-1 in chunk v, as core's interleaved schedule
        expects (arXiv 2104.04473, section 2.2).

        Args:
            num_layers: layers of the whole model.

        Returns:
            `result[stage][chunk]` is a range of global layer indices, from 0.

        Raises:
            ConfigError: the layers cannot be cut so.
        """
        if self.pipeline_layers is not None:
            return self._uneven_stage_layers(num_layers, self.pipeline_layers)
        chunks = self.pp * self.vpp
        if num_layers % chunks:
            raise self._uncut_error(num_layers, chunks)
        size = num_layers // chunks
        return tuple(
            tuple(
                range((chunk * self.pp + stage) * size, (chunk * self.pp + stage + 1) * size)
                for chunk in range(self.vpp)
            )
            for stage in range(self.pp)
        )

    def describe(self) -> str:
        """The sizes for people: `TP2 x PP2 x DP1`; context, virtual chunks and experts only where above 1."""
        parts = [f"TP{self.tp}"]
        if self.cp > 1:
            parts.append(f"CP{self.cp}")
        parts.append(f"PP{self.pp}")
        if self.vpp > 1:
            parts.append(f"VPP{self.vpp}")
        if self.ep > 1:
            parts.append(f"EP{self.ep}")
        parts.append(f"DP{self.dp}")
        return " x ".join(parts)

    def _size(self, axis: str) -> int:
        size: int = getattr(self, axis)
        return size

    def _expert_ranks(self, rank: int) -> list[int]:
        # Core's expert grid is tensor x experts x expert data x pipeline, so experts vary right after tensor ranks.
        first = rank - (rank // self.tp % self.ep) * self.tp
        return [first + expert * self.tp for expert in range(self.ep)]

    def _uncut_error(self, num_layers: int, chunks: int) -> ConfigError:
        whole = f"model.num_layers={_nearest_multiple(num_layers, chunks)}"
        if self.vpp > 1:
            rule = f"is divisible by pipeline stages x virtual chunks = {self.pp} x {self.vpp} = {chunks}"
            return ConfigError("model.num_layers", num_layers, rule=rule, cure=whole)
        if num_layers < self.pp:
            return ConfigError(
                "parallel.pipeline_model_parallel_size",
                self.pp,
                rule=f"is at most model.num_layers {num_layers}, or stages stay empty",
                cure=f"parallel.pipeline_model_parallel_size={num_layers}",
            )
        split = ",".join(str(layers) for layers in even_split(num_layers, self.pp))
        return ConfigError(
            "model.num_layers",
            num_layers,
            rule=f"is divisible by parallel.pipeline_model_parallel_size {self.pp} where parallel.pipeline_layers "
            "is not given",
            cure=f"parallel.pipeline_layers=[{split}], or {whole}",
        )

    def _uneven_stage_layers(self, num_layers: int, sizes: tuple[int, ...]) -> LayerRanges:
        if self.vpp > 1:
            raise ConfigError(
                "parallel.pipeline_layers",
                list(sizes),
                rule=f"gives one chunk a stage, and parallel.virtual_pipeline_model_parallel_size is {self.vpp}",
                cure="no parallel.pipeline_layers, or no parallel.virtual_pipeline_model_parallel_size",
            )
        split = ",".join(str(layers) for layers in even_split(num_layers, self.pp))
        if len(sizes) != self.pp or sum(sizes) != num_layers or min(sizes) < 1:
            raise ConfigError(
                "parallel.pipeline_layers",
                list(sizes),
                rule=f"has {self.pp} entries of 1 or more that add up to model.num_layers {num_layers}; "
                f"these {len(sizes)} add up to {sum(sizes)}",
                cure=f"parallel.pipeline_layers=[{split}]" if num_layers >= self.pp else "no parallel.pipeline_layers",
            )
        starts = [sum(sizes[:stage]) for stage in range(self.pp)]
        return tuple((range(start, start + size),) for start, size in zip(starts, sizes, strict=True))


def _nearest_multiple(value: int, divisor: int) -> int:
    return max(divisor, round(value / divisor) * divisor)


def _world_error(config: ParallelConfig, world_size: int) -> ConfigError:
    sizes = {
        "tensor": config.tensor_model_parallel_size,
        "context": config.context_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
    }
    one_replica = 1
    for size in sizes.values():
        one_replica *= size
    shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if config.data_parallel_size is None or world_size % one_replica:
        more = max(one_replica, -(-world_size // one_replica) * one_replica)
        return ConfigError(
            "world size",
            world_size,
            rule=f"is a multiple of {shown} = {one_replica} ranks (one replica of the model)",
            cure=f"start {more} ranks, or lower a size under parallel so that their product divides {world_size}",
        )
    return ConfigError(
        "parallel.data_parallel_size",
        config.data_parallel_size,
        rule=f"times {shown} equals the world size: {config.data_parallel_size} x {one_replica} = "
        f"{config.data_parallel_size * one_replica}, and {world_size} ranks run",
        cure=f"parallel.data_parallel_size={world_size // one_replica}, or leave it out",
    )
