"""Instruction sets: prompts with answers to learn, from which the loss counts on the answers alone.

A row is one of
    {"prompt": text, "completion": text}        encoded apart; the end-of-document token follows the completion
    {"messages": [{"role": ..., "content": ...}, ...]}        through a chat template; every assistant turn is an answer
Text that spells a special token stays text, in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.chat import ChatTemplate
from data.rows import Report, read_encoded
from data.sources import Source
from data.tokenizer import Ids, Tokenizer
from foundation.errors import RequestError

NO_ANSWER, TOO_LONG = "without an answer", "too long"


@dataclass(frozen=True)
class Example:
    """One prompt with its answer, or one conversation."""

    tokens: Ids
    """int32 [n]"""
    answer: NDArray[np.bool_]
    """bool [n]: the tokens to learn, end of answer included. The loss counts where the next token is one of them."""


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> Example:
    """A prompt and its completion, each encoded alone, and the end-of-document token."""
    before, after = tokenizer.encode([prompt, completion])
    tokens = np.concatenate([before, after, np.array([tokenizer.eod_id], dtype=np.int32)])
    answer = np.zeros(len(tokens), dtype=np.bool_)
    answer[len(before) :] = True
    return Example(tokens, answer)


def encode_conversation(template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> Example:
    """A conversation of which every assistant turn is an answer."""
    tokens, answer = template.encode(messages)
    return Example(tokens, answer)


def read_examples(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    seq_length: int,
    report: Report,
    *,
    strict: bool = False,
) -> Iterator[Example]:
    """The examples of instruction sets, in order.

    Args:
        sources: .jsonl, .parquet or saved datasets.
        tokenizer: of the model.
        template: for rows with `messages`; None: such rows are bad.
        seq_length: inputs of a sequence. An example of more than seq_length + 1 tokens is left out, and counted: cut,
            it would teach answers without an end.
        report: takes lines for people, among them every bad row.
        strict: refuse bad rows.

    Raises:
        RequestError: a source without one example, or a bad row where `strict` refuses it.
        WorkError: a file is damaged.
    """

    def left_out(example: Example) -> str | None:
        if not example.answer[1:].any():
            return NO_ANSWER
        return TOO_LONG if len(example.tokens) > seq_length + 1 else None

    def encode(values: dict[str, Any]) -> Example:
        return encode_row(values, tokenizer, template)

    return read_encoded(sources, encode, left_out, report, what="example", strict=strict)


def encode_row(values: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> Example:
    """An example from a row.

    Raises:
        RequestError: it has neither form.
    """
    if values.get("messages") is not None:  # null in a table's rows of the other form
        return encode_conversation(*_conversation(values["messages"], template))
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, list):  # a conversation, and the turns that continue it
        turns = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        return encode_conversation(*_conversation([*prompt, *turns], template))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise RequestError(
            f"neither messages nor prompt and completion; keys here: {', '.join(sorted(values)[:8]) or 'none'}",
            rule="both are strings, or messages is a list",
        )
    return encode_completion(tokenizer, prompt, completion)


def _conversation(messages: Any, template: ChatTemplate | None) -> tuple[ChatTemplate, list[dict[str, Any]]]:
    if template is None:
        raise RequestError("a conversation, and no chat template to render it (data.chat_template names one)")
    return template, check_messages(messages)


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages with a role and a content each.

    Raises:
        RequestError: they are not.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {number} has no role")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"the content of message {number} is not a string")
    return messages
