"""Tokenizers: any text comes back, and no text becomes the end of a document."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from data.chat import load_chat_template
from data.config import TokenizerKind
from data.documents import Reading
from data.sources import find_source
from data.tokenize_shard import is_held_out
from data.tokenizer import EOD_TOKEN, Tokenizer, load_tokenizer, tokenizer_files
from data.tokenizer_training import corpus_texts, train_tokenizer
from foundation.errors import ConfigError, RequestError
from tests.data.conftest import Lines, some_texts

ODD = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\t\r\n",
    "nul \0 and bell \a",
    "\ufeffmark",
    "日本語 😀 e\u0301 ﬁ",
    "a\u2581b \u2581\u2581 c\u2581",
    "a" * 5000,
]
SPECIALS = ["<|endoftext|>", "</s>", "<s>", "<unk>", "<0x41>", "x</s>y <|endoftext|><|endoftext|>"]


@pytest.mark.parametrize("text", [*ODD, *SPECIALS])
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    spaced = text.replace("\u2581", " ") if tokenizer.path.suffix == ".model" else text
    assert tokenizer.decode(ids) == spaced
    assert ids.dtype == np.int32
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_no_text_becomes_the_end_of_a_document(tokenizer: Tokenizer) -> None:
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.eod_id]) == ""
    for ids in tokenizer.encode([*SPECIALS, tokenizer.eod_token, tokenizer.eod_token * 3]):
        assert len(ids) and tokenizer.eod_id not in ids


def test_loading_again(tokenizer: Tokenizer) -> None:
    for path in (tokenizer.path, tokenizer.path.parent):
        again = load_tokenizer(path, tokenizer.eod_token)
        assert (again.hash, again.vocab_size, again.eod_id) == (tokenizer.hash, tokenizer.vocab_size, tokenizer.eod_id)
        assert again.encode(["the end"])[0].tolist() == tokenizer.encode(["the end"])[0].tolist()
    assert tokenizer.hash == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    assert [file.name for file in tokenizer_files(tokenizer.path)] == [tokenizer.path.name, "tokenizer_config.json"]


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece"])
def test_training_repeats_and_says_that_a_corpus_is_small(tmp_path: Path, kind: TokenizerKind, lines: Lines) -> None:
    trained = [train_tokenizer(some_texts(50), kind, 5000, tmp_path / name, lines) for name in ("a", "b")]
    assert trained[0].hash == trained[1].hash
    assert 258 < trained[0].vocab_size < 5000
    assert len(lines) == 2 and "largest possible" in lines[0] and str(trained[0].vocab_size) in lines[0]
    exact = train_tokenizer(some_texts(50), kind, 300, tmp_path / "c", lines)
    assert exact.vocab_size == 300 and "largest" not in lines[-1]


def test_many_letters_in_a_small_vocabulary(tmp_path: Path, lines: Lines) -> None:
    texts = ["".join(map(chr, range(start, start + 500))) for start in range(0x4E00, 0x5600, 500)]
    for size in (264, 300, 1000):
        trained = train_tokenizer(texts, "sentencepiece", size, tmp_path / str(size), lines)
        assert trained.vocab_size <= size
        assert trained.decode(trained.encode([texts[0]])[0]) == texts[0]


def test_nothing_to_train_on(tmp_path: Path, lines: Lines) -> None:
    for kind in get_args(TokenizerKind):
        with pytest.raises(RequestError, match="no text"):
            train_tokenizer(["", ""], kind, 300, tmp_path, lines)
    assert not list(tmp_path.iterdir())


def test_what_a_tokenizer_is_trained_on(corpus: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never on what is held out; and on a part, chosen by content, of a corpus that is very large."""
    source = find_source(str(corpus))
    everything = list(corpus_texts([Reading(source)], "text", 0.0, lines))
    assert everything == some_texts(400)
    part = list(corpus_texts([Reading(source)], "text", 0.25, lines))
    assert part == [text for text in everything if not is_held_out(text, 0.25)] and not lines
    monkeypatch.setattr("data.tokenizer_training.TRAINING_BYTES", corpus.stat().st_size // 3)
    third = list(corpus_texts([Reading(source)], "text", 0.25, lines))
    assert set(third) < set(part) and 0.2 < len(third) / len(part) < 0.45
    assert "33.3% of it" in lines[0]


def test_a_long_document_is_sampled_in_pieces(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a corpus of one document would be left out whole, or taken whole."""
    monkeypatch.setattr("data.tokenizer_training._PIECE_LETTERS", 50)
    for number, text in enumerate(("the a of and " * 1000, " ".join(some_texts(400)))):
        (tmp_path / f"{number}.txt").write_text(text)
        monkeypatch.setattr("data.tokenizer_training.TRAINING_BYTES", len(text) // 4)
        source = find_source(str(tmp_path / f"{number}.txt"))
        pieces = list(corpus_texts([Reading(source)], "text", 0.0, lines))
        assert 0.15 < sum(map(len, pieces)) / len(text) < 0.35
        assert all(piece in text for piece in pieces)


def hostile(folder: Path) -> Path:
    """A tokenizer.json whose vocabulary holds its own special tokens, that cuts, pads and adds special tokens."""
    from tokenizers import AddedToken, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Library

    words = {"[UNK]": 0, "</s>": 1, "<s>": 2, "a": 3, "<": 4, "/s>": 5, "b": 6, "s>": 7}
    library = Library(models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    library.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 2), ("</s>", 1)])
    library.enable_truncation(2)
    library.enable_padding(length=9, pad_id=1)
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_a_vocabulary_that_holds_its_own_special_tokens(tmp_path: Path) -> None:
    loaded = load_tokenizer(hostile(tmp_path))
    assert (loaded.eod_token, loaded.eod_id) == ("</s>", 1)
    assert [ids.tolist() for ids in loaded.encode(["a b a b", "a </s> b"])] == [[3, 6, 3, 6], [3, 4, 5, 6]]


def test_which_token_ends_a_document(tmp_path: Path, bpe: Tokenizer) -> None:
    hostile(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert load_tokenizer(tmp_path).eod_id == 2  # as the configuration says
    assert load_tokenizer(tmp_path, "</s>").eod_id == 1  # as asked for
    added = load_tokenizer(tmp_path, EOD_TOKEN)  # not there: added
    assert (added.eod_id, added.vocab_size) == (8, 9)
    with pytest.raises(ConfigError, match=r"no such token"):
        load_tokenizer(tmp_path, "<|nothing|>")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for name, content in (
        ("tokenizer.json", "{}"),
        ("tokenizer.model", "IQ== 0\nIg== 1\n"),
        ("tokenizer.model", ""),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds neither"):
        load_tokenizer(tmp_path / "empty")


def test_unknown_letters_of_a_unigram_tokenizer(tmp_path: Path) -> None:
    """Its model names what stands for them by number."""
    from tokenizers import AddedToken, models
    from tokenizers import Tokenizer as Library

    library = Library(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], unk_id=0, byte_fallback=False))
    library.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("</s>", special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.special_tokens == {"</s>": 3}
    assert [ids.tolist() for ids in loaded.encode(["aXb", "ab"])] == [[1, 0, 2], [1, 2]]


def test_letters_that_nothing_can_be_learned_from(tmp_path: Path, lines: Lines) -> None:
    with pytest.raises(RequestError, match="no text"):
        train_tokenizer(["\0\0", "\u2581"], "sentencepiece", 300, tmp_path, lines)


@pytest.mark.parametrize("content", ["{broken", "[1]", "\xff", "[" * 100_000])
def test_a_broken_configuration_beside_a_tokenizer(tmp_path: Path, content: str) -> None:
    hostile(tmp_path)
    loaded = load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    for template in (None, "{{ bos_token }}"):
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
            load_chat_template(loaded, template)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": 5, "chat_template": [1, {"name": "x"}]}')
    assert load_tokenizer(tmp_path).eod_token == "</s>"
    with pytest.raises(ConfigError, match="no chat template"):
        load_chat_template(loaded)
