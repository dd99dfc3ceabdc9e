"""Prompts of conversations: who says how they are written."""

from __future__ import annotations

import json
from pathlib import Path

from alignment.ppo.config import PromptDataConfig
from alignment.ppo.prompts import read_prompts
from data.tokenizer_training import train_tokenizer


def test_conversations_are_written_as_the_actor_learned_them(tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "hello there"}]}) + "\n")
    tokenizer = train_tokenizer(["<hello there>"] * 20, "byte-bpe", 300, tmp_path / "tokenizer", lambda _: None)
    config = PromptDataConfig(sources=[str(rows)])
    learned = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    prompts, template = read_prompts(config, tokenizer, 64, print, learned)
    assert template is not None and template.source == learned
    assert [tokenizer.decode(list(prompt)) for prompt in prompts] == ["<hello there>"]
