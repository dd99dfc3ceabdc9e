"""Instruction and preference sets as batches, split into training and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import xxhash

from alignment.config import ExamplesConfig, InstructionDataConfig, PreferenceDataConfig
from data.chat import ChatTemplate, load_chat_template
from data.fingerprints import combined
from data.instruction import Example, read_examples
from data.order import permutation
from data.preferences import PreferencePair, read_pairs
from data.sources import Source, find_source
from data.tokenizer import Tokenizer
from foundation.errors import ConfigError

T = TypeVar("T")
Report = Callable[[str], None]
_HELD_OUT = 7  # a stream of data.order of its own
Read = Callable[[Sequence[Source], Tokenizer, ChatTemplate | None, int, Report], Iterator[T]]


@dataclass(frozen=True)
class Split(Generic[T]):
    """Examples to learn from and to evaluate on, what rendered them, and a fingerprint of all that decides batches."""

    train: Sequence[T]
    validation: Sequence[T]
    template: ChatTemplate | None
    fingerprint: str


def instruction_split(
    config: InstructionDataConfig, tokenizer: Tokenizer, seq_length: int, seed: int, report: Report, inherited: str = ""
) -> Split[Example]:
    """Examples of instruction sets; `inherited` as of `chat_template_of`.

    Raises:
        ConfigError, RequestError: a source that is not there or holds nothing.
    """

    def read(
        sources: Sequence[Source], tokenizer: Tokenizer, template: ChatTemplate | None, length: int, report: Report
    ) -> Iterator[Example]:
        return read_examples(sources, tokenizer, template, length, report, strict=config.strict)

    template = chat_template_of(config, tokenizer, inherited)
    return _split(config, tokenizer, template, seq_length, seed, report, read, _example_hash)


def preference_split(
    config: PreferenceDataConfig, tokenizer: Tokenizer, seq_length: int, seed: int, report: Report, inherited: str = ""
) -> Split[PreferencePair]:
    """Pairs of preference sets; `inherited` as of `chat_template_of`.

    Raises:
        ConfigError, RequestError: a source that is not there or holds nothing.
    """

    def read(
        sources: Sequence[Source], tokenizer: Tokenizer, template: ChatTemplate | None, length: int, report: Report
    ) -> Iterator[PreferencePair]:
        return read_pairs(sources, tokenizer, template, length, report, strict=config.strict)

    template = chat_template_of(config, tokenizer, inherited)
    return _split(config, tokenizer, template, seq_length, seed, report, read, pair_hash)


def chat_template_of(config: ExamplesConfig, tokenizer: Tokenizer, inherited: str = "") -> ChatTemplate | None:
    """The template asked for, else that of the checkpoint that is begun with, else the tokenizer's, else None.

    Args:
        inherited: Jinja, from the manifest of the checkpoint; what it has learned to read.
    """
    if config.chat_template is not None or inherited:
        return load_chat_template(tokenizer, config.chat_template or inherited)
    try:
        return load_chat_template(tokenizer)
    except ConfigError:
        return None  # rows without messages need none; others are counted as bad, and why


def _split(
    config: ExamplesConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    seed: int,
    report: Report,
    read: Read[T],
    hash_of: Callable[[T], str],
) -> Split[T]:
    def examples(names: Sequence[str], field: str) -> list[T]:
        found = [find_source(name, field=field) for name in names]
        return list(read(found, tokenizer, template, seq_length, report)) if found else []

    train = examples(config.sources, "data.sources")
    validation = examples(config.validation_sources, "data.validation_sources")
    if not validation and config.validation_fraction > 0:
        order = permutation(len(train), seed, _HELD_OUT)
        held_out = set(order[: round(len(train) * config.validation_fraction)].tolist())
        validation = [example for number, example in enumerate(train) if number in held_out]
        train = [example for number, example in enumerate(train) if number not in held_out]
    if not train:
        raise ConfigError(
            "data.validation_fraction",
            config.validation_fraction,
            rule="leaves an example to learn from",
            cure="data.validation_fraction=0.05, or more examples",
        )
    order_of_rows = repr((config.model_dump(exclude={"sources", "validation_sources"}), seq_length, seed))
    return Split(train, validation, template, combined([*map(hash_of, train), order_of_rows]))


def _example_hash(example: Example) -> str:
    digest = xxhash.xxh3_128(example.tokens.tobytes())
    digest.update(example.answer.tobytes())
    return digest.hexdigest()


def pair_hash(pair: PreferencePair) -> str:
    """Of a pair's tokens."""
    return _example_hash(pair.chosen) + _example_hash(pair.rejected)
