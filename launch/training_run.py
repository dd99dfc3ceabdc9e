"""A training run from its config: what is prepared once, and what every rank does."""

from __future__ import annotations

import json
import platform as host
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from checkpoint_tools.manifest import Manifest
from data.prepared import PreparedData
from foundation.errors import ConfigError
from foundation.files import write_text
from launch.beginning import begin_training, check_same_tokens, first_weights, keep_training, resumes
from launch.config import RunConfig, as_values, as_yaml, check_request, config_from
from launch.device_environment import check_environment, set_environment
from launch.kept_beginning import Beginning, kept_tokenizer
from launch.life import Life, comparison, join, living
from launch.meeting import JOB, nobody_ends
from launch.terminal import say, tell
from launch.world import World

if TYPE_CHECKING:
    from parallel.layout import ParallelLayout
    from training.config import TrainingSections
    from training.records import Watcher
    from training.state import TrainingState
    from training.trainer import Corpus, Trainer


def prepare_run(config: RunConfig, world_size: int | None) -> Path:
    """Check the request, prepare the data, write what ranks read. Returns the job's file.

    Raises:
        RequestError: the config can't run.
    """
    from data.data_plan import plan_data
    from data.enough import check_prepared
    from data.prepare import prepare

    check_request(config, world_size=world_size)
    begun = begin_training(config, may_convert=world_size is None)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    training = config.training
    try:
        prepared = prepare(config.data, folder / "data", training.seq_length, say)
        if config.evaluation.interval is not None:
            check_prepared(prepared, config.data, training.seq_length, "validation")
    except ConfigError as error:
        raise config.origin.point(error) from None
    if begun is not None:
        check_same_tokens(config, prepared, begun.manifest)
        if config.data.tokenizer.path == kept_tokenizer(folder):
            say(f"the tokenizer that data.tokenizer.path names is not there any more: {kept_tokenizer(folder)} is it")
        begun, prepared = keep_training(begun, prepared, folder)
    sizes = training.seq_length, training.global_batch_size, training.seed, training.train_steps
    plan_data(prepared, config.data, *sizes, folder, say)
    write_text(folder / "config.yaml", as_yaml(config))
    job = {
        "config": as_values(config),
        "prepared": json.loads(prepared.to_json()),
        "beginning": None if begun is None else begun.model_dump(mode="json"),
    }
    write_text(folder / JOB, json.dumps(job, indent=2) + "\n")
    return folder / JOB


def train_as_rank(job: Path, world: World, ready: Callable[[], None] = nobody_ends) -> None:
    """One rank's part of a run: join, build, train, leave; `ready` returns once every rank is about to join."""
    described = json.loads(job.read_text())
    config = config_from(described["config"])
    prepared = PreparedData.from_json(json.dumps(described["prepared"]))
    begun = described["beginning"] and Beginning.model_validate(described["beginning"])
    layout = check_request(config, world_size=world.world_size)
    check_environment(layout)
    set_environment(layout)  # before the platform looks at the GPU
    from parallel.platform import install

    install()
    from parallel.groups import ProcessGroups

    ready()
    join(world, config.run.folder)
    import torch.distributed as dist

    with living(config, config.run.folder, world) as life:
        with ProcessGroups(layout, config.training.seed):
            held_out = _trainer(config, prepared, begun, layout, world, life).train()
            if world.rank == 0 and held_out is not None:
                _say_result(held_out, prepared)
        dist.barrier()
    dist.destroy_process_group()


def _trainer(
    config: RunConfig, prepared: PreparedData, begun: Beginning | None, layout: ParallelLayout, world: World, life: Life
) -> Trainer:
    from data.batches import SampleBatches
    from data.samples import open_samples
    from training.objective import NextToken
    from training.state import build_state
    from training.trainer import Corpus

    training = config.training
    vocab_size = config.model.vocab_size or prepared.vocab_size
    if begun is None:
        state = build_state(config.model, layout, training, config.optimizer, vocab_size)
    else:
        vocab_size = begun.manifest.vocab_size
        prepare = first_weights(begun, resumed=resumes(config.run.folder))
        state = build_state(config.model, layout, training, config.optimizer, vocab_size, prepare)

    def batches(split: Literal["train", "validation"]) -> SampleBatches:
        return SampleBatches(open_samples(prepared, config.data, training.seq_length, training.seed, split))

    corpus = Corpus(
        train=batches("train"),
        validation=batches("validation") if config.evaluation.interval is not None else None,
        objective=NextToken(packed=config.data.document_mask),
    )
    manifest = _manifest(config, prepared, begun, layout, vocab_size)
    return assemble_trainer(config, config.run.folder, as_values(config), state, corpus, manifest, world, life)


def assemble_trainer(
    sections: TrainingSections,
    folder: Path,
    values: dict[str, Any],
    state: TrainingState,
    corpus: Corpus,
    manifest: Manifest,
    world: World,
    life: Life,
) -> Trainer:
    """The trainer of a run with its checkpoints, records, signals and what watches it.

    Args:
        folder: of the run.
        values: of the configuration, for loggers.
    """
    from launch.progress import Progress
    from training.checkpoint.folder import CheckpointFolder
    from training.checkpoint.store import CheckpointStore
    from training.profiling.observers import observers_of
    from training.stopping import StopRequest
    from training.survival.events import RunEvents
    from training.throughput import Throughput
    from training.trainer import Trainer
    from training.watchers import file_watchers

    progress = Progress(sections.logging.log_interval) if world.rank == 0 else None
    if progress is not None:
        say(f"kernels: {state.kernels.describe()}")
    store = CheckpointStore(
        CheckpointFolder(folder / "checkpoints"), sections.checkpoint, progress.event if progress else (lambda _: None)
    )
    stop = StopRequest()
    stop.listen()
    watchers: list[Watcher] = []
    if progress is not None:
        events = RunEvents(folder, life.number, life.pulse)
        watchers = [*file_watchers(folder, sections.logging, values), events, progress]
    layout, training = state.layout, sections.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * layout.dp)
    return Trainer(
        state=state,
        sections=sections,
        corpus=corpus,
        store=store,
        manifest=manifest,
        throughput=Throughput.of(manifest.model, state.vocab_size, sections.training.seq_length, world.world_size),
        stop=stop,
        watchers=watchers,
        pulse=life.pulse,
        compare=comparison(
            sections, life, layout.coordinates(world.rank).pp, progress.event if progress else (lambda _: None)
        ),
        observers=observers_of(sections.profile, folder, state.core, layout, world.rank, life.node, micro_batches),
    )


def _manifest(
    config: RunConfig, prepared: PreparedData, begun: Beginning | None, layout: ParallelLayout, vocab_size: int
) -> Manifest:
    return Manifest(
        step=0,
        tokens=0,
        model=config.model,
        precision=config.training.precision,
        vocab_size=vocab_size,
        padded_vocab_size=config.model.padded_vocab_size(vocab_size, layout.tp),
        tokenizer_path=prepared.tokenizer_path,
        tokenizer_hash=prepared.tokenizer_hash,
        eod_id=prepared.eod_id,
        data_fingerprint=data_fingerprint(prepared, config),
        saved_at=surroundings(layout) | ({} if begun is None else {"began_with": str(begun.checkpoint)}),
    )


def surroundings(layout: ParallelLayout) -> dict[str, str]:
    """Where a checkpoint comes from, for people."""
    return {
        "layout": layout.describe(),
        "torch": version("torch"),
        "megatron_core": version("megatron-core"),
        "orthant": version("orthant"),
        "python": host.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_fingerprint(prepared: PreparedData, config: RunConfig) -> str:
    """Of everything that decides which tokens a step reads: token files, shares, sequence, batch, seed, rules."""
    from data.fingerprints import combined

    training, data = config.training, config.data
    order = (training.seq_length, training.global_batch_size, training.seed)
    rules = (data.document_mask, data.reset_position_ids, data.eod_mask_loss)
    return combined([*prepared.train_contents, repr(prepared.train_weights), repr(order), repr(rules)])


def _say_result(held_out: float, prepared: PreparedData) -> None:
    entropy = prepared.unigram_entropy
    tell(
        f"held-out loss {held_out:.4f} nats/token; unigram entropy of the training tokens {entropy:.4f}: "
        f"{entropy - held_out:.4f} below it"
        if held_out < entropy
        else f"held-out loss {held_out:.4f} nats/token is above the unigram entropy {entropy:.4f}: nothing learned yet"
    )
