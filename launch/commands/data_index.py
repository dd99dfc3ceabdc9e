"""`orthant data index`: everything of a run's data that can be made before the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import ConfigError
from launch.commands.data_shared import Json, told_failures
from launch.terminal import say, tell


def index(
    config_path: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="Settings laid over the file.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prepare the data of a run ahead of time: tokens, the order of every epoch, and the plan.

    A run does the same itself, on one process, before its ranks start; on a login node it costs no GPU time. Once for a
    file system: ranks map what lies there.

    \b
    Example:
      orthant data index configs/demo.yaml training.train_steps=1000
    """
    from data.data_plan import plan_data
    from data.prepare import prepare
    from launch.config import load_config
    from launch.run_folder import run_folder_is_writable

    config = load_config(config_path, overrides or [])
    training, folder = config.training, config.run.folder
    try:
        run_folder_is_writable(config)
    except ConfigError as error:
        raise config.origin.point(error) from None
    with told_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        prepared = prepare(config.data, folder / "data", training.seq_length, say)
        sizes = training.seq_length, training.global_batch_size, training.seed, training.train_steps
        plan = plan_data(prepared, config.data, *sizes, folder, say)
    if as_json:
        print(json.dumps({"folder": str(folder), **json.loads(plan.to_json())}))
    for source in plan.sources:
        tell(f"{source.prefix}: {source.samples_per_epoch:,} samples an epoch, {source.epochs:.3f} epochs planned")
    tell(f"{plan.samples:,} samples of {plan.seq_length} tokens planned in {folder / 'data_plan.json'}")
