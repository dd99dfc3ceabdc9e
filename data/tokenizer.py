"""Tokenizers: text to numbers and back, with an end-of-document token that text cannot forge.

Two kinds behind one protocol: tokenizer.json (the `tokenizers` library) and tokenizer.model (sentencepiece). A text
that spells a special token, such as `</s>` on a web page, is encoded as the letters that it is: a token made of it
would cut documents in two.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foundation.errors import ConfigError, WorkError

Ids = NDArray[np.int32]

FILE_NAMES = ("tokenizer.json", "tokenizer.model")
CONFIG_NAMES = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILE = "chat_template.jinja"
EOD_TOKEN = "<|endoftext|>"

# Names under which tokenizers without a configuration keep their end of text, the most telling first.
_END_NAMES = (EOD_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<eod>", "<EOD>", "<|eod|>", "[EOS]")


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    path: Path
    """The file that it was loaded from."""
    hash: str
    """sha256 of that file, in hexadecimal."""
    vocab_size: int
    """One more than the largest id that it can give; not padded."""
    eod_id: int
    """Ends a document. Never in the result of `encode`."""
    eod_token: str
    special_tokens: Mapping[str, int]
    """Tokens that no text becomes, by their spelling; the one for what is unknown is not among them."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int32, without special tokens at their ends."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give no text."""
        ...


def load_tokenizer(path: Path, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: tokenizer.json, tokenizer.model or a folder that holds one (the .json is taken where both are).
        eod_token: ends a document; None: the tokenizer's own end of text. `<|endoftext|>` is added to a tokenizer that
            lacks it, and is what None means where there is no end of text.

    Raises:
        ConfigError: nothing there, not a tokenizer, or no such token.
    """
    file = tokenizer_file(path)
    return SentencePieceTokenizer(file, eod_token) if file.suffix == ".model" else JsonTokenizer(file, eod_token)


def tokenizer_file(path: Path) -> Path:
    """The file that holds the tokenizer which `path` names."""
    path = path.expanduser()
    if path.is_dir():
        for name in FILE_NAMES:
            if (path / name).is_file():
                return path / name
        raise ConfigError(
            "data.tokenizer.path",
            str(path),
            f"holds neither {' nor '.join(FILE_NAMES)}",
            "a folder with one of them, or the file itself; transformers' AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...) writes a tokenizer.json for most tokenizers",
        )
    if not path.is_file():
        raise ConfigError(
            "data.tokenizer.path",
            str(path),
            "no such file or folder",
            "the path of a tokenizer.json, a tokenizer.model or a folder that holds one",
        )
    if path.suffix not in (".json", ".model"):
        raise ConfigError(
            "data.tokenizer.path",
            str(path),
            "a tokenizer is a .json or a .model file",
            "tokenizer.json (tokenizers) or tokenizer.model (sentencepiece)",
        )
    return path


def tokenizer_files(path: Path) -> list[Path]:
    """Every file that belongs to a tokenizer: what a checkpoint copies."""
    file = tokenizer_file(path)
    beside = (file.parent / name for name in (*CONFIG_NAMES, TEMPLATE_FILE))
    return [file, *(other for other in beside if other.is_file())]


class JsonTokenizer:
    """A tokenizer.json, through the `tokenizers` library."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        data = path.read_bytes()
        try:
            self._library: Any = Library.from_str(data.decode("utf-8"))
        except Exception as problem:  # `tokenizers` raises bare Exception
            raise ConfigError(
                "data.tokenizer.path",
                str(path),
                f"not a tokenizer.json: {problem}",
                "a file that `tokenizers` or transformers saved",
            ) from problem
        self.path, self.hash = path, hashlib.sha256(data).hexdigest()
        self.eod_token = eod_token or self._own_end() or EOD_TOKEN
        if self._library.token_to_id(self.eod_token) is None and self.eod_token != EOD_TOKEN:
            raise ConfigError(
                "data.tokenizer.eod_token",
                self.eod_token,
                f"no such token in {path}",
                self._own_end() or f"{EOD_TOKEN}, which is added where it is missing",
            )
        # Adds the token where there is none, and marks one that is there as special.
        self._library.add_special_tokens([AddedToken(self.eod_token, special=True, normalized=False)])
        self.eod_id: int = self._library.get_vocab(with_added_tokens=True)[self.eod_token]
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        # A tokenizer.json may ask to cut or pad what it encodes, and finds special tokens in text unless told not to.
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True
        added = self._library.get_added_tokens_decoder()
        unknown = _unknown_token(self._library.model, data)
        self.special_tokens: Mapping[str, int] = {
            token.content: number
            for number, token in sorted(added.items())
            if token.special and (token.content != unknown or number == self.eod_id)
        }
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(self.special_tokens.values())] = True
        self._spelled = re.compile(
            "|".join(re.escape(text) for text in sorted(self.special_tokens, key=len, reverse=True))
        )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int32, without special tokens at their ends."""
        results = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        encoded = [np.array(result.ids, dtype=np.int32) for result in results]
        for number, ids in enumerate(encoded):
            if self._is_special[ids].any():
                encoded[number] = self._encode_in_pieces(texts[number])
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give no text."""
        return str(self._library.decode([int(number) for number in ids], skip_special_tokens=True))

    def _encode_in_pieces(self, text: str) -> Ids:
        """Encode a text of which the vocabulary makes a special token: cut each spelling after its first letter."""
        cuts = [0, *(found.start() + 1 for found in self._spelled.finditer(text)), len(text)]
        parts = [text[begin:end] for begin, end in pairwise(cuts)]
        results = self._library.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.concatenate([np.array(result.ids, dtype=np.int32) for result in results])
        if self._is_special[ids].any():
            raise WorkError(
                "a text becomes a special token whatever is done",
                where=str(self.path),
                cure="take special tokens of one letter out of the tokenizer",
            )
        return ids

    def _own_end(self) -> str | None:
        """The end of text by the configuration beside the file, else by a telling name."""
        for name in CONFIG_NAMES:
            token = read_config(self.path.parent / name).get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
            if text and isinstance(text, str) and self._library.token_to_id(text) is not None:
                return text
        return next((name for name in _END_NAMES if self._library.token_to_id(name) is not None), None)


def _unknown_token(model: Any, data: bytes) -> str | None:
    """What becomes of unknown letters; the model of a Unigram tokenizer.json tells its number in the vocabulary."""
    if type(model).__name__ != "Unigram":
        return getattr(model, "unk_token", None)
    values = json.loads(data)["model"]
    number = values.get("unk_id")
    return None if number is None else str(values["vocab"][number][0])


def read_config(path: Path) -> dict[str, Any]:
    """A .json beside a tokenizer; empty where there is none.

    Raises:
        ConfigError: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (ValueError, RecursionError) as problem:
        raise ConfigError(
            "data.tokenizer.path",
            str(path),
            f"not a JSON object: {problem}",
            "the file as transformers saved it, or no file of that name beside the tokenizer",
        ) from problem
    return values


class SentencePieceTokenizer:
    """A tokenizer.model, through sentencepiece. In a text, its sign for a space (U+2581) becomes a space."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        import sentencepiece

        data = path.read_bytes()
        try:
            if not data:  # sentencepiece would take it for no argument, and fail later
                raise RuntimeError("the file is empty")
            self._library: Any = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as problem:
            raise ConfigError(
                "data.tokenizer.path",
                str(path),
                f"not a sentencepiece model: {problem}",
                "a tokenizer.model of sentencepiece (Llama 3's file of that name is another format: "
                "use its tokenizer.json)",
            ) from problem
        self.path, self.hash = path, hashlib.sha256(data).hexdigest()
        pieces = int(self._library.vocab_size())
        self.eod_id = self._find_end(eod_token)
        if self.eod_id < 0:
            self.eod_id, self.eod_token = pieces, EOD_TOKEN
        else:
            self.eod_token = str(self._library.id_to_piece(self.eod_id))
        self.vocab_size = max(pieces, self.eod_id + 1)
        controls = {self._library.id_to_piece(n): n for n in range(pieces) if self._library.is_control(n)}
        self.special_tokens: Mapping[str, int] = {**controls, self.eod_token: self.eod_id}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, int32, without special tokens at their ends."""
        encoded = [np.array(ids, dtype=np.int32) for ids in self._library.encode(list(texts), num_threads=-1)]
        for ids in encoded:
            if self.eod_id in ids:
                raise WorkError(
                    f"a text becomes the end-of-document token {self.eod_token!r}",
                    where=str(self.path),
                    cure="choose as eod_token a control token, which sentencepiece never finds in text",
                )
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens give no text."""
        return str(self._library.decode([int(number) for number in ids if number != self.eod_id]))

    def _find_end(self, eod_token: str | None) -> int:
        if eod_token is None:
            return int(self._library.eos_id())
        number = int(self._library.piece_to_id(eod_token))
        if self._library.id_to_piece(number) != eod_token:
            if eod_token == EOD_TOKEN:
                return -1
            raise ConfigError(
                "data.tokenizer.eod_token",
                eod_token,
                f"no such token in {self.path}",
                f"leave it out for the model's own end of text; {EOD_TOKEN} is added where it is missing",
            )
        return number
