"""`orthant data`: tokenizers, token files, and what is in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foundation.errors import RequestError, WorkError

if TYPE_CHECKING:
    from data.sources import Source
    from data.tokenize import Progress

app = typer.Typer(help="Tokenizers and token files.", no_args_is_help=True, rich_markup_mode=None)

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


class Kind(StrEnum):
    """Tokenizers that can be trained."""

    SENTENCEPIECE = "sentencepiece"
    BYTE_BPE = "byte-bpe"


@app.command()
def tokenizer(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Entries, special tokens included.", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="What to train.")] = Kind.BYTE_BPE,
    text_key: TextKey = "text",
) -> None:
    """Train a tokenizer on documents.

    Writes OUT/tokenizer.json (byte-bpe) or OUT/tokenizer.model (sentencepiece) and its configuration. A corpus too
    small for the vocabulary gives the largest possible.

    \b
    Example:
      orthant data tokenizer corpus/ --out tokenizer --vocab-size 32000
    """
    from data.documents import Reading
    from data.tokenize import report_reading
    from data.tokenizer_training import corpus_texts, train_tokenizer

    readings = [Reading(source) for source in _documents(sources)]
    other = out / ("tokenizer.model" if kind is Kind.BYTE_BPE else "tokenizer.json")
    if other.exists():
        raise RequestError(
            f"{other} is there already",
            rule="a folder holds one tokenizer: who loads it could not tell which is meant",
            cure="another --out, or remove that file",
        )
    with _told_failures(out):
        texts = corpus_texts(readings, text_key, 0.0, _say)
        trained = train_tokenizer(texts, kind.value, vocab_size, out, _say)
    for reading in readings:
        report_reading(reading, _say)
    _say(
        f"wrote {trained.path}: {trained.vocab_size} entries, documents end with {trained.eod_token} ({trained.eod_id})"
    )


@app.command()
def tokenize(
    sources: Sources,
    tokenizer: Annotated[
        Path, typer.Option(help="tokenizer.json, tokenizer.model or a folder with one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="PREFIX", help="Token file to write.", show_default=False)],
    text_key: TextKey = "text",
    eod_token: Annotated[
        str | None, typer.Option(help="Token that ends a document.", show_default="the tokenizer's own")
    ] = None,
) -> None:
    """Turn documents into a token file in Megatron's format.

    Writes PREFIX.bin, PREFIX.idx and the manifest PREFIX.json, all or none. Lines that hold no document are listed, and
    kept in PREFIX.bad_lines.jsonl.

    \b
    Example:
      orthant data tokenize corpus/*.jsonl --tokenizer tokenizer --out tokens/corpus
    """
    from data.tokenize import tokenize as write
    from data.tokenizer import load_tokenizer

    if out.suffix in (".bin", ".idx", ".json") or out.is_dir():
        raise RequestError(
            f"--out {out} names a {'folder' if out.is_dir() else 'file'}",
            rule="PREFIX stands for the three files PREFIX.bin, PREFIX.idx and PREFIX.json",
            cure=f"--out {out / 'corpus' if out.is_dir() else out.with_suffix('')}",
        )
    found = _documents(sources)
    loaded = load_tokenizer(tokenizer, eod_token)
    with _told_failures(out), _bar("tokenise") as progress:
        (manifest,) = write(found, loaded, text_key, out, None, 0.0, _say, progress)
    _say(
        f"wrote {out}.bin, .idx and .json: {manifest.documents:,} documents, "
        f"{manifest.documents - manifest.sequences:,} of them empty, {manifest.tokens:,} tokens as {manifest.dtype}"
    )


@app.command()
def inspect(prefix: Prefix, as_json: Json = False) -> None:
    """Show what a token file holds.

    \b
    Example:
      orthant data inspect tokens/corpus --json
    """
    from data.inspection import describe_token_file

    facts = describe_token_file(prefix)
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if isinstance(value, list):
            print(f"{key}:")
            for item in value:
                print(f"  {', '.join(f'{name} {entry}' for name, entry in item.items())}")
        else:
            print(f"{key:{width}}  {'-' if value is None else value}")


@app.command()
def verify(prefix: Prefix, as_json: Json = False) -> None:
    """Check a token file against its manifest, its index and its vocabulary.

    Reads all of it. Exits with 3 where something differs.

    \b
    Example:
      orthant data verify tokens/corpus
    """
    from data.index_check import check_token_file

    differences = check_token_file(prefix)
    for difference in differences:
        _say(difference)
    if as_json:
        print(json.dumps({"prefix": str(prefix), "ok": not differences, "differences": differences}))
    _say(f"{prefix}: {f'{len(differences)} differences' if differences else 'whole'}")
    if differences:
        raise typer.Exit(3)


def _say(line: str) -> None:
    """Messages go to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def _documents(names: list[str]) -> list[Source]:
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


@contextmanager
def _told_failures(out: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written ends in a message."""
    try:
        yield
    except OSError as problem:
        raise WorkError(
            f"the work failed: {problem}",
            where=str(out),
            cure="free disk space or correct permissions, and start again",
        ) from problem


@contextmanager
def _bar(title: str) -> Iterator[Progress | None]:
    """A progress bar over bytes on a terminal; elsewhere lines tell now and then."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
