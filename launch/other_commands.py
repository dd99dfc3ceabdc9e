"""A configuration that is right, and another command's: told as one mistake in place of all that it makes.

Read after a refusal only.
"""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import BaseModel, ValidationError

from foundation.errors import ConfigError, RequestError
from launch.yaml_file import YamlFile

Command = Literal["train", "sft", "reward", "dpo", "ppo"]


def refuse_another_commands(file: YamlFile, wanted: Command) -> None:
    """Say whose configuration `file` is, where it is not one of `wanted`.

    Raises:
        RequestError: it is a whole configuration of other commands.
    """
    from launch.alignment_config import ROOTS
    from launch.config import RunConfig

    roots: list[tuple[Command, type[BaseModel]]] = [("train", RunConfig), *ROOTS.items()]
    fitting = [command for command, root in roots if _fits(file, root)]
    if wanted in fitting or not fitting:
        return
    path, first = shlex.quote(str(file.path)), fitting[0]
    if len(fitting) > 1:
        cure = "whichever of these it was written for (as a job: orthant submit with --task)"
    elif first == "train":
        cure = f"orthant train {path}"
    else:
        cure = f"orthant {first} {path} (as a job: orthant submit {path} --task {first})"
    if wanted == "train":
        cure += "; to plan or rehearse, the configuration of the run that init.checkpoint comes from"
    raise RequestError(
        f"{file.path} is a configuration of {' or '.join(f'`orthant {name}`' for name in fitting)}",
        rule=_takes(wanted),
        cure=cure,
    )


def _takes(command: Command) -> str:
    if command == "train":
        return (
            "train, verify, plan, rehearse and scale take a training run's, which has model and data.tokenizer; "
            "post-training has both from init.checkpoint"
        )
    return f"`orthant {command}` begins with init.checkpoint: configs/{command}/demo.yaml is one of its own"


def _fits(file: YamlFile, root: type[BaseModel]) -> bool:
    try:
        root.model_validate(file.values)
    except (ValidationError, ConfigError):
        return False
    return True
