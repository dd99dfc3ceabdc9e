"""Rules of a PPO run across its sections, kept before any process starts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignment.ppo.config import CriticSection, PpoSection, Role
from alignment.ppo.kl import LARGEST_ERROR
from alignment.ppo.placement import Placement
from checkpoint_tools.manifest import Manifest
from foundation.errors import ConfigError
from launch.alignment_config import PpoConfig
from launch.alignment_run import check_beginning, refuse_one_shape
from launch.kept_beginning import Beginning
from model.config import ModelConfig
from model.fits_layout import check_model_fits_layout
from parallel.config import ParallelConfig
from parallel.layout import ParallelLayout
from training.profiling.config import ProfileConfig


def check_ppo(
    config: PpoConfig, checkpoint: Path, models: dict[Role, ModelConfig], world_size: int | None
) -> Placement:
    """Which ranks do what.

    Args:
        models: of the roles that are models.
        world_size: ranks that run; None for a run that starts its own.

    Raises:
        RequestError: the config can't run.
    """
    placement = resolved(config, world_size)
    check_beginning(config, Beginning.of(config.init.checkpoint, checkpoint), placement.ranks[0])
    for role in placement.layouts:
        if role in models:
            with _told_of(role):
                check_model_fits_layout(models[role], placement.layouts[role])
        _refuse_axes(role, placement.layouts[role])
        refuse_one_shape("parallel" if role == "actor" else f"{role}.parallel", placement.layouts[role])
    for rule in RULES:
        rule(config, placement)
    return placement


def resolved(config: PpoConfig, world_size: int | None) -> Placement:
    """Stations with their ranks, and the layout of every role over the ranks of its station."""
    stations, ranks = config.placement.of(config.ppo.roles), config.placement.ranks
    if ranks is None:
        own = config.parallel.model_copy(update={"data_parallel_size": None}) if world_size else config.parallel
        ranks = (ParallelLayout.from_config(own, world_size).world_size,)
    if world_size is not None and sum(ranks) != world_size:
        raise ConfigError(
            "placement.ranks",
            list(ranks),
            rule=f"adds up to the world: {sum(ranks)} of {world_size} ranks that run",
            cure=f"start {sum(ranks)} ranks",
        )
    given: dict[Role, ParallelConfig | None] = {
        "actor": config.parallel,
        "generation": config.generation.parallel,
        "critic": config.critic.parallel,
        "reference": config.reference.parallel,
        "reward": config.reward.parallel,
    }
    layouts: dict[Role, ParallelLayout] = {}
    for role in config.ppo.roles:
        size = next(size for station, size in zip(stations, ranks, strict=True) if role in station)
        layouts[role] = _layout(role, given[role] or config.parallel, size)
    return Placement(stations, ranks, layouts)


def _layout(role: Role, parallel: ParallelConfig, ranks: int) -> ParallelLayout:
    one = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if ranks % one or parallel.data_parallel_size not in (None, ranks // one):
        section = "parallel" if role == "actor" else f"{role}.parallel"
        raise ConfigError(
            f"{section}.data_parallel_size",
            parallel.data_parallel_size,
            rule=f"makes the layout fill the {ranks} ranks of the station of {role}; one replica takes {one}",
            cure=f"{section}.tensor_model_parallel_size=1, {section}.pipeline_model_parallel_size=1 and "
            f"{section}.data_parallel_size={ranks}",
        )
    with _told_of(role):
        return ParallelLayout.from_config(parallel, ranks)


@contextmanager
def _told_of(role: Role) -> Iterator[None]:
    """Inside, what is refused of `parallel` is told of the section that holds `role`'s layout."""
    try:
        yield
    except ConfigError as error:
        if role == "actor":
            raise
        rule, cure = (re.sub(r"\bparallel\.", f"{role}.parallel.", text or "") for text in (error.rule, error.cure))
        field = re.sub(r"^parallel\.", f"{role}.parallel.", error.field)
        raise ConfigError(field, error.value, rule=rule, cure=cure, where=error.where) from None


def _refuse_axes(role: Role, layout: ParallelLayout) -> None:
    section = "parallel" if role == "actor" else f"{role}.parallel"
    for field, value, asked in (
        ("context_parallel_size", layout.cp, layout.cp > 1),
        ("virtual_pipeline_model_parallel_size", layout.vpp, layout.vpp > 1),
        ("expert_model_parallel_size", layout.ep, layout.ep > 1),
        ("zero_stage", layout.zero_stage, layout.fully_sharded),
    ):
        if asked:
            raise ConfigError(
                f"{section}.{field}",
                value,
                rule="does not go with PPO, whose roles run over tensor x pipeline x data ranks with whole weights",
                cure=f"{section}.{field}=1",
            )


def _answers_stay_together(config: PpoConfig, placement: Placement) -> None:
    batch, answers = config.training.global_batch_size, config.ppo.answers_per_prompt
    if batch % answers:
        update = config.ppo.mini_batches * config.training.micro_batch_size
        unit = math.lcm(answers, *(update * layout.dp for layout in placement.layouts.values()))
        raise ConfigError(
            "ppo.answers_per_prompt",
            answers,
            rule=f"divides training.global_batch_size {batch}: all answers to a prompt are of one iteration",
            cure=f"training.global_batch_size={-(-batch // unit) * unit}",
        )


def _no_critic_is_told(config: PpoConfig, placement: Placement) -> None:
    if "critic" not in placement.layouts and config.critic != CriticSection():
        raise ConfigError(
            "critic",
            config.critic.model_dump(mode="json", exclude_defaults=True),
            rule=f"is for an algorithm with a critic, and ppo.algorithm {config.ppo.algorithm} has none",
            cure="no section `critic`",
        )


def _rows_come_out_even(config: PpoConfig, placement: Placement) -> None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    learners = {role: layout for role, layout in placement.layouts.items() if role in ("actor", "critic")}
    replicas = max(layout.dp for layout in learners.values())
    for role, layout in learners.items():
        together = config.ppo.mini_batches * micro * layout.dp
        if batch % together:
            raise ConfigError(
                "training.global_batch_size",
                batch,
                rule=f"is a multiple of ppo.mini_batches x training.micro_batch_size x replicas of the {role} = "
                f"{together}",
                cure=f"training.global_batch_size={-(-batch // together) * together}",
            )
    if replicas > 1 and config.ppo.group_size > batch:
        raise ConfigError(
            "ppo.group_size",
            config.ppo.group_size,
            rule=f"is at most training.global_batch_size {batch}",
            cure=f"ppo.group_size={batch}",
        )


def _coefficient_stays_positive(config: PpoConfig, _placement: Placement) -> None:
    """A batch multiplies it by 1 - LARGEST_ERROR x batch / horizon at least; below 0 it would reward the distance."""
    batch, horizon = config.training.global_batch_size, config.ppo.kl_horizon
    if config.ppo.kl_target is not None and LARGEST_ERROR * batch >= horizon:
        raise ConfigError(
            "ppo.kl_horizon",
            horizon,
            rule=f"is above {LARGEST_ERROR:g} x training.global_batch_size {batch}: a shorter one lets a single batch "
            "take ppo.kl_coefficient to 0 or below",
            cure=f"ppo.kl_horizon={max(PpoSection.model_fields['kl_horizon'].default, batch)}",
        )


def _prompts_have_room(config: PpoConfig, _placement: Placement) -> None:
    if config.ppo.max_new_tokens >= config.training.seq_length:
        raise ConfigError(
            "ppo.max_new_tokens",
            config.ppo.max_new_tokens,
            rule=f"leaves room for a prompt in training.seq_length {config.training.seq_length}",
            cure=f"ppo.max_new_tokens={max(1, config.training.seq_length // 2)}",
        )


def _critic_is_not_in_the_way(config: PpoConfig, placement: Placement) -> None:
    if "critic" not in placement.layouts:
        return
    generation, critic = placement.station_of("generation"), placement.station_of("critic")
    if config.ppo.staleness and generation == critic != placement.station_of("actor"):
        raise ConfigError(
            "placement.stations",
            [list(station) for station in placement.stations],
            rule="has the critic apart from generation, or both with the actor, at ppo.staleness 1: it would learn "
            "where the next answers are to be sampled",
            cure="placement.stations=[[actor, critic], [generation, reference, reward]]",
        )


def _checkpoints_can_meet(config: PpoConfig, _placement: Placement) -> None:
    if config.checkpoint.keep_last < 2:
        raise ConfigError(
            "checkpoint.keep_last",
            config.checkpoint.keep_last,
            rule="is 2 or more: a crash between two stations' checkpoints leaves the one before",
            cure="checkpoint.keep_last=2",
        )
    if config.checkpoint.asynchronous:
        raise ConfigError(
            "checkpoint.asynchronous",
            True,
            rule="is for training runs: here two models' checkpoints have to be of one iteration",
            cure="checkpoint.asynchronous=false",
        )


def _no_more(config: PpoConfig, _placement: Placement) -> None:
    if config.evaluation.interval is not None:
        raise ConfigError(
            "evaluation.interval",
            config.evaluation.interval,
            rule="is for held-out losses; PPO is judged by the rewards in metrics.jsonl",
            cure="evaluation.interval=null",
        )
    if config.profile != ProfileConfig():
        raise ConfigError(
            "profile",
            config.profile.model_dump(exclude_defaults=True),
            rule="is for the steps of a training run; PPO writes when each role was at work by itself",
            cure="no section `profile`",
        )
    for field, action, usual in (
        ("guards.on_nan", config.guards.on_nan, "stop"),
        ("guards.on_spike", config.guards.on_spike, "warn"),
    ):
        if action != usual:
            raise ConfigError(
                field,
                action,
                rule="stays as it is under PPO: a value that is not finite ends the run, and rewards have no spikes",
                cure=f"{field}={usual}",
            )


RULES = (
    _answers_stay_together,
    _rows_come_out_even,
    _coefficient_stays_positive,
    _prompts_have_room,
    _critic_is_not_in_the_way,
    _no_critic_is_told,
    _checkpoints_can_meet,
    _no_more,
)
"""That need nothing but the configuration and its placement."""


def check_same_words(field: str, value: str, mine: Manifest, theirs: Manifest) -> None:
    """Raise where the model of `mine`, which `field` = `value` names, reads tokens in another way than the actor's.

    Raises:
        ConfigError: vocabularies or tokenizers differ.
    """
    if (mine.vocab_size, mine.tokenizer_hash) != (theirs.vocab_size, theirs.tokenizer_hash):
        raise ConfigError(
            field,
            value,
            rule=f"has the tokenizer of init.checkpoint: {theirs.vocab_size} tokens and sha256 "
            f"{theirs.tokenizer_hash[:12]}, and {mine.vocab_size} and {mine.tokenizer_hash[:12]} there",
            cure="a model that began with the same checkpoint",
        )
