"""Training a tokenizer on a corpus. Both kinds hold all 256 bytes, so that any text round-trips."""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from data.chat import CHATML, CHATML_TOKENS
from data.config import SMALLEST_VOCABULARY, TokenizerKind
from data.documents import Reading, read_documents
from data.tokenize_shard import content_fraction
from data.tokenizer import EOD_TOKEN, Tokenizer, load_tokenizer
from foundation.errors import ConfigError, RequestError
from foundation.files import whole_file, write_text

_SPECIAL_AND_BYTES = 3 + 256  # unknown, begin, end; then one piece a byte
_COVERAGE = 0.9995  # share of the letters that get their own piece; rare ones are spelled in bytes
_LONGEST_LINE = 1 << 24
TRAINING_BYTES = 128 << 20  # more text hardly changes a vocabulary
_PIECE_LETTERS = 1 << 16  # of what is sampled from a longer document


def train_tokenizer(
    texts: Iterable[str],
    kind: TokenizerKind,
    vocab_size: int,
    folder: Path,
    report: Callable[[str], None],
    *,
    chat: bool = False,
) -> Tokenizer:
    """Train a tokenizer and write it to `folder` (tokenizer.json or tokenizer.model, and tokenizer_config.json).

    The same texts give the same file.

    Args:
        texts: documents; read once, in this order.
        kind: byte-bpe (as GPT-2's) or sentencepiece (BPE with byte fallback, as Llama 2's, but texts begin without an
            added space and are not normalised, so that they come back as they were).
        vocab_size: entries, special ones included.
        report: takes lines for people.
        chat: with ChatML's marks as special tokens, and its template.

    Raises:
        ConfigError: vocab_size cannot hold the bytes and special tokens.
        RequestError: there is no text.
    """
    special = CHATML_TOKENS if chat else ()
    _refuse_too_few(vocab_size, kind, special)
    if kind == "byte-bpe":
        data, name = _train_byte_bpe(texts, vocab_size, special), "tokenizer.json"
        config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD_TOKEN}
    else:
        data, name = _train_sentencepiece(texts, vocab_size, special), "tokenizer.model"
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "legacy": False,
        }
    if chat:
        config["chat_template"] = CHATML
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    with whole_file(folder / name) as handle:
        handle.write(data)
    tokenizer = load_tokenizer(folder / name)
    if tokenizer.vocab_size < vocab_size:
        report(
            f"tokenizer: {vocab_size} entries were asked for; the corpus is too small for more than "
            f"{tokenizer.vocab_size}, the largest possible, which is what was trained"
        )
    else:
        report(f"tokenizer: trained {kind} with {tokenizer.vocab_size} entries")
    return tokenizer


def _refuse_too_few(vocab_size: int, kind: TokenizerKind, special: Sequence[str]) -> None:
    smallest = SMALLEST_VOCABULARY[kind] + len(special)
    if vocab_size < smallest:
        raise ConfigError(
            "--vocab-size",
            vocab_size,
            f"a {kind} tokenizer holds all 256 bytes and its special tokens: at least {smallest} entries",
            "--vocab-size 8192 for a small corpus, 32000 or more for a large one",
        )


def _train_byte_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> bytes:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts)
    library.train_from_iterator(counted, trainer)
    counted.refuse_none()
    return str(library.to_str(pretty=True)).encode("utf-8")


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> bytes:
    import sentencepiece

    # sentencepiece cannot train on NUL or on its own sign for a space.
    counted = _Counted(text.replace("\0", "").replace("\u2581", "") for text in texts)
    cleaned = list(counted)
    counted.refuse_none()
    # Lines, since sentencepiece leaves very long sentences out; cut at rare letters, which are spelled in bytes.
    rare = re.compile(f"[^{re.escape(_letters(cleaned, vocab_size))}]+")
    lines = [part for text in cleaned for line in text.splitlines(keepends=True) for part in rare.split(line) if part]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=_LONGEST_LINE,
        num_threads=os.cpu_count() or 1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        control_symbols=list(special),
        minloglevel=2,
    )
    return model.getvalue()


def _letters(texts: list[str], vocab_size: int) -> str:
    """Letters that get a piece: frequent ones, taking at most half of what the bytes leave of the vocabulary."""
    counts = Counter(letter for text in texts for letter in text)
    wanted, covered = _COVERAGE * counts.total(), 0
    chosen: list[str] = []
    for letter, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(chosen) == max(1, (vocab_size - _SPECIAL_AND_BYTES) // 2):
            break
        covered += count
        chosen.append(letter)
    return "".join(chosen)


def corpus_texts(
    readings: Sequence[Reading], text_key: str, held_out: float, report: Callable[[str], None]
) -> Iterator[str]:
    """The texts to train a tokenizer on: all that are not held out, or a part of a corpus that is very large.

    The part is chosen by content, so that it comes from all sources alike; of a long document it is pieces.

    Args:
        readings: the sources; they count what is met.
        text_key: key or column of the text.
        held_out: share of the documents that the validation set takes.
        report: takes lines for people.
    """
    files = [file for reading in readings for file in reading.source.files]
    size = sum(_text_bytes(file.path, part) for file in files for part in file.parts())
    share = min(1.0, TRAINING_BYTES / size) if size else 1.0
    if share < 1:
        report(f"tokenizer: about {size >> 20:,} MiB of text; trained on {share:.1%} of it, chosen by content")
    for reading in readings:
        for document in read_documents(reading, text_key):
            place = _fraction(document.text)
            if place >= held_out:
                yield from _sampled(document.text, (place - held_out) / (1 - held_out), share)


def _sampled(text: str, place: float, share: float) -> Iterator[str]:
    """A document, or nothing of it, by its place in [0, 1); of a long one about this share of its pieces."""
    if share >= 1 or len(text) <= _PIECE_LETTERS:
        if place < share:
            yield text
        return
    for begin in range(0, len(text), _PIECE_LETTERS):
        piece = text[begin : begin + _PIECE_LETTERS]
        if _fraction(f"{place} {begin} {piece}") < share:  # pieces of one content are apart by where they stand
            yield piece


def _fraction(text: str) -> float:
    return content_fraction(text.encode("utf-8", errors="surrogatepass"))


def _text_bytes(file: Path, part: Path) -> int:
    """About how much text a file holds."""
    compressed = file.suffix.lower() in (".gz", ".zst", ".parquet")
    return part.stat().st_size * (4 if compressed else 1)


class _Counted:
    """Passes texts on and remembers whether there was any letter in them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts, self._letters = texts, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self._letters += len(text)
            yield text

    def refuse_none(self) -> None:
        if not self._letters:
            raise RequestError(
                "there is no text to train a tokenizer on",
                rule="a tokenizer is learned from text",
                cure="name sources with text",
            )
