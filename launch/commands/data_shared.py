"""What the commands of `orthant data` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import ConfigError, RequestError, WorkError

if TYPE_CHECKING:
    from data.sources import Source
    from data.tokenizer import Tokenizer

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC",
        help=".jsonl(.gz|.zst), .parquet or .txt files, folders of them, a saved datasets folder, or orthant:demo.",
        show_default=False,
    ),
]
TextKey = Annotated[str, typer.Option(help="Key or column of the text.")]
Prefix = Annotated[Path, typer.Argument(metavar="PREFIX", help="Of PREFIX.bin and PREFIX.idx.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def documents(names: list[str]) -> list[Source]:
    """Sources of documents; a token file is refused."""
    from data.sources import find_source

    sources = [find_source(name, field="SRC") for name in names]
    for source in sources:
        if source.prefix is not None:
            raise RequestError(
                f"{source.name} is tokenised already",
                rule="this command reads documents",
                cure="name the documents that it was made from",
            )
    return sources


def tokenizer_given(path: Path, eod_token: str | None) -> Tokenizer:
    """The tokenizer that `--tokenizer` and `--eod-token` name.

    Raises:
        ConfigError: there is none; it names the option.
    """
    from data.tokenizer import load_tokenizer

    try:
        return load_tokenizer(path, eod_token)
    except ConfigError as error:
        option = {"data.tokenizer.path": "--tokenizer", "data.tokenizer.eod_token": "--eod-token"}.get(error.field)
        raise ConfigError(option or error.field, error.value, error.rule or "", error.cure or "") from error


@contextmanager
def told_failures(out: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written ends in a message."""
    try:
        yield
    except OSError as problem:
        raise WorkError(
            f"the work failed: {problem}",
            where=str(out),
            cure="free disk space or correct permissions, and start again",
        ) from problem
