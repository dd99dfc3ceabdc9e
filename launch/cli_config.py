"""The commands that look at configurations: filled in, as a schema, rehearsed, the architectures that they name."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli_group import CommandGroup
from launch.cli_options import AsJson, ConfigPath, Overrides, run_command

config_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    """Add these commands to `orthant`."""
    app.add_typer(config_app, name="config")
    app.command()(model)
    app.command()(rehearse)


@config_app.callback()
def config() -> None:
    """Show a configuration as understood, or the schema.

    \b
    Example:
      orthant config show configs/demo.yaml
    """


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print a configuration with everything filled in.

    Presets, defaults and overrides, as YAML; what it prints is a configuration again.

    \b
    Example:
      orthant config show configs/demo.yaml model.num_layers=8
    """
    run_command("launch.commands.config", "show", config, overrides or [], as_json=as_json)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configurations, for editors.

    \b
    Example:
      orthant config schema > orthant.schema.json
      (first line of a YAML file:  # yaml-language-server: $schema=orthant.schema.json)
    """
    run_command("launch.commands.config", "schema")


def model(
    seq_length: Annotated[int, typer.Option("--seq-length", min=1, help="Tokens in one sequence.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """List the architectures that model.preset takes.

    With their parameters and the FLOPs of training on one token.

    \b
    Example:
      orthant model --seq-length 8192
    """
    run_command("launch.commands.model", "list_presets", seq_length=seq_length, as_json=as_json)


def rehearse(
    config: ConfigPath,
    world_size: Annotated[int, typer.Option("--world-size", min=1, help="Ranks of the run.", show_default=False)],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Meet every assert of megatron-core's before the queue.

    Builds the real model of each pipeline stage at the real world size, without memory or peers: groups, optimizer
    shards, a micro-batch forward and backward, a checkpoint's description. Counts bytes beside the planner's.

    \b
    Example:
      orthant rehearse configs/presets/llama3_1_405b.yaml --world-size 16384
    """
    run_command("launch.commands.rehearse", "rehearse", config, overrides or [], world_size=world_size, as_json=as_json)
