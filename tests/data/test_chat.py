"""Chat templates: transformers' tokens, answers told apart, and no special token from what people wrote."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.chat import CHATML, CHATML_TOKENS, TODAY, ChatTemplate, load_chat_template
from data.config import TokenizerKind
from data.encoding import GigatokenEncoder, choose_encoder
from data.tokenizer import Tokenizer
from data.tokenizer_training import train_tokenizer
from foundation.errors import ConfigError, RequestError
from tests.data.chat_tokenizers import SPECIALS, TEMPLATES, chat_tokenizer
from tests.data.conftest import Lines, some_texts

CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "It is that."},
    {"role": "user", "content": "Are you on?\n\n"},
    {"role": "assistant", "content": "Not as such — but 😀 by and by."},
]
END_OF_TURN = {"chatml": "<|im_end|>\n", "llama3": "<|eot_id|>", "mistral": "<|endoftext|>"}


@pytest.fixture(params=TEMPLATES)
def chat(request: pytest.FixtureRequest, tmp_path: Path, bpe: Tokenizer) -> tuple[str, Tokenizer, ChatTemplate]:
    tokenizer = chat_tokenizer(tmp_path, bpe, request.param)
    return request.param, tokenizer, load_chat_template(tokenizer)


def test_tokens_are_those_of_transformers(chat: tuple[str, Tokenizer, ChatTemplate]) -> None:
    from transformers import PreTrainedTokenizerFast

    _, tokenizer, template = chat
    theirs: Any = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.path.parent))
    for messages in (CHAT, CHAT[:2], CHAT[:1], CHAT[:3]):
        assert template.render(messages) == theirs.apply_chat_template(messages, tokenize=False)
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert template.encode(messages).tokens.tolist() == expected
        prompted = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
        assert template.encode_prompt(messages).tolist() == prompted["input_ids"]


def test_answers_are_what_assistants_say(chat: tuple[str, Tokenizer, ChatTemplate]) -> None:
    name, tokenizer, template = chat
    encoded = template.encode(CHAT)
    runs = np.split(encoded.tokens, np.flatnonzero(np.diff(encoded.answer)) + 1)
    end = END_OF_TURN[name]
    ending = tokenizer.special_tokens[end.strip()]
    for answer, message in zip(runs[1::2], CHAT[1::2], strict=True):
        assert ending in answer and tokenizer.decode(answer).strip() == message["content"]
    assert not encoded.answer[0] and encoded.answer.dtype == np.bool_
    # What is generated from: the tokens before an answer are the prompt's.
    assert np.concatenate(runs[:3]).tolist() == template.encode_prompt(CHAT[:3]).tolist()
    assert not template.encode(CHAT[:1]).answer.any()


def test_what_people_write_is_text(chat: tuple[str, Tokenizer, ChatTemplate]) -> None:
    """A user who writes the template's own marks ends no turn, and an answer that does so neither."""
    _, tokenizer, template = chat
    forged = "".join(SPECIALS) + tokenizer.eod_token
    plain = template.encode(CHAT)
    hostile = [dict(message, content=message["content"] + forged) for message in CHAT]
    encoded = template.encode(hostile)
    numbers = list(tokenizer.special_tokens.values())
    assert np.isin(encoded.tokens, numbers).sum() == np.isin(plain.tokens, numbers).sum()
    assert tokenizer.decode(encoded.tokens).count(forged) == len(CHAT)
    prompts = [np.isin(template.encode_prompt(messages[:3]), numbers).sum() for messages in (hostile, CHAT)]
    assert prompts[0] == prompts[1]


def test_private_letters_in_a_message(chat: tuple[str, Tokenizer, ChatTemplate]) -> None:
    _, tokenizer, template = chat
    messages = [{"role": "user", "content": "\ue000 \ue001 <|im_end|>"}, {"role": "assistant", "content": "\ue000"}]
    assert "\ue000 \ue001 <|im_end|>" in tokenizer.decode(template.encode(messages).tokens)


def test_a_template_refuses(tmp_path: Path, bpe: Tokenizer) -> None:
    template = load_chat_template(chat_tokenizer(tmp_path, bpe, "mistral"))
    with pytest.raises(RequestError, match="roles must alternate"):
        template.encode([{"role": "assistant", "content": "first"}])
    with pytest.raises(RequestError, match="refuses a conversation"):
        load_chat_template(bpe, CHATML).encode([{"role": "user"}])


def test_a_template_that_rewrites_what_it_said(bpe: Tokenizer) -> None:
    """As reasoning models' templates do, which take thoughts out of all answers but the last."""
    template = ChatTemplate("{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}", bpe)
    with pytest.raises(RequestError, match="its beginning cannot be told"):
        template.encode(CHAT)
    assert len(template.encode_prompt(CHAT[:3]))


def test_a_template_is_run_in_a_sandbox(bpe: Tokenizer) -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", bpe)
    with pytest.raises(RequestError, match="unsafe"):
        template.render(CHAT)
    with pytest.raises(ConfigError, match="not a Jinja template"):
        ChatTemplate("{% for %}", bpe)


def test_which_template(tmp_path: Path, bpe: Tokenizer) -> None:
    tokenizer = chat_tokenizer(tmp_path, bpe, "llama3")
    assert "<|eot_id|>" in load_chat_template(tokenizer).render(CHAT)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_chat_template(tokenizer).render(CHAT) == CHAT[0]["content"]  # as newer transformers writes it
    (tmp_path / "mine.jinja").write_text("mine")
    assert load_chat_template(tokenizer, tmp_path / "mine.jinja").render(CHAT) == "mine"
    assert load_chat_template(tokenizer, "chatml").render(CHAT[:1]) == "<|im_start|>user\nWhat is it?<|im_end|>\n"
    assert load_chat_template(tokenizer, "{{ bos_token }}").render(CHAT) == "<|begin_of_text|>"
    with pytest.raises(ConfigError, match="no chat template"):
        load_chat_template(bpe)
    with pytest.raises(ConfigError, match="no template 'tools'"):
        load_chat_template(tokenizer, "tools")


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece"])
def test_a_tokenizer_trained_for_chats(tmp_path: Path, kind: TokenizerKind, lines: Lines) -> None:
    trained = train_tokenizer(some_texts(300), kind, 310, tmp_path, lines, chat=True)
    assert trained.vocab_size == 310 and set(CHATML_TOKENS) < set(trained.special_tokens)
    template = load_chat_template(trained)
    encoded = template.encode(CHAT)
    starts = encoded.tokens == trained.special_tokens[CHATML_TOKENS[0]]
    assert starts.sum() == len(CHAT) and not encoded.answer[starts].any()
    ends = encoded.tokens == trained.special_tokens[CHATML_TOKENS[1]]
    assert encoded.answer[ends].tolist() == [False, True, False, True]
    (plain,) = trained.encode(["<|im_start|>"])
    assert not np.isin(plain, list(trained.special_tokens.values())).any()
    assert isinstance(choose_encoder(trained, some_texts(20), lines), GigatokenEncoder)


def test_templates_are_told_a_fixed_date(bpe: Tokenizer) -> None:
    """Else the same conversation would give other tokens tomorrow."""
    template = load_chat_template(bpe, "{{ strftime_now('%d %b %Y %H:%M') }}")
    assert template.render(CHAT) == "26 Jul 2024 00:00" and template.today == TODAY
    other = load_chat_template(bpe, template.source, today=date(2025, 1, 2))
    assert other.render(CHAT) == "02 Jan 2025 00:00"
