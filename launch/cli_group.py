"""Groups of commands: imported when one of them is asked for, and every command takes --quiet."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from launch.terminal import QUIET

UsageError: Any = typer.BadParameter.__base__  # typer has no public name for it


def _be_quiet(wanted: bool) -> None:
    if wanted:
        os.environ[QUIET] = "1"


def _quiet_option() -> Any:
    """The option as typer makes it of a command's parameter."""
    probe = typer.Typer(add_completion=False)

    @probe.command()
    def command(
        quiet: Annotated[
            bool,
            typer.Option("--quiet", callback=_be_quiet, expose_value=False, help="Only results, warnings and errors."),
        ] = False,
    ) -> None: ...

    (option,) = typer.main.get_command(probe).params
    return option


def with_quiet(command: Any) -> Any:
    """`command`, which takes --quiet from now on; a group of commands stays as it is."""
    if command is None or hasattr(command, "list_commands"):
        return command
    if not any(option.name == "quiet" for option in command.params):
        command.params.append(_quiet_option())
    return command


class CommandGroup(TyperGroup):
    """Commands of which each takes --quiet, and whose refusals of an option or a word say what was meant."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return with_quiet(super().get_command(ctx, cmd_name))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _add_cure(error)
            raise


def _add_cure(error: Any) -> None:
    option, near = getattr(error, "option_name", None), set(getattr(error, "possibilities", None) or ())
    if error.ctx is None or near - {"--help"} or (option is None and "extra argument" not in error.message):
        return
    from launch.usage import cure

    found = cure(error.ctx.command, option)
    if found:
        error.message, error.possibilities = f"{error.message}\n  cure: {found}", None


def lazy_group(module: str) -> type[TyperGroup]:
    """A group whose commands are those of the typer application `app` of `module`, imported when one is asked for."""

    class LazyGroup(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return list(self._loaded())

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return with_quiet(self._loaded().get(cmd_name))

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            default = self.default_command
            if default is not None and args and args[0] not in self._loaded():
                args = [default, *args]
            return super().resolve_command(ctx, args)

        @property
        def default_command(self) -> str | None:
            """The command that is meant where none is named."""
            name: str | None = getattr(import_module(module), "DEFAULT_COMMAND", None)
            return name

        def _loaded(self) -> Any:
            if not self.commands:
                group = typer.main.get_group(import_module(module).app)
                self.commands.update(group.commands)
            return self.commands

    return LazyGroup
