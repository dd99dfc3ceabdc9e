"""Configurations of post-training runs: those of training, with a checkpoint in place of an architecture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import PrivateAttr, ValidationError, model_validator

from alignment.config import (
    DpoSection,
    ExamplesConfig,
    InitSection,
    InstructionDataConfig,
    PreferenceDataConfig,
    RewardSection,
)
from alignment.ppo.config import (
    CriticSection,
    GenerationSection,
    PlacementSection,
    PpoSection,
    PromptDataConfig,
    ReferenceSection,
    RewardSourceSection,
)
from checkpoint_tools.manifest import Manifest
from foundation.errors import ConfigError
from launch.config import Origin, RunConfig, RunSection
from launch.other_commands import refuse_another_commands
from launch.overrides import lay_over, parse_override
from launch.translation import translate
from launch.yaml_file import read_yaml
from parallel.config import ParallelConfig
from training.config import TrainingSections

Kind = Literal["sft", "reward", "dpo", "ppo"]


class AlignmentConfig(TrainingSections):
    """What every post-training run is told."""

    run: RunSection
    """Where the run writes."""

    init: InitSection
    """What it begins with."""

    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over ranks."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def examples(self) -> ExamplesConfig:
        """The `data` section."""
        data: ExamplesConfig = getattr(self, "data")  # noqa: B009 - each kind of run declares its own
        return data

    @property
    def origin(self) -> Origin:
        """Where the settings were written."""
        return self._origin


class SftConfig(AlignmentConfig):
    """Supervised fine-tuning."""

    data: InstructionDataConfig
    """What it learns from."""


class RewardConfig(AlignmentConfig):
    """A reward model."""

    data: PreferenceDataConfig
    """What it learns from."""

    reward: RewardSection = RewardSection()
    """The reward model."""


class DpoConfig(AlignmentConfig):
    """Direct preference optimisation."""

    data: PreferenceDataConfig
    """What it learns from."""

    dpo: DpoSection = DpoSection()
    """The objective."""


class PpoConfig(AlignmentConfig):
    """Proximal policy optimisation. `parallel` is the actor's layout, `optimizer` and `schedule` are the actor's."""

    data: PromptDataConfig
    """What is asked."""

    ppo: PpoSection
    """The algorithm."""

    reward: RewardSourceSection
    """What scores answers."""

    critic: CriticSection = CriticSection()
    """The value model."""

    reference: ReferenceSection = ReferenceSection()
    """What the policy is held to."""

    generation: GenerationSection = GenerationSection()
    """Where answers are sampled."""

    placement: PlacementSection = PlacementSection()
    """Which ranks do what."""

    @model_validator(mode="after")
    def _stations_have_the_algorithms_roles(self) -> Self:
        self.placement.of(self.ppo.roles)
        return self


ROOTS: dict[Kind, type[AlignmentConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
}


def load_alignment_config(kind: Kind, path: Path, overrides: Sequence[str]) -> AlignmentConfig:
    """Read, lay overrides over, validate; see `launch.config.load_config`."""
    file = read_yaml(path)
    parsed = tuple(parse_override(text) for text in overrides)
    try:
        return alignment_config_from(kind, lay_over(file.values, parsed), Origin(file, parsed))
    except ConfigError:
        refuse_another_commands(file, kind)
        raise


def alignment_config_from(kind: Kind, values: dict[str, Any], origin: Origin | None = None) -> AlignmentConfig:
    """A validated configuration from plain values.

    Raises:
        ConfigError: a setting is unknown, missing or wrong.
    """
    origin = Origin() if origin is None else origin
    try:
        config = ROOTS[kind].model_validate(values)
    except ValidationError as error:
        raise translate(error, ROOTS[kind], values, origin.locate) from None
    except ConfigError as error:
        raise origin.point(error) from None
    config._origin = origin
    return config


def as_yaml(config: AlignmentConfig) -> str:
    """The configuration with every setting filled in."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def as_training(config: AlignmentConfig, manifest: Manifest, tokenizer: Path) -> RunConfig:
    """The training run that this one amounts to, so that every check of those is one of these.

    Args:
        manifest: of the checkpoint that it begins with.
        tokenizer: the folder that holds its tokenizer.
    """
    shared = {name: getattr(config, name) for name in TrainingSections.model_fields}
    data = {
        "sources": config.examples.sources,
        "validation_sources": config.examples.validation_sources,
        "validation_fraction": config.examples.validation_fraction,
        "tokenizer": {"path": tokenizer},
        "document_mask": isinstance(config, SftConfig),
    }
    model = manifest.model.model_copy(update={"vocab_size": manifest.vocab_size})
    as_run = RunConfig.model_validate(
        {**shared, "run": config.run, "parallel": config.parallel, "model": model, "data": data}
    )
    as_run._origin = config.origin
    return as_run
