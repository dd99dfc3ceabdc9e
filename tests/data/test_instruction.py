"""Instruction sets, preference pairs and prompts: what is learned, what is left out, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.batches import MicroBatch
from data.chat import CHATML, ChatTemplate, load_chat_template
from data.instruction import Example, encode_completion, encode_row, read_examples
from data.order import permutation
from data.packing import PackedExamples, pack
from data.preferences import PairBatches, encode_pair, read_pairs
from data.prompts import prompt_numbers, read_prompts
from data.sources import find_source
from data.tokenizer import Tokenizer
from foundation.errors import RequestError
from tests.data.chat_tokenizers import chat_tokenizer
from tests.data.conftest import Lines

SEQ = 64


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def chat(tmp_path: Path, bpe: Tokenizer) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = chat_tokenizer(tmp_path / "chat", bpe, "chatml")
    return tokenizer, load_chat_template(tokenizer)


def test_a_prompt_and_its_completion(tokenizer: Tokenizer) -> None:
    example = encode_completion(tokenizer, "is it </s>", " that is it <|endoftext|>")
    before, after = tokenizer.encode(["is it </s>", " that is it <|endoftext|>"])
    assert example.tokens.tolist() == [*before, *after, tokenizer.eod_id]
    assert example.answer.tolist() == [False] * len(before) + [True] * (len(after) + 1)
    assert (example.tokens == tokenizer.eod_id).sum() == 1


TURN = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "on"}]
ROWS: list[Any] = [
    {"prompt": "is it", "completion": " on", "messages": None},
    {"prompt": None, "messages": [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "on"}]},
    {"prompt": [{"role": "user", "content": "is it"}], "completion": [{"role": "assistant", "content": "on"}]},
    {"prompt": [{"role": "user", "content": "is it"}], "completion": "on"},
    {"prompt": "x" * 500, "completion": "y"},
    {"messages": [{"role": "user", "content": "no answer"}]},
    "{broken",
    [1],
    {"prompt": "only"},
    {"messages": []},
    {"messages": [{"role": "user"}]},
    {"messages": "text"},
]


def test_rows_in_examples_out_and_why(tmp_path: Path, chat: tuple[Tokenizer, ChatTemplate], lines: Lines) -> None:
    source = find_source(str(write_rows(tmp_path / "a.jsonl", ROWS)))
    examples = list(read_examples([source], *chat, SEQ, lines))
    assert len(examples) == 4
    assert examples[1].tokens.tolist() == examples[2].tokens.tolist() == examples[3].tokens.tolist()
    assert lines.about("rows,").endswith("10 rows, 4 examples; left out: 6 bad, 1 too long, 1 without an answer")
    assert lines.about("a.jsonl:9").endswith("neither messages nor prompt and completion; keys here: prompt")
    with pytest.raises(RequestError, match=r"(?s)neither messages.*a\.jsonl:9"):
        list(read_examples([source], *chat, SEQ, lines, strict=True))
    with pytest.raises(RequestError, match="holds no example"):
        list(read_examples([find_source(str(write_rows(tmp_path / "b.jsonl", ROWS[5:])))], *chat, SEQ, lines))
    with pytest.raises(RequestError, match="no chat template"):
        encode_row(ROWS[1], chat[0], None)


def test_parquet_and_saved_datasets(tmp_path: Path, chat: tuple[Tokenizer, ChatTemplate], lines: Lines) -> None:
    from datasets import Dataset

    rows = Dataset.from_list(ROWS[1:2] * 3)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        assert len(list(read_examples([find_source(str(tmp_path / name))], *chat, SEQ, lines))) == 3
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(RequestError, match="plain text"):
        list(read_examples([find_source(str(tmp_path / "a.txt"))], *chat, SEQ, lines))


def some_examples(count: int, longest: int = SEQ + 1) -> list[Example]:
    chance = np.random.default_rng(2)
    examples = []
    for number in range(count):
        size = int(chance.integers(2, longest + 1))
        answer = np.arange(size) >= chance.integers(0, size)
        examples.append(Example((1000 * number + np.arange(size)).astype(np.int32), answer))
    return examples


@pytest.mark.parametrize("packed", [True, False])
def test_every_example_once_an_epoch_and_whole(packed: bool) -> None:
    examples = some_examples(200)
    rows = PackedExamples(examples, SEQ, 5, padding_id=7, packed=packed)
    for epoch in range(2):
        seen: list[int] = []
        for k in range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch):
            row, at = rows[k], 0
            numbers = rows.examples_of(k)
            assert sum(row.lengths) == SEQ == len(row.tokens)
            for number, length in zip(numbers, row.lengths, strict=False):
                example, part = examples[number], slice(at, at + length)
                assert row.tokens[part].tolist() == example.tokens[:-1].tolist()
                assert row.labels[part].tolist() == example.tokens[1:].tolist()
                assert row.loss_mask[part].tolist() == example.answer[1:].astype(float).tolist()
                assert row.position_ids[part].tolist() == list(range(length))
                at += length
            assert (row.tokens[at:] == 7).all() and not row.loss_mask[at:].any()
            assert len(row.lengths) == len(numbers) + (at < SEQ)
            seen += numbers
        assert sorted(seen) == list(range(200))
    orders = [[rows.examples_of(k + epoch * rows.rows_per_epoch) for k in range(20)] for epoch in range(2)]
    assert orders[0] != orders[1]
    again = PackedExamples(examples, SEQ, 5, padding_id=7, packed=packed)
    assert [again.examples_of(k) for k in range(20)] == orders[0]
    assert PackedExamples(examples, SEQ, 6, 7).packing != again.packing


def test_packing_is_tight_and_quick() -> None:
    chance = np.random.default_rng(0)
    lengths = np.clip(chance.lognormal(5.5, 0.8, 100_000).astype(int), 1, 4096)
    packing = pack(lengths.tolist(), 4096, seed=1)
    assert packing.filled > 0.99
    assert all(sum(lengths[number] for number in row) <= 4096 for row in packing.rows)
    assert pack([], 16, 0).rows == ()
    with pytest.raises(ValueError, match="do not go into rows of 16"):
        pack([17], 16, 0)


def test_batches_are_dealt_out_as_in_pretraining() -> None:
    rows = PackedExamples(some_examples(100), SEQ, 5, padding_id=7)
    whole = list(rows.micro_batches(3, 8, 2))
    shared: list[MicroBatch] = [
        batch
        for pair in zip(rows.micro_batches(3, 8, 2, 0, 2), rows.micro_batches(3, 8, 2, 1, 2), strict=True)
        for batch in pair
    ]
    assert [batch.tokens.tolist() for batch in shared] == [batch.tokens.tolist() for batch in whole]
    assert whole[0].tokens.tolist() == [rows[24].tokens.tolist(), rows[25].tokens.tolist()]
    assert whole[0].document_lengths == rows[24].lengths + rows[25].lengths
    assert whole[0].loss_mask.dtype == np.float32


PAIRS: list[Any] = [
    {"prompt": "is it", "chosen": " on", "rejected": " at all that"},
    {"prompt": [{"role": "user", "content": "is it"}], "chosen": "on", "rejected": "by"},
    {
        "chosen": [{"role": "user", "content": "is"}, {"role": "assistant", "content": "on"}],
        "rejected": [{"role": "user", "content": "is"}, {"role": "assistant", "content": "by <|im_end|>"}],
    },
    {"prompt": "a", "chosen": "same", "rejected": "same"},
    {"prompt": "a", "chosen": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c " * 100},
]


def test_preference_pairs(tmp_path: Path, chat: tuple[Tokenizer, ChatTemplate], lines: Lines) -> None:
    source = find_source(str(write_rows(tmp_path / "pairs.jsonl", PAIRS)))
    pairs = list(read_pairs([source], *chat, SEQ, lines))
    assert len(pairs) == 3 and lines.about("rows,").endswith("6 rows, 3 pairs; left out: 2 bad, 1 too long")
    batches = PairBatches(pairs, SEQ, seed=3, padding_id=9, fixed=False)
    batch = batches.collate(pairs)
    assert batch.tokens.shape == batch.labels.shape == batch.answer_mask.shape == (6, max(batch.lengths))
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    for row, side in enumerate(sides):
        size = len(side.tokens)
        assert batch.lengths[row] == size
        assert batch.tokens[row].tolist() == [*side.tokens.tolist(), *[9] * (batch.tokens.shape[1] - size)]
        assert batch.labels[row, : size - 1].tolist() == side.tokens[1:].tolist()
        assert batch.answer_mask[row].sum() == side.answer[1:].sum()
        assert (batch.labels[row][batch.answer_mask[row] == 1] == side.tokens[side.answer]).all()
    fixed = list(PairBatches(pairs, SEQ, 3, 9).micro_batches(0, 2, 1, 0, 2))
    assert [batch.tokens.shape for batch in fixed] == [(2, SEQ)]
    order = [batches.number_of(k) for k in range(6)]
    assert sorted(order[:3]) == sorted(order[3:]) == [0, 1, 2]


def test_an_epoch_of_pairs_is_shuffled_once(
    chat: tuple[Tokenizer, ChatTemplate], monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled: list[tuple[int, ...]] = []

    def counted(count: int, *key: int) -> Any:
        shuffled.append(key)
        return permutation(count, *key)

    monkeypatch.setattr("data.preferences.permutation", counted)
    pair = encode_pair({"prompt": None, "chosen": [*TURN, TURN[1]], "rejected": TURN}, *chat)
    batches = PairBatches([pair] * 50, SEQ, seed=3, padding_id=9)
    order = [batches.number_of(k) for k in (*range(100), 0)]
    assert shuffled == [(3, 0), (3, 1), (3, 0)] and order[-1] == order[0]
    assert order[:50] == permutation(50, 3, 0).tolist() and order[50:100] == permutation(50, 3, 1).tolist()


def test_prompts(tmp_path: Path, chat: tuple[Tokenizer, ChatTemplate], lines: Lines) -> None:
    tokenizer, template = chat
    rows: list[Any] = [
        {"prompt": "is it", "answer": 42, "messages": None},
        {"prompt": None, "messages": [{"role": "user", "content": "is it"}], "task": "yes"},
        {"prompt": ""},
        {"question": "x"},
        {"prompt": "x " * 100},
    ]
    source = find_source(str(write_rows(tmp_path / "prompts.jsonl", rows)))
    prompts = list(read_prompts([source], tokenizer, template, 20, lines))
    assert [(prompt.text, prompt.fields) for prompt in prompts] == [
        ("is it", {"answer": 42}),
        ("is it", {"task": "yes"}),
    ]
    assert prompts[0].tokens.tolist() == tokenizer.encode(["is it"])[0].tolist()
    assert prompts[1].tokens.tolist() == template.encode_prompt([{"role": "user", "content": "is it"}]).tolist()
    assert lines.about("rows,").endswith("5 rows, 2 prompts; left out: 2 bad, 1 too long")


def test_prompts_come_round() -> None:
    numbers = prompt_numbers(7, 0, 21, seed=4)
    assert [sorted(numbers[epoch * 7 : epoch * 7 + 7]) for epoch in range(3)] == [list(range(7))] * 3
    assert numbers[:7] != numbers[7:14]
    assert prompt_numbers(7, 5, 11, seed=4) == numbers[5:16]


def test_chatml_needs_no_special_tokens(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(CHATML, tokenizer)
    example = encode_row(ROWS[1], tokenizer, template)
    assert tokenizer.decode(example.tokens).count("<|im_end|>") == 2 and example.answer.any()
