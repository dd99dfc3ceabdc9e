"""The `parallel` section: how the model and the batch are spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from foundation.errors import ConfigError
from foundation.section import Section

Size = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]


def _none(_: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap", "cuda_graphs"), False)


def _data_parallel(given: dict[str, Any]) -> dict[str, Any]:
    """From ZeRO-2 on communication overlaps whatever is asked for."""
    stage = given.get("zero_stage", 1)
    return _none(given) | {"overlap_grad_reduce": stage in (0, 1), "overlap_param_gather": stage == 1}


def _full(given: dict[str, Any]) -> dict[str, Any]:
    return _data_parallel(given) | {
        "tp_comm_overlap": given.get("sequence_parallel") is True,
        "cuda_graphs": given.get("zero_stage", 1) in (0, 1),
    }


OVERLAP: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "none": _none,
    "data_parallel": _data_parallel,
    "full": _full,
}


class ParallelConfig(Section):
    """Sizes of the parallel grid and how gradients and parameters travel in it."""

    tensor_model_parallel_size: Size = 1
    """Ranks that share one layer: each holds 1/N of the attention heads and of the feed-forward columns."""

    pipeline_model_parallel_size: Size = 1
    """Stages that the layers are cut into; micro-batches flow through them."""

    virtual_pipeline_model_parallel_size: Size | None = None
    """Chunks of layers that each stage holds (interleaved 1F1B). None or 1: one chunk a stage."""

    context_parallel_size: Size = 1
    """Ranks that share one sequence: each holds 1/N of its tokens."""

    expert_model_parallel_size: Size = 1
    """Ranks that share the experts of a mixture-of-experts layer."""

    data_parallel_size: Size | None = None
    """Replicas that read different batches. None: world size / (tensor x context x pipeline), which is 1 for a run
    that starts its own ranks on this machine."""

    sequence_parallel: Flag = False
    """Split norms, dropout and residuals over the tensor-parallel ranks along the sequence (arXiv 2205.05198)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What each replica holds only 1/data_parallel_size of (arXiv 1910.02054). 0: nothing. 1: the optimizer state.
    2: gradients too. 3: weights too; a layer's are gathered while it computes. From 2 on communication overlaps with
    computation whatever the overlap settings say."""

    zero_implementation: Literal["megatron_fsdp", "fsdp2"] = "megatron_fsdp"
    """Who shards at zero_stage 2 and 3: megatron-core's Megatron-FSDP or PyTorch's FSDP2."""

    overlap: Literal["none", "data_parallel", "full"] | None = None
    """A preset of the fields below; those given beside it override it. none: all off. data_parallel: gradients are
    reduced and parameters gathered while layers compute. full: tensor-parallel communication and CUDA graphs too,
    where the layout has a use for them; needs GPUs with Transformer Engine. None: each field as it stands."""

    overlap_grad_reduce: Flag = False
    """Reduce gradients bucket by bucket while the backward pass still runs."""

    overlap_param_gather: Flag = False
    """Gather updated parameters bucket by bucket while the next forward pass runs. Needs zero_stage 1 and
    overlap_grad_reduce."""

    tp_comm_overlap: Flag = False
    """Tensor-parallel communication in pieces, under the matrix products that make or use them (user buffers of
    Transformer Engine). Needs sequence_parallel, and GPUs of one node."""

    cuda_graphs: Flag = False
    """Record each layer's kernels once and replay them: saves starting them one by one, which shows where layers are
    small. Needs a GPU, and steps of the same shape."""

    grad_reduce_in_fp32: Flag = True
    """Add up and reduce gradients in fp32 whatever the precision of training."""

    bucket_size: Size | None = None
    """Parameters in one bucket of gradient communication. None: megatron-core's choice,
    max(40,000,000, 1,000,000 x data_parallel_size), when communication overlaps, and one bucket when it does not."""

    pipeline_layers: tuple[Annotated[int, Field(strict=True)], ...] | None = None
    """Layers of each pipeline stage, first to last, for an uneven split. None: the same number in every stage."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("overlap"), str) or given["overlap"] not in OVERLAP:
            return given
        return OVERLAP[given["overlap"]](given) | given

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        _sequence_parallel_needs_tensor_parallel(self)
        _overlap_param_gather_needs_sharded_optimizer(self)
        _overlap_param_gather_needs_overlap_grad_reduce(self)
        _pipeline_layers_name_every_stage(self)
        _bucket_size_needs_overlap_grad_reduce(self)
        _tensor_overlap_needs_sequence_parallel(self)
        return self


def _sequence_parallel_needs_tensor_parallel(config: ParallelConfig) -> None:
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        raise ConfigError(
            "parallel.sequence_parallel",
            True,
            rule="splits activations over the tensor-parallel ranks, and parallel.tensor_model_parallel_size is 1",
            cure="parallel.sequence_parallel=false, or parallel.tensor_model_parallel_size=2 or more",
        )


def _overlap_param_gather_needs_sharded_optimizer(config: ParallelConfig) -> None:
    if config.overlap_param_gather and config.zero_stage == 0:
        raise ConfigError(
            "parallel.overlap_param_gather",
            True,
            rule="gathers what a sharded optimizer updated, and parallel.zero_stage is 0: nothing to gather",
            cure="parallel.zero_stage=1, or parallel.overlap_param_gather=false",
        )


def _overlap_param_gather_needs_overlap_grad_reduce(config: ParallelConfig) -> None:
    if config.overlap_param_gather and not config.overlap_grad_reduce:
        raise ConfigError(
            "parallel.overlap_param_gather",
            True,
            rule="uses the buckets of parallel.overlap_grad_reduce, which is false",
            cure="parallel.overlap_grad_reduce=true, or parallel.overlap_param_gather=false",
        )


def _pipeline_layers_name_every_stage(config: ParallelConfig) -> None:
    layers, stages = config.pipeline_layers, config.pipeline_model_parallel_size
    if layers is None:
        return
    if len(layers) != stages:
        raise ConfigError(
            "parallel.pipeline_layers",
            list(layers),
            rule=f"has one entry a stage: {len(layers)} for parallel.pipeline_model_parallel_size {stages}",
            cure=f"{stages} entries that add up to model.num_layers, or "
            f"parallel.pipeline_model_parallel_size={len(layers)}",
        )
    if min(layers) < 1:
        split = ",".join(str(size) for size in even_split(max(sum(layers), stages), stages))
        raise ConfigError(
            "parallel.pipeline_layers",
            list(layers),
            rule="gives every stage 1 layer or more",
            cure=f"parallel.pipeline_layers=[{split}]",
        )


def _bucket_size_needs_overlap_grad_reduce(config: ParallelConfig) -> None:
    if config.bucket_size is not None and not config.overlap_grad_reduce:
        raise ConfigError(
            "parallel.bucket_size",
            config.bucket_size,
            rule="cuts the gradients that parallel.overlap_grad_reduce sends early, and that is false: "
            "core would send them as one bucket",
            cure="parallel.overlap_grad_reduce=true, or parallel.bucket_size=null",
        )


def _tensor_overlap_needs_sequence_parallel(config: ParallelConfig) -> None:
    if config.tp_comm_overlap and not config.sequence_parallel:
        raise ConfigError(
            "parallel.tp_comm_overlap",
            True,
            rule="hides what sequence parallelism sends, and parallel.sequence_parallel is false",
            cure="parallel.sequence_parallel=true with parallel.tensor_model_parallel_size=2 or more, or "
            "parallel.tp_comm_overlap=false",
        )


def even_split(num_layers: int, stages: int) -> list[int]:
    """`num_layers` over `stages` as evenly as possible, larger stages in the middle of the pipeline.

    The first stage also holds the embedding and the last one the output layer, so spare layers go between them.
    """
    size, spare = divmod(num_layers, stages)
    sizes = [size] * stages
    inner_first = sorted(range(stages), key=lambda stage: (stage in (0, stages - 1), stage))
    for stage in inner_first[:spare]:
        sizes[stage] += 1
    return sizes
