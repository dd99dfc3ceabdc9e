"""Small corpora, a small tokenizer of each kind and a small token file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from data.tokenizer import Tokenizer
from data.tokenizer_training import train_tokenizer

WORDS = "the a of and to in that it is was for on with as by at from or be this have not are but".split()


def some_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of random words; every tenth is empty."""
    chance = random.Random(seed)
    return ["" if i % 10 == 9 else " ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for i in range(count)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 400 documents, 40 of them empty."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", some_texts(400))


@pytest.fixture(scope="session", params=["byte-bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One of each kind."""
    return train_tokenizer(some_texts(300), request.param, 300, tmp_path_factory.mktemp("tokenizer"), lambda _: None)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(some_texts(300), "byte-bpe", 300, tmp_path_factory.mktemp("bpe"), lambda _: None)


class Lines(list[str]):
    """A report that keeps what it is told."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def about(self, part: str) -> str:
        """The one line with this part."""
        (found,) = [line for line in self if part in line]
        return found


@pytest.fixture
def lines() -> Lines:
    return Lines()


Write = Callable[[Path, Iterable[str]], Path]
