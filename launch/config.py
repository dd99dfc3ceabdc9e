"""The whole configuration: one YAML file plus overrides, typed, with every mistake named where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from data.config import DataConfig
from foundation.errors import ConfigError
from foundation.section import Section, UserPath
from launch.checks import check_request
from launch.other_commands import refuse_another_commands
from launch.overrides import Override, lay_over, parse_override
from launch.translation import ConfigErrors, translate
from launch.yaml_file import Place, YamlFile, read_yaml
from model.config import ModelConfig
from parallel.config import ParallelConfig
from training.config import TrainingSections

__all__ = ["Origin", "RunConfig", "RunSection", "as_values", "as_yaml", "check_request", "config_from",
           "config_schema", "load_config"]  # fmt: skip

SECTION_ORDER = ("run", "init", "model", "parallel", "data")
"""Sections that stand first where a configuration is printed; the others follow as declared."""


class RunSection(Section):
    """The run itself."""

    folder: UserPath = Field(examples=["runs/first"])
    """Where metrics, checkpoints and logs go; made if absent. Relative to the working folder."""


class InitialWeightsSection(Section):
    """Weights that training begins with. Step, optimizer state and data order begin anew."""

    checkpoint: UserPath | None = Field(default=None, examples=["runs/demo"])
    """A checkpoint of ours, a run's folder, or a Hugging Face model's folder, which is converted into the run's folder
    first. `model` and `data.tokenizer` have to be its own. null: weights are drawn."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where settings were written. All origins are equal: where a configuration came from is no part of its value."""

    file: YamlFile | None = None
    overrides: tuple[Override, ...] = field(default=())

    def locate(self, place: Place) -> str | None:
        """The override or the line of the file that set `place`, or the nearest thing around it that was written."""
        for length in range(len(place), 0, -1):
            prefix = place[:length]
            for override in reversed(self.overrides):
                if override.keys == prefix or override.keys[:length] == prefix:
                    return f"override {override.text}"
            if self.file is not None and prefix in self.file.lines:
                return f"{self.file.path}:{self.file.lines[prefix]}"
        return None if self.file is None else str(self.file.path)

    def point(self, error: ConfigError) -> ConfigError:
        """`error` with the place where its field was written."""
        if isinstance(error, ConfigErrors) or error.where is not None:
            return error
        where = self.locate(tuple(error.field.split(".")))
        return ConfigError(error.field, error.value, error.rule or "", error.cure or "", where=where)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0


class RunConfig(TrainingSections):
    """Everything that a run is told."""

    run: RunSection
    """Where the run writes."""

    init: InitialWeightsSection = InitialWeightsSection()
    """What it begins with."""

    model: ModelConfig
    """The architecture."""

    parallel: ParallelConfig = ParallelConfig()
    """How it is spread over ranks."""

    data: DataConfig
    """What it learns from."""

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Where the settings were written."""
        return self._origin


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, lay `overrides` (`section.key=value`) over it, and validate.

    Raises:
        RequestError: the file or an override cannot be read, or the file is another command's.
        ConfigError: a setting is unknown, missing or wrong; where several are, the message names all.
    """
    file = read_yaml(Path(path))
    parsed = tuple(parse_override(text) for text in overrides)
    try:
        return config_from(lay_over(file.values, parsed), Origin(file, parsed))
    except ConfigError:
        refuse_another_commands(file, "train")
        raise


def config_from(values: dict[str, Any], origin: Origin | None = None) -> RunConfig:
    """A validated configuration from plain values, e.g. of a checkpoint's manifest.

    Raises:
        ConfigError: as `load_config`.
    """
    origin = Origin() if origin is None else origin
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise translate(error, RunConfig, values, origin.locate) from None
    except ConfigError as error:
        raise origin.point(error) from None
    config._origin = origin
    return config


def as_values(config: RunConfig) -> dict[str, Any]:
    """Plain values of every setting, ready for YAML or JSON; `config_from` reads them back to an equal value."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in (*SECTION_ORDER, *(name for name in values if name not in SECTION_ORDER))}


def as_yaml(config: RunConfig) -> str:
    """The configuration as a YAML file with every setting, defaults and presets filled in."""
    return yaml.safe_dump(as_values(config), sort_keys=False, width=120)


def config_schema() -> dict[str, Any]:
    """JSON schema of the configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    schema["title"] = "Orthant run configuration"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
