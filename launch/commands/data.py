"""`orthant data`: tokenizers, token files, and what is in them."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import RequestError
from launch.commands import data_clean, data_index, data_tokens
from launch.commands.data_shared import Json, Sources, TextKey, documents, told_failures
from launch.terminal import say, tell

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

app = typer.Typer(help="Clean text, tokenizers and token files.", no_args_is_help=True, rich_markup_mode=None)
app.command()(data_clean.clean)
app.command()(data_clean.classifier)
app.registered_commands += data_tokens.app.registered_commands
app.command()(data_index.index)


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
    chat: Annotated[bool, typer.Option("--chat", help="With ChatML's special tokens and its template.")] = False,
    as_json: Json = False,
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

    readings = [Reading(source) for source in documents(sources)]
    other = out / ("tokenizer.model" if kind is Kind.BYTE_BPE else "tokenizer.json")
    if other.exists():
        raise RequestError(
            f"{other} is there already",
            rule="a folder holds one tokenizer: who loads it could not tell which is meant",
            cure="another --out, or remove that file",
        )
    with told_failures(out):
        texts = corpus_texts(readings, text_key, 0.0, say)
        trained = train_tokenizer(texts, kind.value, vocab_size, out, say, chat=chat)
    for reading in readings:
        report_reading(reading, say)
    tell(
        f"wrote {trained.path}: {trained.vocab_size} entries, documents end with {trained.eod_token} ({trained.eod_id})"
    )
    if as_json:
        print(json.dumps(_described(trained)))


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What --json tells of a tokenizer."""
    return {
        "path": str(tokenizer.path),
        "sha256": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eod_token": tokenizer.eod_token,
        "eod_id": tokenizer.eod_id,
    }
