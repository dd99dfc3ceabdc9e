"""Whether a corpus holds one sample at least, to train on and to evaluate on: known before any rank starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np

from data.config import DataConfig
from data.indexed import IndexedTokens
from data.prepared import PreparedData
from foundation.errors import ConfigError

LARGEST_SHARE = 0.5
"""Of the documents: more than that is not proposed to be held out."""


def check_prepared(
    prepared: PreparedData, config: DataConfig, seq_length: int, split: Literal["train", "validation"]
) -> None:
    """Every token file of a split holds one sample.

    Args:
        prepared: the corpus.
        config: what it was prepared from.
        seq_length: inputs of a sample.
        split: which one is going to be read.

    Raises:
        ConfigError: one does not, or there is none to evaluate on; the cure names the fields that help.
    """
    prefixes = prepared.train_prefixes if split == "train" else prepared.validation_prefixes
    files = [IndexedTokens(prefix) for prefix in prefixes]
    if split == "train":
        for file in files:
            if file.tokens <= seq_length:
                raise _too_small_to_train(file, config, seq_length)
        return
    smallest = min(files, key=lambda file: file.tokens, default=None)
    if smallest is None or smallest.tokens <= seq_length:
        everything = [IndexedTokens(prefix) for prefix in prepared.train_prefixes] + files
        raise _too_small_to_evaluate(smallest, everything, config, seq_length)


def check_token_file(prefix: Path, field: str, seq_length: int) -> None:
    """A token file that a configuration names is not known to be too small: by the size of its .bin alone.

    Raises:
        ConfigError: it is.
        RequestError: a part of it is missing.
        WorkError: it is damaged.
    """
    file = IndexedTokens(prefix)
    most = file.bin_bytes // np.dtype(file.dtype).itemsize
    if most <= seq_length:
        raise ConfigError(
            field,
            str(prefix),
            f"holds {most:,} tokens; one sample takes training.seq_length + 1 = {seq_length + 1:,}",
            _either(*_shorter(most), "a larger corpus"),
        )


def _too_small_to_train(file: IndexedTokens, config: DataConfig, seq_length: int) -> ConfigError:
    held_out = not config.validation_sources and config.validation_fraction > 0
    return ConfigError(
        "training.seq_length",
        seq_length,
        f"{file.prefix} holds {file.tokens:,} tokens in {file.documents:,} documents to train on; one sample takes "
        f"seq_length + 1 = {seq_length + 1:,}",
        _either(
            *_shorter(file.tokens),
            "more text in data.sources",
            *([f"a data.validation_fraction below {config.validation_fraction}"] if held_out else []),
        ),
    )


def _too_small_to_evaluate(
    file: IndexedTokens | None, everything: list[IndexedTokens], config: DataConfig, seq_length: int
) -> ConfigError:
    """Of the smallest file that is held out; None where no token is."""
    tokens = 0 if file is None else file.tokens
    held = "no token" if file is None else f"{tokens:,} tokens in {file.documents:,} documents ({file.prefix})"
    rule = f"holds {held} to evaluate on; one sample takes training.seq_length + 1 = {seq_length + 1:,}"
    if config.validation_sources:
        value = [entry if isinstance(entry, str) else entry.path for entry in config.validation_sources]
        return ConfigError(
            "data.validation_sources",
            value,
            rule,
            _either("more text in it", *_shorter(tokens), "evaluation.interval=null"),
        )
    # Twice what is needed: documents are chosen by a hash of their content, and are of any size.
    whole, documents = sum(one.tokens for one in everything), sum(one.documents for one in everything)
    share = math.ceil(200 * (seq_length + 1) / whole) / 100 if whole else 1.0
    larger = documents > 1 and config.validation_fraction < share <= LARGEST_SHARE
    return ConfigError(
        "data.validation_fraction",
        config.validation_fraction,
        rule,
        _either(
            *([f"data.validation_fraction={share:g}"] if larger else []),
            "data.validation_sources=[held_out.jsonl]",
            *_shorter(tokens),
            "evaluation.interval=null",
        ),
    )


def _shorter(tokens: int) -> list[str]:
    return [f"training.seq_length={tokens - 1}"] if tokens > 1 else []


def _either(*cures: str) -> str:
    return ", or ".join((", ".join(cures[:-1]), cures[-1])) if len(cures) > 1 else cures[0]
