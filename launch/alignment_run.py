"""Post-training runs: what is prepared once, and what every rank does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alignment.config import DpoSection, InstructionDataConfig, PreferenceDataConfig
from checkpoint_tools.manifest import Manifest, read_manifest
from foundation.errors import ConfigError, RequestError
from foundation.files import write_text
from launch.alignment_config import (
    AlignmentConfig,
    DpoConfig,
    Kind,
    RewardConfig,
    alignment_config_from,
    as_training,
    as_yaml,
)
from launch.beginning import beginning_of, first_weights, resumes
from launch.checkpoints import find_checkpoint
from launch.checks import check_request, check_sizes
from launch.config import RunConfig
from launch.device_environment import check_environment, set_environment
from launch.kept_beginning import Beginning, keep
from launch.life import Life, join, living
from launch.meeting import JOB, nobody_ends
from launch.terminal import say, tell
from launch.training_run import assemble_trainer, surroundings
from launch.world import World
from parallel.layout import ParallelLayout
from training.checkpoint.folder import CheckpointFolder

if TYPE_CHECKING:
    from alignment.examples import Split
    from data.preferences import PreferencePair
    from data.tokenizer import Tokenizer
    from training.state import TrainingState
    from training.trainer import Corpus

REFERENCE = "reference.npz"
"""In the run's folder: the log-probabilities of DPO's reference."""


class Check(Protocol):
    """Checks of a run across its sections; returns its layout."""

    def __call__(self, config: RunConfig, *, world_size: int | None) -> ParallelLayout: ...


def check_alignment(config: AlignmentConfig, world_size: int | None) -> ParallelLayout:
    """Check the request; a Hugging Face checkpoint is converted where no ranks run yet.

    Raises:
        RequestError: the config can't run.
    """
    return check_beginning(config, _begun(config, may_convert=world_size is None), world_size)


def prepare_alignment(kind: Kind, config: AlignmentConfig, world_size: int | None) -> tuple[Path, ParallelLayout]:
    """Check the request, convert a Hugging Face checkpoint, write what ranks read.

    Raises:
        RequestError: the config can't run.
    """
    begun = _begun(config, may_convert=world_size is None)
    layout = check_beginning(config, begun, world_size)
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    assert begun.tokenizer is not None, "it was checked"
    begun = keep(begun, folder, begun.tokenizer)
    write_text(folder / "config.yaml", as_yaml(config))
    values = config.model_dump(mode="json")
    job = {"kind": kind, "config": values, "beginning": begun.model_dump(mode="json")}
    write_text(folder / JOB, json.dumps(job, indent=2) + "\n")
    return folder / JOB, layout


def _begun(config: AlignmentConfig, *, may_convert: bool) -> Beginning:
    return beginning_of(config.init.checkpoint, config.run.folder, may_convert=may_convert)


def sized_run(config: AlignmentConfig, world_size: int) -> tuple[RunConfig, ParallelLayout]:
    """The training run that `config` amounts to and its layout, by the checks that hold on every machine.

    Raises:
        RequestError: the config can't run at this size.
    """
    begun = _begun(config, may_convert=False)
    layout = check_beginning(config, begun, world_size, check_sizes)
    assert begun.tokenizer is not None, "it was checked"
    return as_training(config, begun.manifest, begun.tokenizer), layout


def check_beginning(
    config: AlignmentConfig, begun: Beginning, world_size: int | None, check: Check = check_request
) -> ParallelLayout:
    """The layout over `world_size` ranks, where what it begins with can be continued at it.

    Raises:
        RequestError: it can't.
    """
    if begun.tokenizer is None:
        raise ConfigError(
            "init.checkpoint",
            str(config.init.checkpoint),
            rule="brings its tokenizer, and this one was converted without one",
            cure="convert it with tokenizer.json or tokenizer.model beside the weights",
        )
    if begun.manifest.head != "tokens" and not isinstance(config, RewardConfig):
        raise ConfigError(
            "init.checkpoint",
            str(config.init.checkpoint),
            rule="is a model of tokens, and this is a reward model",
            cure="the checkpoint that the reward model began with",
        )
    _refuse_context_parallel(config)
    if isinstance(config, DpoConfig):
        _check_reference(config)
    layout = check(as_training(config, begun.manifest, begun.tokenizer), world_size=world_size)
    refuse_one_shape("parallel", layout)
    return layout


def _refuse_context_parallel(config: AlignmentConfig) -> None:
    size = config.parallel.context_parallel_size
    if size == 1:
        return
    for examples, rule in (
        (InstructionDataConfig, "is 1 for fine-tuning, where examples share a row without seeing each other"),
        (PreferenceDataConfig, "is 1 for preference pairs, whose rows are read at their last token"),
    ):
        if isinstance(config.examples, examples):
            cure = "parallel.context_parallel_size=1"
            raise config.origin.point(ConfigError("parallel.context_parallel_size", size, rule=rule, cure=cure))


def _check_reference(config: DpoConfig) -> None:
    """The reference is there, or the run has saved and keeps what it needs of it."""
    reference, folder = config.dpo.reference, config.run.folder
    if reference is None or reference.is_dir():
        return
    if (folder / REFERENCE).is_file() and CheckpointFolder(folder / "checkpoints").has_saved():
        return
    raise config.origin.point(
        ConfigError(
            "dpo.reference",
            str(reference),
            rule=f"is a folder with a checkpoint, until the run has saved and has its log-probabilities in {REFERENCE}",
            cure="dpo.reference=null, or the run.folder of a training that has saved",
        )
    )


def refuse_one_shape(section: str, layout: ParallelLayout) -> None:
    """Refuse what records batches of one shape: those of post-training differ in length.

    Raises:
        ConfigError: a field of `section` asks for it.
    """
    for name in ("cuda_graphs", "tp_comm_overlap"):
        if getattr(layout, name):
            raise ConfigError(
                f"{section}.{name}",
                True,
                rule="takes batches of one shape, and those of post-training differ in length",
                cure=f"{section}.{name}=false, or {section}.overlap=data_parallel",
            )


def align_as_rank(job_path: Path, world: World, ready: Callable[[], None] = nobody_ends) -> None:
    """One rank's part of a run: join, load, train, leave; `ready` returns once every rank is about to join."""
    job = json.loads(job_path.read_text())
    config = alignment_config_from(job["kind"], job["config"])
    begun = Beginning.model_validate(job["beginning"])
    layout = check_beginning(config, begun, world.world_size)
    check_environment(layout)
    set_environment(layout)  # before the platform looks at the GPU
    from parallel.platform import install

    install()
    import torch.distributed as dist

    from parallel.groups import ProcessGroups

    ready()
    join(world, config.run.folder)
    with living(config, config.run.folder, world) as life:
        with ProcessGroups(layout, config.training.seed):
            _run(config, begun, layout, world, life)
        dist.barrier()
    dist.destroy_process_group()


def _run(config: AlignmentConfig, beginning: Beginning, layout: ParallelLayout, world: World, life: Life) -> None:
    from data.tokenizer import load_tokenizer
    from training.state import build_state

    assert beginning.tokenizer is not None, "it was checked"
    begun, tokenizer = beginning.manifest, load_tokenizer(beginning.tokenizer)
    resumed = resumes(config.run.folder)
    told: Callable[[str], None] = say if world.rank == 0 else (lambda _: None)
    head = "score" if isinstance(config, RewardConfig) else "tokens"
    state = build_state(
        begun.model,
        layout,
        config.training,
        config.optimizer,
        begun.vocab_size,
        prepare=first_weights(beginning, resumed=resumed),
        head=head,  # type: ignore[arg-type]  # mypy takes the conditional for a str
    )
    corpus, fingerprint, template, pairs = _corpus(config, state, tokenizer, beginning, told, resumed=resumed)
    manifest = Manifest(
        step=0,
        tokens=0,
        model=begun.model,
        precision=config.training.precision,
        vocab_size=begun.vocab_size,
        padded_vocab_size=begun.model.padded_vocab_size(begun.vocab_size, layout.tp),
        tokenizer_path=str(tokenizer.path),
        tokenizer_hash=tokenizer.hash,
        eod_id=tokenizer.eod_id,
        data_fingerprint=fingerprint,
        head=head,
        chat_template=template or begun.chat_template,
        saved_at=surroundings(layout) | {"began_with": str(beginning.checkpoint)},
    )
    values = config.model_dump(mode="json")
    held_out = assemble_trainer(config, config.run.folder, values, state, corpus, manifest, world, life).train()
    if held_out is not None and world.rank == 0:
        tell(f"held-out loss {held_out:.4f}")
    if isinstance(config, RewardConfig):
        _store_normalisation(config, state, pairs, world, told)


def _corpus(
    config: AlignmentConfig,
    state: TrainingState,
    tokenizer: Tokenizer,
    beginning: Beginning,
    say: Callable[[str], None],
    *,
    resumed: bool,
) -> tuple[Corpus, str, str, list[PreferencePair]]:
    """What is learned, its fingerprint, the chat template, and the pairs where they are pairs."""
    from alignment.examples import instruction_split, preference_split
    from data.chat import turn_ends
    from data.packing import PackedExamples
    from training.objective import NextToken
    from training.trainer import Corpus

    length, seed, data = config.training.seq_length, config.training.seed, config.examples
    begun = beginning.manifest
    if isinstance(data, InstructionDataConfig):
        examples = instruction_split(data, tokenizer, length, seed, say, begun.chat_template)
        rows = PackedExamples(examples.train, length, seed, tokenizer.eod_id, packed=data.packing)
        if examples.template is not None and not turn_ends(examples.template, tokenizer):
            say("the chat template ends a turn with no special token of the tokenizer: generation will not stop there")
        say(f"{len(examples.train)} examples in {rows.rows_per_epoch} rows, {rows.packing.filled:.1%} filled")
        held_out = None
        if examples.validation and config.evaluation.interval is not None:
            held_out = PackedExamples(examples.validation, length, seed, tokenizer.eod_id, packed=data.packing)
        corpus = Corpus(rows, held_out, NextToken(packed=True))
        return corpus, examples.fingerprint, _source_of(examples.template), []
    assert isinstance(data, PreferenceDataConfig)
    pairs = preference_split(data, tokenizer, length, seed, say, begun.chat_template)
    say(f"{len(pairs.train)} pairs to learn from, {len(pairs.validation)} held out")
    return (
        _pair_corpus(config, state, tokenizer, pairs, say, beginning.checkpoint, resumed=resumed),
        pairs.fingerprint,
        _source_of(pairs.template),
        list(pairs.train),
    )


def _source_of(template: Any) -> str:
    return "" if template is None else str(template.source)


def _pair_corpus(
    config: AlignmentConfig,
    state: TrainingState,
    tokenizer: Tokenizer,
    pairs: Split[PreferencePair],
    say: Callable[[str], None],
    beginning: Path,
    *,
    resumed: bool,
) -> Corpus:
    from alignment.pairs import BradleyTerry, DirectPreference, PairsWithReference
    from alignment.reference import KeptReference, reference_of_pairs
    from data.preferences import PairBatches
    from training.trainer import Corpus

    length, seed = config.training.seq_length, config.training.seed
    evaluated = pairs.validation if config.evaluation.interval is not None else []
    splits = [list(split) for split in (pairs.train, evaluated)]
    batches = [PairBatches(split, length, seed, tokenizer.eod_id) if split else None for split in splits]
    assert batches[0] is not None, "a split has an example to learn from"
    if isinstance(config, RewardConfig):
        return Corpus(batches[0], batches[1], BradleyTerry())
    assert isinstance(config, DpoConfig)
    reference = reference_of_pairs(
        state,
        [pair for split in splits for pair in split],
        length,
        config.training.micro_batch_size,
        KeptReference(
            config.run.folder / REFERENCE,
            beginning=beginning,
            other=_other_reference(config.dpo, state),
            resumed=resumed,
            named=config.dpo.reference,
        ),
        say,
    )
    parts = (reference[: len(splits[0])], reference[len(splits[0]) :])
    referenced = [
        None if batch is None else PairsWithReference(batch, split, part)
        for batch, split, part in zip(batches, splits, parts, strict=True)
    ]
    assert referenced[0] is not None
    return Corpus(referenced[0], referenced[1], DirectPreference(config.dpo.beta, config.dpo.label_smoothing))


def _other_reference(section: DpoSection, state: TrainingState) -> Path | None:
    """The reference's checkpoint where it is not the run's own beginning; its bare name where it is gone."""
    if section.reference is None or not section.reference.is_dir():
        return section.reference
    checkpoint = find_checkpoint(section.reference)
    manifest = read_manifest(checkpoint)
    if manifest.head != "tokens" or manifest.vocab_size != state.vocab_size:
        raise RequestError(
            "the reference is another kind of model", where=str(checkpoint), rule="it has the policy's vocabulary"
        )
    return checkpoint


def _store_normalisation(
    config: RewardConfig,
    state: TrainingState,
    pairs: list[PreferencePair],
    world: World,
    say: Callable[[str], None],
) -> None:
    """Write mean and deviation of the model's scores into the newest checkpoint's manifest. Collective."""
    from alignment.reward_model import normalisation, some_of

    found = normalisation(
        state.wrapped,
        state.layout,
        some_of(pairs, config.reward.normalisation_pairs, config.training.seed),
        config.training.seq_length,
        config.training.micro_batch_size,
    )
    checkpoint = find_checkpoint(config.run.folder)
    if world.rank == 0:
        manifest = read_manifest(checkpoint).model_copy(update={"score": found})
        write_text(checkpoint / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
    say(f"scores over {found.answers} answers: mean {found.mean:.4f}, standard deviation {found.std:.4f}")
