"""Commands read by the program's own parser and not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from launch.alignment_config import load_alignment_config
from launch.checks import check_request
from launch.cli import app
from launch.config import load_config


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """`["train", "a.yaml"]` as ("train", its parameters).

    Raises an error of the command line for a word that the program does not take.
    """
    command: Any = typer.main.get_command(app)
    context = command.make_context("orthant", list(words))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context.command_path.removeprefix("orthant "), context.params


def check_settings(command: str, params: dict[str, Any]) -> None:
    """Read the configuration that a command names, with its overrides, as the command would before it starts.

    Raises:
        RequestError: it would be refused.
    """
    config, overrides = Path(params["config"]), list(params["overrides"] or ())
    if command in ("sft", "reward", "dpo", "ppo"):
        load_alignment_config(command, config, overrides)  # type: ignore[arg-type]
        return
    loaded = load_config(config, overrides)
    if command in ("train", "verify"):
        check_request(loaded, world_size=None)
