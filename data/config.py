"""The `data` section: where the text comes from, how it becomes tokens and how documents share a sequence.

Imports nothing heavy, so that `orthant --help` stays fast.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from data.sources import find_source
from foundation.errors import ConfigError
from foundation.section import Section, UserPath

TokenizerKind = Literal["sentencepiece", "byte-bpe"]

# 256 bytes, so that any text round-trips, and the special tokens of each kind
# (byte-bpe: end of document; sentencepiece: unknown, begin, end), and a few learned pieces.
SMALLEST_VOCABULARY: dict[TokenizerKind, int] = {"byte-bpe": 258, "sentencepiece": 264}


class WeightedSource(Section):
    """A source with its share of the training samples."""

    path: str
    """What a plain entry of `sources` may hold."""

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Share of the samples, relative to the sum over all sources. Not related to the source's size."""


SourceEntry = str | WeightedSource


class TokenizerConfig(Section):
    """Either a tokenizer that exists (`path`) or one to train on the sources (`kind` and `vocab_size`)."""

    path: UserPath | None = None
    """tokenizer.json, tokenizer.model (sentencepiece) or a folder that holds one of them."""

    kind: TokenizerKind | None = None
    """Train a tokenizer of this kind on the training documents."""

    vocab_size: int | None = None
    """Entries of the tokenizer to train. A corpus too small for it gives the largest possible, and that is said."""

    eod_token: str | None = None
    """The token that ends a document. None: the tokenizer's own end-of-text token."""

    @model_validator(mode="after")
    def _one_way(self) -> TokenizerConfig:
        if (self.path is None) == (self.kind is None):
            raise ConfigError(
                "data.tokenizer",
                self.model_dump(exclude_none=True, mode="json"),
                "a tokenizer is either loaded (path) or trained (kind and vocab_size): exactly one of the two",
                "tokenizer: {path: my_tokenizer/}  or  tokenizer: {kind: byte-bpe, vocab_size: 8192}",
            )
        if self.kind is None and self.vocab_size is not None:
            raise ConfigError(
                "data.tokenizer.vocab_size",
                self.vocab_size,
                "a loaded tokenizer brings its own vocabulary",
                "leave vocab_size out, or set kind instead of path to train one",
            )
        if self.kind is not None:
            smallest = SMALLEST_VOCABULARY[self.kind]
            if self.vocab_size is None or self.vocab_size < smallest:
                raise ConfigError(
                    "data.tokenizer.vocab_size",
                    self.vocab_size,
                    f"a {self.kind} tokenizer holds all 256 bytes and its special tokens: at least {smallest} entries",
                    "8192 for a small corpus, 32000 or more for a large one",
                )
            if self.eod_token is not None:
                raise ConfigError(
                    "data.tokenizer.eod_token",
                    self.eod_token,
                    "names a token of a tokenizer that exists; a trained one chooses its own",
                    "leave eod_token out",
                )
        return self


class DataConfig(Section):
    """Sources, tokenizer and document borders."""

    sources: Annotated[tuple[SourceEntry, ...], Field(min_length=1)]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt), folders of them, a folder written by save_to_disk of
    `datasets`, or a tokenised PREFIX (PREFIX.bin and PREFIX.idx). `orthant:demo` is the corpus of this package.
    Entries `{path, weight}` blend by weight; then every entry needs a weight."""

    validation_sources: tuple[SourceEntry, ...] = ()
    """Documents to evaluate on. Empty: `validation_fraction` of the documents of `sources` is held out."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the documents held out when `validation_sources` is empty. A document is held out by a hash of its
    content, so the choice depends neither on order nor on the other documents."""

    text_key: Annotated[str, Field(min_length=1)] = "text"
    """Key of the text in .jsonl objects; column of the text in .parquet and saved datasets."""

    tokenizer: TokenizerConfig
    """The tokenizer to load, or the one to train."""

    document_mask: bool = False
    """Attention stays inside a document, and positions restart with each."""

    reset_position_ids: bool = False
    """Positions restart with each document; attention still crosses documents."""

    eod_mask_loss: bool = False
    """No loss where the input token is the end of a document (what follows belongs to another document)."""

    @model_validator(mode="after")
    def _weights_all_or_none(self) -> DataConfig:
        for name, entries in (("sources", self.sources), ("validation_sources", self.validation_sources)):
            weighted = [isinstance(entry, WeightedSource) for entry in entries]
            if any(weighted) and not all(weighted):
                bare = entries[weighted.index(False)]
                raise ConfigError(
                    f"data.{name}",
                    bare,
                    "weights are given to every source or to none (then the documents count as one corpus)",
                    f"{{path: {bare}, weight: 1.0}}",
                )
        return self


def check_files(config: DataConfig, seq_length: int | None = None) -> None:
    """Refuse sources and tokenizers that are not there, by name, and token files that hold no sample of `seq_length`.

    Kept out of the validators: a configuration read back from a checkpoint is valid where its corpus is not.

    Raises:
        ConfigError: a file is missing, unreadable as a corpus, or tokenised while a tokenizer is to be trained; a token
            file is too small.
    """
    for name, entries in (("sources", config.sources), ("validation_sources", config.validation_sources)):
        for entry in entries:
            path = entry if isinstance(entry, str) else entry.path
            source = find_source(path, field=f"data.{name}")
            if source.prefix is not None and config.tokenizer.path is None:
                raise ConfigError(
                    f"data.{name}",
                    path,
                    "is tokenised already, and a new tokenizer would give its numbers other meanings",
                    "set data.tokenizer.path to the tokenizer that wrote it, and leave kind and vocab_size out",
                )
            if source.prefix is not None and seq_length is not None and name == "sources":
                from data.enough import check_token_file  # brings numpy, which text does not need here

                check_token_file(source.prefix, f"data.{name}", seq_length)
    tokenizer = config.tokenizer.path
    if tokenizer is not None and not tokenizer.exists():
        raise ConfigError(
            "data.tokenizer.path",
            str(tokenizer),
            "no such file or folder",
            "the path of a tokenizer.json, a tokenizer.model or a folder that holds one",
        )
