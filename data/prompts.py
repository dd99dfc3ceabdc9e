"""Prompt sets: what a policy is asked to answer in PPO.

A row is {"prompt": text or list of messages} or {"messages": [...]}; its other keys (a reference answer, a task) travel
along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.chat import ChatTemplate
from data.instruction import TOO_LONG, check_messages
from data.order import permutation
from data.rows import Report, read_encoded
from data.sources import Source
from data.tokenizer import Ids, Tokenizer
from foundation.errors import RequestError


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be continued."""

    tokens: Ids
    """int32 [n], n at least 1"""
    text: str
    """As a person reads it."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The other keys of its row."""


def read_prompts(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    longest: int,
    report: Report,
    *,
    strict: bool = False,
) -> Iterator[Prompt]:
    """The prompts of prompt sets, in order. One of more than `longest` tokens is left out, and counted: cut, it would
    ask another question.

    Raises:
        RequestError: a source without one prompt, or a bad row where `strict` refuses it.
        WorkError: a file is damaged.
    """

    def encode(values: dict[str, Any]) -> Prompt:
        return encode_prompt(values, tokenizer, template)

    return read_encoded(
        sources,
        encode,
        lambda prompt: TOO_LONG if len(prompt.tokens) > longest else None,
        report,
        what="prompt",
        strict=strict,
    )


def encode_prompt(values: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> Prompt:
    """A prompt from a row.

    Raises:
        RequestError: it has none, or an empty one.
    """
    asked = values.get("messages") if values.get("prompt") is None else values["prompt"]
    fields = {key: value for key, value in values.items() if key not in ("prompt", "messages")}
    if isinstance(asked, list):
        if template is None:
            raise RequestError("a conversation, and no chat template to render it")
        messages = check_messages(asked)
        tokens, text = template.encode_prompt(messages), str(messages[-1]["content"])
    elif isinstance(asked, str):
        tokens, text = tokenizer.encode([asked])[0], asked
    else:
        raise RequestError(f"no prompt; keys here: {', '.join(sorted(values)[:8]) or 'none'}")
    if not len(tokens):
        raise RequestError("the prompt is empty")
    return Prompt(np.asarray(tokens), text, fields)


def prompt_numbers(count: int, first: int, wanted: int, seed: int) -> list[int]:
    """Numbers of prompts first .. first + wanted - 1 of an endless sequence: each epoch shuffles `count` prompts."""
    numbers: list[int] = []
    for epoch in range(first // count, (first + wanted - 1) // count + 1):
        begin, end = max(first - epoch * count, 0), min(first + wanted - epoch * count, count)
        numbers += permutation(count, seed, epoch)[begin:end].tolist()
    return numbers
