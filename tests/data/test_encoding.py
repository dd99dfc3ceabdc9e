"""The fast path: the reference's numbers, or the reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.encoding import HARD_TEXTS, FastPathDiffers, GigatokenEncoder, ReferenceEncoder, choose_encoder, random_texts
from data.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import Lines, some_texts
from tests.data.test_tokenizer import hostile


def spelling(tokenizer: Tokenizer) -> list[str]:
    return [f"x{name} {name}{name}y" for name in ("</s>", "<s>", "<unk>", tokenizer.eod_token)]


def test_the_fast_path_gives_the_references_numbers(tokenizer: Tokenizer, lines: Lines) -> None:
    texts = [*some_texts(500, seed=3), *HARD_TEXTS, *spelling(tokenizer)]
    encoder = choose_encoder(tokenizer, texts, lines)
    assert isinstance(encoder, GigatokenEncoder) and "by gigatoken" in lines[0] and len(lines) == 1
    for batch in (texts, texts[::-1], texts[:1], [""], []):
        found, expected = encoder.encode(batch), ReferenceEncoder(tokenizer).encode(batch)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.lengths.tolist() == expected.lengths.tolist()
    assert tokenizer.eod_id not in encoder.encode(spelling(tokenizer)).tokens


class Wrong:
    """gigatoken's library with a fault: text that holds a word gets another token."""

    def __init__(self, library: Any, word: str) -> None:
        self._library, self._word = library, word

    def encode_batch(self, texts: Sequence[str], parallel: bool) -> Any:
        return self._library.encode_batch([text.replace(self._word, "?") for text in texts], parallel=parallel)


def broken(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    real = GigatokenEncoder.__init__

    def init(self: GigatokenEncoder, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self._library = Wrong(self._library, word)

    monkeypatch.setattr(GigatokenEncoder, "__init__", init)


@pytest.mark.parametrize("word", ["which", "\0", "  "])
def test_a_sample_that_differs_leaves_the_reference(
    tokenizer: Tokenizer, lines: Lines, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    broken(monkeypatch, word)
    assert isinstance(choose_encoder(tokenizer, ["what", "in which a word"], lines), ReferenceEncoder)
    assert "by the reference, as gigatoken gives other tokens" in lines[0]


def test_letters_beyond_ascii_go_to_the_reference_where_it_errs_on_them(
    tokenizer: Tokenizer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "日")
    encoder = choose_encoder(tokenizer, ["what", "in which a word"], lines)
    assert isinstance(encoder, GigatokenEncoder) and encoder.ascii_only
    assert "documents with letters beyond ASCII by the reference" in lines[0]
    texts = ["", "a 日 b", "the", "", "é", "日"]
    found, expected = encoder.encode(texts), ReferenceEncoder(tokenizer).encode(texts)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_a_model_with_nfkc(tmp_path: Path, lines: Lines) -> None:
    """sentencepiece's default; gigatoken composes some rare marks in another order."""
    import sentencepiece

    with open(tmp_path / "tokenizer.model", "wb") as handle:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text for text in some_texts(300) if text]),
            model_writer=handle,
            model_type="bpe",
            vocab_size=300,
            byte_fallback=True,
            minloglevel=2,
        )
    loaded = load_tokenizer(tmp_path)
    encoder = choose_encoder(loaded, some_texts(20), lines)
    texts = random_texts(2000)
    found, expected = encoder.encode(texts), ReferenceEncoder(loaded).encode(texts)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert isinstance(encoder, GigatokenEncoder) and encoder.ascii_only


def test_a_difference_after_the_sample_is_found(
    tokenizer: Tokenizer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, "zebra")
    encoder = choose_encoder(tokenizer, ["a", "b"], lines)
    assert isinstance(encoder, GigatokenEncoder)
    with pytest.raises(FastPathDiffers, match="zebra"):
        for _ in range(3):
            encoder.encode(["a horse", "a zebra", "a cow"])


def test_a_document_that_becomes_a_special_token_goes_to_the_reference(tokenizer: Tokenizer) -> None:
    """gigatoken as it comes makes the end-of-document token of its spelling."""
    import gigatoken

    encoder = GigatokenEncoder(tokenizer)
    naive: Any = (
        gigatoken.Tokenizer(str(tokenizer.path))
        if tokenizer.path.suffix == ".json"
        else gigatoken.Tokenizer.from_sentencepiece(tokenizer.path)
    )
    assert tokenizer.eod_id in naive.encode(f"a {tokenizer.eod_token}")
    encoder._library = naive
    texts = ["", "first", f"a {tokenizer.eod_token} b", "", "the last", tokenizer.eod_token]
    found, expected = encoder.encode(texts), ReferenceEncoder(tokenizer).encode(texts)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_a_tokenizer_that_gigatoken_cannot_do(tmp_path: Path, lines: Lines) -> None:
    words = load_tokenizer(hostile(tmp_path))
    encoder = choose_encoder(words, ["a b"], lines)
    assert isinstance(encoder, ReferenceEncoder) and "cannot do this tokenizer" in lines[0]
    assert encoder.encode(["a </s> b", "", "a"]).tokens.tolist() == [3, 4, 5, 6, 3]


def test_many_special_tokens(tmp_path: Path, bpe: Tokenizer, lines: Lines) -> None:
    """Special tokens that a tokenizer has beside its vocabulary, as Llama 3's, and one that is no special token."""
    values = json.loads(bpe.path.read_text())
    names = [f"<|reserved_special_token_{number}|>" for number in range(250)] + ["<|eot_id|>", "<tool>"]
    for number, name in enumerate(names, start=bpe.vocab_size):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        values["added_tokens"].append({"id": number, "content": name, "special": name != "<tool>", **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded.special_tokens) == 252 and loaded.vocab_size == bpe.vocab_size + 252
    encoder = choose_encoder(loaded, some_texts(50), lines)
    assert isinstance(encoder, GigatokenEncoder), lines
    tokens = encoder.encode(["a <|eot_id|><tool> b"]).tokens
    assert loaded.vocab_size - 1 in tokens  # <tool> is a word of the vocabulary
    assert not np.isin(tokens, list(loaded.special_tokens.values())).any()
    assert loaded.decode(tokens) == "a <|eot_id|><tool> b"
