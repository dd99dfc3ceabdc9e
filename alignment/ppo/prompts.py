"""Sets of prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignment.examples import chat_template_of
from alignment.ppo.config import PromptDataConfig
from data.chat import ChatTemplate
from data.instruction import check_messages
from data.rows import read_encoded
from data.sources import find_source
from data.tokenizer import Tokenizer
from foundation.errors import RequestError

Tokens = tuple[int, ...]


def read_prompts(
    config: PromptDataConfig, tokenizer: Tokenizer, longest: int, report: Callable[[str], None], inherited: str = ""
) -> tuple[list[Tokens], ChatTemplate | None]:
    """Prompts of at most `longest` tokens, in order, and the template that rendered conversations.

    `inherited` is the template of the actor's checkpoint, as of `chat_template_of`.

    Raises:
        RequestError, ConfigError: a source that is not there or holds nothing.
        WorkError: a file is damaged.
    """
    template = chat_template_of(config, tokenizer, inherited)

    def encode(values: dict[str, Any]) -> Tokens:
        return encode_prompt(values, tokenizer, template)

    def left_out(prompt: Tokens) -> str | None:
        return "too long" if len(prompt) > longest else None

    sources = [find_source(name, field="data.sources") for name in config.sources]
    return list(read_encoded(sources, encode, left_out, report, what="prompt", strict=config.strict)), template


def encode_prompt(values: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> Tokens:
    """A row as tokens. An assistant's turn at the end of a conversation is left out: the policy is to give its own.

    Raises:
        RequestError: it is neither form, or empty.
    """
    asked = values.get("messages") if values.get("messages") is not None else values.get("prompt")
    if isinstance(asked, list):
        if template is None:
            raise RequestError("a conversation, and no chat template to render it")
        messages = check_messages(asked)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        tokens = template.encode_prompt(messages)
    elif isinstance(asked, str):
        tokens = tokenizer.encode([asked])[0]
    else:
        raise RequestError("neither prompt nor messages")
    if not len(tokens):
        raise RequestError("an empty prompt")
    return tuple(int(token) for token in tokens)
