"""`orthant data tokenize|merge|inspect|verify|show`: token files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import ConfigError, RequestError
from launch.bars import terminal_bar
from launch.commands.data_shared import (
    Json,
    Prefix,
    Sources,
    TextKey,
    documents,
    tokenizer_given,
    told_failures,
)
from launch.terminal import say, tell

if TYPE_CHECKING:
    from data.manifest import Manifest
    from data.tokenize import Share

app = typer.Typer(rich_markup_mode=None)

Out = Annotated[Path, typer.Option(metavar="PREFIX", help="Token file to write.", show_default=False)]
TokenizerPath = Annotated[
    Path, typer.Option(help="tokenizer.json, tokenizer.model or a folder with one.", show_default=False)
]
EodToken = Annotated[str | None, typer.Option(help="Token that ends a document.", show_default="the tokenizer's own")]


@app.command()
def tokenize(
    sources: Sources,
    tokenizer: TokenizerPath,
    out: Out,
    text_key: TextKey = "text",
    eod_token: EodToken = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse lines that hold no document.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one for every 4 cores")] = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do only share I of N, counted from 0; do not join.", show_default=False),
    ] = None,
    shard_mib: Annotated[
        float, typer.Option(min=0.001, help="MiB on disk of a piece of work, which is kept when it is done.")
    ] = 256,
    as_json: Json = False,
) -> None:
    """Turn documents into a token file in Megatron's format.

    Writes PREFIX.bin, PREFIX.idx and the manifest PREFIX.json, all or none. Lines that hold no document are listed, and
    kept in PREFIX.bad_lines.jsonl. The same command goes on after a kill where it was. Tasks of a Slurm array do
    shares (slurm/tokenize.sbatch); the command without --share then joins what they did.

    \b
    Example:
      orthant data tokenize corpus/*.jsonl --tokenizer tokenizer --out tokens/corpus
    """
    from data.tokenize import Tokenization
    from data.tokenize import tokenize as write

    _refuse_ending(out)
    if not math.isfinite(shard_mib):
        raise ConfigError("--shard-mib", shard_mib, "MiB of a piece of work", "256")
    part = None if share is None else _share(share)
    found = documents(sources)
    loaded = tokenizer_given(tokenizer, eod_token)
    job = Tokenization(tuple(found), loaded, text_key, out, strict=strict, shard_bytes=int(shard_mib * (1 << 20)))
    with told_failures(out), terminal_bar("tokenise") as progress:
        manifests = write(job, say, progress, workers=workers, share=part)
    for manifest in manifests:
        _say_written(out, manifest)
    if as_json:
        print(json.dumps(_written(out, manifests[0]) if manifests else {"prefix": str(out), "share": share}))


@app.command()
def merge(
    prefixes: Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="In order.", show_default=False)],
    out: Out,
    tokenizer: Annotated[
        Path | None, typer.Option(help="That wrote them, where one has no manifest.", show_default=False)
    ] = None,
    eod_token: EodToken = None,
    as_json: Json = False,
) -> None:
    """Merge token files into one, in the order given. They stay as they are.

    \b
    Example:
      orthant data merge tokens/a tokens/b --out tokens/both
    """
    from data.merge import merge_token_files

    _refuse_ending(out)
    loaded = None if tokenizer is None else tokenizer_given(tokenizer, eod_token)
    with told_failures(out):
        manifest = merge_token_files(prefixes, out, loaded)
    _say_written(out, manifest)
    if as_json:
        print(json.dumps(_written(out, manifest)))


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
                print(f"  {', '.join(f'{name} {entry}' for name, entry in item.items() if name != 'files')}")
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
        tell(difference)
    if as_json:
        print(json.dumps({"prefix": str(prefix), "ok": not differences, "differences": differences}))
    tell(f"{prefix}: {f'{len(differences)} differences' if differences else 'whole'}")
    if differences:
        raise typer.Exit(3)


@app.command()
def show(
    prefix: Prefix,
    number: Annotated[int, typer.Argument(metavar="N", help="Document, counted from 0.", show_default=False)],
    tokenizer: TokenizerPath,
    eod_token: EodToken = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print the numbers of the tokens instead.")] = False,
    as_json: Json = False,
) -> None:
    """Print a document of a token file as text.

    \b
    Example:
      orthant data show tokens/corpus 17 --tokenizer tokenizer
    """
    from data.inspection import read_document

    loaded = tokenizer_given(tokenizer, eod_token)
    tokens = read_document(prefix, number, loaded)
    text = loaded.decode(tokens)
    if as_json:
        print(json.dumps({"prefix": str(prefix), "document": number, "ids": tokens.tolist(), "text": text}))
    else:
        print(" ".join(map(str, tokens.tolist())) if ids else text)


def _refuse_ending(out: Path) -> None:
    if out.suffix in (".bin", ".idx", ".json") or out.is_dir():
        raise RequestError(
            f"--out {out} names a {'folder' if out.is_dir() else 'file'}",
            rule="PREFIX stands for the three files PREFIX.bin, PREFIX.idx and PREFIX.json",
            cure=f"--out {out / 'corpus' if out.is_dir() else out.with_suffix('')}",
        )


def _share(text: str) -> Share:
    from data.tokenize import Share

    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError("--share", text, "is I/N: a share, counted from 0, of N (I is below N)", "--share 0/8")
    return Share(int(number), int(count))


def _written(out: Path, manifest: Manifest) -> dict[str, Any]:
    """What --json tells of a token file: its prefix and its manifest."""
    return {"prefix": str(out), **dataclasses.asdict(manifest)}


def _say_written(out: Path, manifest: Manifest) -> None:
    tell(
        f"wrote {out}.bin, .idx and .json: {manifest.documents:,} documents, "
        f"{manifest.documents - manifest.sequences:,} of them empty, {manifest.tokens:,} tokens as {manifest.dtype}"
    )
