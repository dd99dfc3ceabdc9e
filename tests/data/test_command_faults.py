"""`orthant data` on damaged files and odd requests: one message each."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data.indexed import IndexedTokens
from data.manifest import read_manifest
from data.tokenize import tokenize
from data.tokenizer import Tokenizer
from foundation.errors import ConfigError, RequestError, WorkError
from tests.data.conftest import some_texts, write_jsonl
from tests.data.test_commands import orthant_data
from tests.data.test_tokenize import job


@pytest.fixture
def tokens(tmp_path: Path, corpus: Path, bpe: Tokenizer) -> Path:
    tokenize(job(corpus, bpe, tmp_path / "corpus"), lambda _: None)
    return tmp_path / "corpus"


def test_a_manifest_of_random_bytes(tokens: Path, bpe: Tokenizer) -> None:
    for content in (bytes(range(256)), b"[" * 100_000):
        tokens.with_suffix(".json").write_bytes(content)
        done = orthant_data("verify", tokens, "--json")
        assert done.exit_code == 3 and "not a manifest" in json.loads(done.stdout)["differences"][0]
        for words in (("inspect", tokens), ("show", tokens, 1, "--tokenizer", bpe.path)):
            assert isinstance(orthant_data(*words).exception, WorkError)


def test_a_document_beyond_the_end_of_the_bin(tokens: Path, bpe: Tokenizer) -> None:
    os.truncate(tokens.with_suffix(".bin"), 1001)
    done = orthant_data("show", tokens, 398, "--tokenizer", bpe.path)
    assert isinstance(done.exception, WorkError) and "lies outside the .bin of 1001 bytes" in str(done.exception)


def test_a_prefix_with_an_ending(tokens: Path) -> None:
    done = orthant_data("inspect", tokens.with_suffix(".bin"))
    assert isinstance(done.exception, RequestError) and f"name the prefix, {tokens}, without" in str(done.exception)


def test_a_source_whose_name_is_not_utf_8(tmp_path: Path, bpe: Tokenizer) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    source = write_jsonl(tmp_path / name, some_texts(20))
    source.write_bytes(source.read_bytes() + b"{\n")
    done = orthant_data("tokenize", source, "--tokenizer", bpe.path, "--out", tmp_path / "t")
    assert done.exit_code == 0, done.exception
    manifest = read_manifest(tmp_path / "t")
    assert manifest is not None and manifest.sources[0].files[0].path.endswith(name)
    (bad,) = (tmp_path / "t.bad_lines.jsonl").read_text().splitlines()
    assert json.loads(bad)["file"].endswith(name)


def test_a_shard_size_without_end(tmp_path: Path, corpus: Path, bpe: Tokenizer) -> None:
    words = ("tokenize", corpus, "--tokenizer", bpe.path, "--out", tmp_path / "t", "--shard-mib", "inf")
    assert isinstance(orthant_data(*words).exception, ConfigError)


def test_what_was_written_as_json(tmp_path: Path, corpus: Path) -> None:
    trained = orthant_data("tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 300, "--json")
    told = json.loads(trained.stdout)
    assert told["vocab_size"] == 300 and told["path"] == str(tmp_path / "tok" / "tokenizer.json")
    words = ["tokenize", corpus, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "t", "--json"]
    share = json.loads(orthant_data(*words, "--share", "0/1").stdout)
    assert share == {"prefix": str(tmp_path / "t"), "share": "0/1"}
    told = json.loads(orthant_data(*words).stdout)
    assert (told["prefix"], told["documents"]) == (str(tmp_path / "t"), 400)
    assert told["tokens"] == IndexedTokens(tmp_path / "t").tokens
    merged = orthant_data("merge", tmp_path / "t", tmp_path / "t", "--out", tmp_path / "m", "--json")
    assert json.loads(merged.stdout)["documents"] == 800
