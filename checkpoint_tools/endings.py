"""What a checkpoint's conversations are rendered with, and the tokens that end what its model says."""

from __future__ import annotations

from checkpoint_tools.manifest import Manifest
from data.chat import ChatTemplate, load_chat_template, turn_ends
from data.tokenizer import Tokenizer
from foundation.errors import ConfigError


def chat_template_of(manifest: Manifest, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """What it was trained with, else its tokenizer's own."""
    if tokenizer is None:
        return None
    if manifest.chat_template:
        return load_chat_template(tokenizer, manifest.chat_template)
    try:
        return load_chat_template(tokenizer)
    except ConfigError:
        return None  # messages are refused then; other prompts need none


def stop_tokens(manifest: Manifest, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The end of a document, and of an assistant's turn where the tokenizer has a special token for it."""
    stop = frozenset() if manifest.eod_id is None else frozenset([manifest.eod_id])
    template = chat_template_of(manifest, tokenizer)
    return stop if template is None or tokenizer is None else stop | turn_ends(template, tokenizer)
