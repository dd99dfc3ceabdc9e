"""Rules across sections, kept before any process starts. Imports no torch: a login node answers in a moment.

Rules inside a section are that section's own; how a model is cut is `model.fits_layout`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.config import check_files
from foundation.errors import ConfigError
from launch.machine import compute_capability, gpu_present, package_present
from launch.overlap_checks import graphs_have_one_shape, user_buffers_hold_the_type
from launch.run_folder import run_folder_is_writable
from model.fits_layout import (
    check_model_fits_layout,
    check_sequence_fits_layout,
    fp8_sizes_are_multiples,
    whole_sequences_where_attention_is_cut,
)
from model.fp8 import MULTIPLE, check_bf16_layers, check_chip
from model.kernels.choice import Available, choose_kernels, where_sharded
from parallel.layout import ParallelLayout
from training.profiling.config import check_ranks

if TYPE_CHECKING:
    from launch.config import RunConfig


def check_request(config: RunConfig, *, world_size: int | None) -> ParallelLayout:
    """Every check across sections, those of this machine and of the files included.

    Args:
        config: a validated configuration.
        world_size: ranks that will run; None for a run that starts as many as it needs.

    Returns:
        The layout that the run will have.

    Raises:
        ConfigError: the first rule that is broken, with a value that works and the line where the wrong one stands.
    """
    layout = check_sizes(config, world_size=world_size)
    check_surroundings(config)
    return layout


def check_sizes(config: RunConfig, *, world_size: int | None) -> ParallelLayout:
    """The checks that need nothing but the configuration: the same answer on every machine.

    Raises:
        ConfigError: as `check_request`.
    """
    try:
        check_any_layout(config)
        layout = ParallelLayout.from_config(config.parallel, world_size)
        check_at_layout(config, layout)
    except ConfigError as error:
        raise config.origin.point(error) from None
    return layout


def check_any_layout(config: RunConfig) -> None:
    """The checks of sizes whose answer is the same at every layout.

    Raises:
        ConfigError: the first rule that is broken.
    """
    not_in_this_release(config)
    sequence_fits_positions(config)
    evaluation_has_data(config)
    if config.training.precision == "fp8":
        fp8_recipe_has_kernels(config)


def check_at_layout(config: RunConfig, layout: ParallelLayout) -> None:
    """The checks of sizes at one layout; the planner keeps them for each of its own.

    Raises:
        ConfigError: the first rule that is broken.
    """
    training, packed = config.training, config.data.document_mask
    check_model_fits_layout(config.model, layout)
    check_sequence_fits_layout(
        layout, seq_length=training.seq_length, micro_batch_size=training.micro_batch_size, packed=packed
    )
    whole_sequences_where_attention_is_cut(config.model, layout, packed=packed)
    batch_divides_over_replicas(config, layout)
    check_ranks(config.profile, layout.world_size)
    interleaving_needs_whole_rounds(config, layout)
    fully_sharded_gradients_keep_their_precision(config, layout)
    user_buffers_hold_the_type(config, layout)
    graphs_have_one_shape(config, layout)
    recomputed_layers_divide_each_chunk(config, layout)
    if training.precision == "fp8":
        fp8_fits(config, layout)


def check_surroundings(config: RunConfig) -> None:
    """The checks of what is around the run: GPU, packages, files, the run's folder.

    Raises:
        ConfigError: as `check_request`.
    """
    try:
        fp8_has_hardware(config)
        context_parallel_has_kernels(config)
        kernels_are_here(config)
        overlap_has_hardware(config)
        loggers_are_installed(config)
        check_files(config.data, config.training.seq_length)
        vocabulary_holds_the_tokenizer(config)
        run_folder_is_writable(config)
    except ConfigError as error:
        raise config.origin.point(error) from None


def not_in_this_release(config: RunConfig) -> None:
    """Combinations whose meaning is clear and whose code comes in a later release."""
    if config.model.num_experts is not None and config.training.precision == "fp8":
        raise ConfigError(
            "training.precision",
            "fp8",
            rule=f"does not go with model.num_experts {config.model.num_experts} in this release; "
            "a later one brings it",
            cure="training.precision=bf16",
        )


def sequence_fits_positions(config: RunConfig) -> None:
    """A sequence is no longer than the positions that the model knows."""
    length, positions = config.training.seq_length, config.model.max_position_embeddings
    if length > positions:
        raise ConfigError(
            "training.seq_length",
            length,
            rule=f"is at most model.max_position_embeddings {positions}",
            cure=f"training.seq_length={positions}, or model.max_position_embeddings={length}",
        )


def batch_divides_over_replicas(config: RunConfig, layout: ParallelLayout) -> None:
    """Every replica gets the same number of whole micro-batches of each global batch."""
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    least = micro * layout.dp
    if whole % least:
        raise ConfigError(
            "training.global_batch_size",
            whole,
            rule=f"is a multiple of training.micro_batch_size x replicas = {micro} x {layout.dp} = {least}",
            cure=f"training.global_batch_size={-(-whole // least) * least}",
        )


def fully_sharded_gradients_keep_their_precision(config: RunConfig, layout: ParallelLayout) -> None:
    """FSDP2 keeps gradients in the weights' precision; fp8 under ZeRO-2 and 3 was never tried here."""
    precision = config.training.precision
    if not layout.fully_sharded or precision == "fp32":
        return
    if precision == "fp8":
        raise ConfigError(
            "training.precision",
            precision,
            rule=f"is fp32 or bf16 with parallel.zero_stage {layout.zero_stage} in this release",
            cure="training.precision=bf16, or parallel.zero_stage=1",
        )
    if layout.zero_implementation == "fsdp2" and layout.grad_reduce_in_fp32:
        raise ConfigError(
            "parallel.grad_reduce_in_fp32",
            True,
            rule="is false with parallel.zero_implementation fsdp2, which adds gradients up in the weights' "
            f"precision ({precision})",
            cure="parallel.zero_implementation=megatron_fsdp, or parallel.grad_reduce_in_fp32=false",
        )


def interleaving_needs_whole_rounds(config: RunConfig, layout: ParallelLayout) -> None:
    """Core's interleaved schedule runs micro-batches in rounds of one per stage."""
    if layout.vpp == 1:
        return
    least = config.training.micro_batch_size * layout.dp
    micro_batches = config.training.global_batch_size // least
    if micro_batches % layout.pp:
        rounds = -(-micro_batches // layout.pp) * layout.pp
        raise ConfigError(
            "training.global_batch_size",
            config.training.global_batch_size,
            rule=f"makes the micro-batches of a replica ({micro_batches}) a multiple of "
            f"parallel.pipeline_model_parallel_size {layout.pp} under an interleaved pipeline",
            cure=f"training.global_batch_size={rounds * least}",
        )


def recomputed_layers_divide_each_chunk(config: RunConfig, layout: ParallelLayout) -> None:
    """Core cuts a stage's chunk into pieces of that many layers and runs past its end where they do not come out."""
    training = config.training
    if training.recompute_granularity != "full":
        return
    sizes = {len(chunk) for stage in layout.stage_layers(config.model.num_layers) for chunk in stage}
    if any(size % training.recompute_num_layers for size in sizes):
        works = max(size for size in range(1, min(sizes) + 1) if all(chunk % size == 0 for chunk in sizes))
        raise ConfigError(
            "training.recompute_num_layers",
            training.recompute_num_layers,
            rule=f"divides the layers of every stage's chunk, which are {', '.join(map(str, sorted(sizes)))}",
            cure=f"training.recompute_num_layers={works}",
        )


def evaluation_has_data(config: RunConfig) -> None:
    """An evaluation reads documents that were held out."""
    data = config.data
    if config.evaluation.interval is not None and not data.validation_sources and data.validation_fraction == 0:
        raise ConfigError(
            "evaluation.interval",
            config.evaluation.interval,
            rule="needs documents to evaluate on, and data.validation_sources is empty and data.validation_fraction 0",
            cure="data.validation_fraction=0.02, or evaluation.interval=null",
        )


def fp8_recipe_has_kernels(config: RunConfig) -> None:
    """torch's scaled products know one recipe; the others are Transformer Engine's."""
    model, recipe = config.model, config.training.fp8.recipe
    if recipe != "current" and (model.kernel_overrides.linear or model.kernels) == "torch":
        raise ConfigError(
            "training.fp8.recipe",
            recipe,
            rule="is computed by Transformer Engine, and the model's linear layers are torch's (model.kernels)",
            cure="training.fp8.recipe=current, or model.kernels=transformer_engine",
        )


def fp8_fits(config: RunConfig, layout: ParallelLayout) -> None:
    """Sizes and layers that FP8 can have."""
    training = config.training
    fp8_sizes_are_multiples(
        config.model,
        layout,
        seq_length=training.seq_length,
        micro_batch_size=training.micro_batch_size,
        multiple_of=MULTIPLE[training.fp8.recipe],
    )
    check_bf16_layers(training.fp8, config.model.num_layers, layout.pp)


def fp8_has_hardware(config: RunConfig) -> None:
    """FP8 needs a GPU that has the recipe, and its library. On a CPU torch tries it out, where that is asked for."""
    if config.training.precision != "fp8":
        return
    here, recipe = available_kernels(), config.training.fp8.recipe
    if not here.on_gpu and config.model.kernels != "torch":
        raise ConfigError(
            "training.precision",
            "fp8",
            rule="needs an NVIDIA GPU, and this machine has none; on a CPU torch's slow stand-in runs by name alone",
            cure="training.precision=bf16, or model.kernels=torch to try it out",
        )
    if recipe != "current" and not choose_kernels(config.model, here).uses_transformer_engine:
        raise ConfigError(
            "training.fp8.recipe",
            recipe,
            rule="is computed by Transformer Engine, which is not installed",
            cure="training.fp8.recipe=current, or pip install 'transformer_engine[pytorch]'",
        )
    capability = compute_capability() if here.on_gpu else None
    if capability is not None:
        check_chip(recipe, capability)


def context_parallel_has_kernels(config: RunConfig) -> None:
    """Sequences are cut by Transformer Engine on GPUs and by our ring on CPU; torch on a GPU has neither."""
    here = available_kernels()
    if config.parallel.context_parallel_size == 1 or not here.on_gpu:
        return
    if choose_kernels(config.model, here).attention == "torch":
        raise ConfigError(
            "parallel.context_parallel_size",
            config.parallel.context_parallel_size,
            rule="needs attention by Transformer Engine on a GPU, and the package installed",
            cure="parallel.context_parallel_size=1, or pip install 'orthant[gpu]' with model.kernels=auto",
        )
    if config.training.precision == "fp32":
        raise ConfigError(
            "training.precision",
            "fp32",
            rule="is too wide for Transformer Engine's attention over rows that context-parallel ranks share",
            cure="training.precision=bf16, or parallel.context_parallel_size=1",
        )


def kernels_are_here(config: RunConfig) -> None:
    """Libraries that are asked for by name are installed, have the GPU that they need and fit sharded weights."""
    chosen = choose_kernels(config.model, available_kernels())
    if config.parallel.zero_stage >= 2:
        where_sharded(chosen, config.model)


def overlap_has_hardware(config: RunConfig) -> None:
    """User buffers are Transformer Engine's, and CUDA graphs a GPU's."""
    parallel, here = config.parallel, available_kernels()
    if parallel.tp_comm_overlap and not choose_kernels(config.model, here).uses_transformer_engine:
        raise ConfigError(
            "parallel.tp_comm_overlap",
            True,
            rule="is done by Transformer Engine's linear layers on a GPU, and the model's are torch's here",
            cure="parallel.tp_comm_overlap=false, or parallel.overlap=data_parallel",
        )
    if parallel.cuda_graphs and not here.on_gpu:
        raise ConfigError(
            "parallel.cuda_graphs",
            True,
            rule="needs an NVIDIA GPU, and this machine has none",
            cure="parallel.cuda_graphs=false, or parallel.overlap=data_parallel",
        )


def available_kernels() -> Available:
    """What this machine could compute with."""
    return Available.here(on_gpu=gpu_present())


def loggers_are_installed(config: RunConfig) -> None:
    """A logger that is switched on can be imported."""
    for field, switched_on, package in (
        ("logging.wandb", config.logging.wandb, "wandb"),
        ("logging.tensorboard", config.logging.tensorboard, "tensorboard"),
    ):
        if switched_on and not package_present(package):
            raise ConfigError(
                field,
                True,
                rule=f"needs the package {package}, which is not installed",
                cure=f"{field}=false, or pip install {package}",
            )


def vocabulary_holds_the_tokenizer(config: RunConfig) -> None:
    """Every token that the tokenizer can give has a row in the embedding."""
    rows, tokenizer = config.model.vocab_size, config.data.tokenizer
    if rows is None:
        return
    entries = tokenizer.vocab_size
    if tokenizer.path is not None:
        from data.tokenizer import load_tokenizer  # brings numpy, which no other check needs

        entries = load_tokenizer(tokenizer.path, tokenizer.eod_token).vocab_size
    if entries is not None and entries > rows:
        raise ConfigError(
            "model.vocab_size",
            rows,
            rule=f"is at least the tokenizer's {entries} entries",
            cure=f"model.vocab_size={entries}, or model.vocab_size=null (the tokenizer's)",
        )
