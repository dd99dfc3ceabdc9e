"""What the commands of `orthant` have in common. Imports nothing heavy, so that help answers at once."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value ...]", help="Settings laid over the file.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def run_command(module: str, function: str, *arguments: Any, **options: Any) -> None:
    """Import a command and call it; an exit code that it returns becomes the process's."""
    code = getattr(import_module(module), function)(*arguments, **options)
    if code:
        raise typer.Exit(int(code))
