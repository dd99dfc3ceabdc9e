"""Tokenising: the bytes that core writes from the reference's numbers, however the work is cut and shared."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.encoding import HARD_TEXTS, FastPathDiffers, GigatokenEncoder
from data.index_check import check_token_file
from data.indexed import IndexedTokens
from data.inspection import read_document
from data.manifest import Manifest, read_manifest
from data.sources import Source, find_source
from data.tokenize import Share, Tokenization, tokenize
from data.tokenize_shard import is_held_out
from data.tokenizer import Tokenizer
from foundation.errors import RequestError, WorkError
from tests.data.conftest import Lines, some_texts, write_jsonl

ROOT = Path(__file__).parents[2]


def hard_corpus(folder: Path, tokenizer: Tokenizer) -> tuple[Path, list[str]]:
    """1,250 documents with everything that goes wrong in corpora, and lines that hold none; and its texts."""
    chance = random.Random(5)
    names = [*tokenizer.special_tokens, "</s>", "<s>", "<unk>", "<|endoftext|>", "<|im_start|>"]
    texts = [*some_texts(1000, seed=9), *HARD_TEXTS]
    texts += [f"{a} {name}{name} the {b}{name}" for name in names for a in ("", "x") for b in ("", "\n")]
    texts += ["".join(chance.choices("a é日😀\0\n<|/s>", k=chance.randint(0, 80))) for _ in range(200)]
    texts.append("The line of five million letters. " * 150_000)
    chance.shuffle(texts)
    lines = [json.dumps({"text": text}, ensure_ascii=number % 2 == 0).encode() for number, text in enumerate(texts)]
    bad = [b'{"text": "\xff\xfe"}', b'{"text": "\\ud800"}', b'{"body": "x"}', b"[1]", b"{", b'{"text": null}']
    for number, line in enumerate(bad):
        lines.insert(100 * number + 50, line)
    path = folder / "hard.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, texts


def references_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """From the libraries, not through our classes."""
    if tokenizer.path.suffix == ".model":
        import sentencepiece

        return list(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode(list(texts)))
    from tokenizers import Tokenizer as Library

    library: Any = Library.from_file(str(tokenizer.path))
    library.encode_special_tokens = True
    return [result.ids for result in library.encode_batch(list(texts), add_special_tokens=False)]


def job(path: Path, tokenizer: Tokenizer, prefix: Path, **options: Any) -> Tokenization:
    return Tokenization((find_source(str(path)),), tokenizer, "text", prefix, **options)


def test_the_files_are_those_that_core_writes(tmp_path: Path, tokenizer: Tokenizer, lines: Lines) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    path, texts = hard_corpus(tmp_path, tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "core.bin"), dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for ids in references_ids(tokenizer, texts):
        if ids:
            builder.add_item(torch.tensor([*ids, tokenizer.eod_id]))
        builder.end_document()
    builder.finalize(str(tmp_path / "core.idx"))
    (manifest,) = tokenize(job(path, tokenizer, tmp_path / "ours"), lines)
    assert any("by gigatoken" in line for line in lines)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"core{ending}").read_bytes()
    assert check_token_file(tmp_path / "ours") == []
    assert manifest.documents == len(texts) > 1200 and manifest.documents - manifest.sequences > 100
    assert manifest.sources[0].bad_lines == 6
    (file,) = manifest.sources[0].files
    assert file.sha256 == (hashlib.sha256(path.read_bytes()).hexdigest(),) and file.bytes == path.stat().st_size
    assert len(IndexedDataset(str(tmp_path / "ours"))) == manifest.sequences
    spaced = str.maketrans("\u2581", " ") if tokenizer.path.suffix == ".model" else {}
    for number, text in enumerate(texts):
        assert tokenizer.decode(read_document(tmp_path / "ours", number, tokenizer)) == text.translate(spaced)


def test_cores_gpt_dataset_reads_them(tmp_path: Path, corpus: Path, bpe: Tokenizer) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    (manifest,) = tokenize(job(corpus, bpe, tmp_path / "t"), lambda _: None)

    named = SimpleNamespace(
        unique_identifiers={"name": "bpe"}, eod=bpe.eod_id, pad=bpe.eod_id, vocab_size=bpe.vocab_size
    )
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([str(tmp_path / "t")], None),
        split="100,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=named,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
    )
    low = IndexedDataset(str(tmp_path / "t"))
    dataset = GPTDataset(low, str(tmp_path / "t"), np.arange(len(low), dtype=np.int32), 10, Split.train, config)
    assert len(dataset[0]["tokens"]) == 64 and len(dataset) >= 10
    assert manifest.tokens == sum(map(int, low.sequence_lengths))


@pytest.mark.parametrize("shard_bytes", [1000, 9973, 1 << 30])
def test_however_the_work_is_cut(tmp_path: Path, bpe: Tokenizer, corpus: Path, lines: Lines, shard_bytes: int) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(corpus.read_bytes() + b"bad\n\n" + corpus.read_bytes()[:-1])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes()))
    (folder / "a.txt").write_text("one\ftwo")
    write_jsonl(folder / "d.jsonl", ["small"])
    whole = tokenize(job(folder, bpe, tmp_path / "whole"), lambda _: None)[0]
    cut = tokenize(job(folder, bpe, tmp_path / "cut", shard_bytes=shard_bytes), lines)[0]
    for ending in (".bin", ".idx", ".bad_lines.jsonl"):
        assert Path(f"{tmp_path / 'cut'}{ending}").read_bytes() == Path(f"{tmp_path / 'whole'}{ending}").read_bytes()
    assert any("b.jsonl:401: not JSON" in line for line in lines)
    assert lines.about("documents from") == f"{folder}: 1,203 documents from 4 files; 1 bad lines, 1 blank ones"
    assert [(file.path, file.bytes) for file in cut.sources[0].files] == [
        (file.path, file.bytes) for file in whole.sources[0].files
    ]
    assert (cut.documents, cut.bin_sha256, cut.idx_sha256) == (1203, whole.bin_sha256, whole.idx_sha256)
    assert cut.unigram_entropy == whole.unigram_entropy
    assert not list(tmp_path.glob(".*"))


def bytes_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx", ".json")]


def test_processes_and_tasks_share_the_work(tmp_path: Path, bpe: Tokenizer, corpus: Path, lines: Lines) -> None:
    """Two worker processes, and three tasks in some order with the joining after them, write what one process does."""
    options = {"held_out_fraction": 0.3, "shard_bytes": 20_000}
    alone = job(corpus, bpe, tmp_path / "alone", held_out_prefix=tmp_path / "alone_held", **options)
    tokenize(alone, lines)
    texts = some_texts(400)
    assert IndexedTokens(alone.prefixes[1]).documents == sum(is_held_out(text, 0.3) for text in texts) > 50
    workers = job(corpus, bpe, tmp_path / "workers", held_out_prefix=tmp_path / "workers_held", **options)
    tokenize(workers, lines, workers=2)
    tasks = job(corpus, bpe, tmp_path / "tasks", held_out_prefix=tmp_path / "tasks_held", **options)
    for task in (2, 0, 1):
        assert tokenize(tasks, lines, share=Share(task, 3)) == []
    assert not list(tmp_path.glob("tasks*"))
    lines.clear()
    tokenize(tasks, lines)
    assert "3 of 3 shards are there already" in lines[0] and "gigatoken" not in " ".join(lines)
    for one, two, three in zip(alone.prefixes, workers.prefixes, tasks.prefixes, strict=True):
        assert bytes_of(one) == bytes_of(two) == bytes_of(three)


ABANDONED = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from data.tokenize_shard import begin_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), begin_worker, (1, os.getpid()))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """A worker that lived on would hold standard output open: communicate would wait for it."""
    (tmp_path / "abandoned.py").write_text(ABANDONED)
    command = [sys.executable, str(tmp_path / "abandoned.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        said, _ = process.communicate(timeout=300)
    assert int(said) > 0 and process.returncode == -signal.SIGKILL


def test_another_state_of_the_sources_begins_anew(tmp_path: Path, bpe: Tokenizer, lines: Lines) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    tokenize(job(path, bpe, tmp_path / "t"), lines, share=Share(0, 1))
    write_jsonl(path, some_texts(50, seed=1))
    lines.clear()
    (manifest,) = tokenize(job(path, bpe, tmp_path / "t"), lines)
    assert not any("there already" in line for line in lines)
    expected = tokenize(job(path, bpe, tmp_path / "other"), lines)[0]
    assert manifest.bin_sha256 == expected.bin_sha256


@pytest.mark.parametrize("ending", ["json", "train.bin", "train.idx", "train.json"])
def test_a_damaged_shard_is_done_again(tmp_path: Path, bpe: Tokenizer, lines: Lines, ending: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    expected = tokenize(job(path, bpe, tmp_path / "whole"), lines)[0]
    tokenize(job(path, bpe, tmp_path / "t"), lines, share=Share(0, 1))
    (damaged,) = tmp_path.glob(f".t.parts/*/000000.{ending}")
    if ending.endswith("idx"):
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:-10])
    assert tokenize(job(path, bpe, tmp_path / "t"), lines)[0].bin_sha256 == expected.bin_sha256
    assert check_token_file(tmp_path / "t") == []


def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    real = GigatokenEncoder.encode

    def encode(self: GigatokenEncoder, texts: Sequence[str]) -> Any:
        with open(path, "a") as handle:
            handle.write("\n")
        return real(self, texts)

    monkeypatch.setattr(GigatokenEncoder, "encode", encode)
    with pytest.raises(WorkError, match="changed while it was read"):
        tokenize(job(path, bpe, tmp_path / "t"), lines)
    assert not list(tmp_path.glob("t.*")) and not list(tmp_path.rglob("*.idx"))


def test_a_fast_path_that_errs_on_the_way(
    tmp_path: Path, bpe: Tokenizer, corpus: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines
) -> None:
    """What it had finished is done again too."""
    real, calls = GigatokenEncoder.encode, []

    def encode(self: GigatokenEncoder, texts: Sequence[str]) -> Any:
        calls.append(texts)
        if len(calls) == 3:
            raise FastPathDiffers("other tokens for 'x'")
        encoded = real(self, texts)
        if len(calls) == 2:
            encoded.tokens[:] = 5
        return encoded

    expected = tokenize(job(corpus, bpe, tmp_path / "whole"), lines)[0]
    monkeypatch.setattr(GigatokenEncoder, "encode", encode)
    # One process however many cores there are: others would not have the encoder that errs.
    found = tokenize(job(corpus, bpe, tmp_path / "t", shard_bytes=20_000), lines, workers=1)[0]
    assert len(calls) == 3 and lines.about("done again by the reference")
    assert found.bin_sha256 == expected.bin_sha256


def test_strict_refuses_bad_lines(tmp_path: Path, bpe: Tokenizer, lines: Lines) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(RequestError, match=r"(?s)1 lines hold no document.*a\.jsonl:51: not JSON"):
        tokenize(job(path, bpe, tmp_path / "t", strict=True), lines)
    assert not list(tmp_path.glob("t.*"))
    assert tokenize(job(path, bpe, tmp_path / "t"), lines)[0].documents == 50


def test_no_document_at_all(tmp_path: Path, bpe: Tokenizer, lines: Lines) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n\n")
    with pytest.raises(RequestError, match="holds no document: 1 bad lines, 1 blank ones"):
        tokenize(job(tmp_path / "a.jsonl", bpe, tmp_path / "t"), lines)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_old_manifest_is_still_read(tmp_path: Path, bpe: Tokenizer, corpus: Path) -> None:
    """One written before the files of a source were recorded."""
    (manifest,) = tokenize(job(corpus, bpe, tmp_path / "t"), lambda _: None)
    values = json.loads(manifest.to_json())
    del values["sources"][0]["files"]
    (tmp_path / "t.json").write_text(json.dumps(values))
    old = read_manifest(tmp_path / "t")
    assert isinstance(old, Manifest) and old.sources[0].files == () and old.sources[0].documents == 400


def test_sources_are_recorded_apart(tmp_path: Path, bpe: Tokenizer, corpus: Path) -> None:
    sources = tuple(find_source(str(path)) for path in (corpus, write_jsonl(tmp_path / "b.jsonl", ["one", "two"])))
    (manifest,) = tokenize(Tokenization(sources, bpe, "text", tmp_path / "t"), lambda _: None)
    assert [record.documents for record in manifest.sources] == [400, 2]
    assert isinstance(sources[0], Source) and manifest.sources[1].name.endswith("b.jsonl")


def test_a_saved_dataset_is_never_cut(tmp_path: Path, bpe: Tokenizer) -> None:
    """Whatever its folder is called."""
    from datasets import Dataset

    Dataset.from_dict({"text": some_texts(300)}).save_to_disk(str(tmp_path / "ds.jsonl"))
    found = tokenize(job(tmp_path / "ds.jsonl", bpe, tmp_path / "t", shard_bytes=5_000), lambda _: None)
    assert found[0].documents == 300
