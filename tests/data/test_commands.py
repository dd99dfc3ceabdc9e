"""`orthant data ...`: names, files, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from data.sources import DEMO, demo_folder
from foundation.errors import RequestError
from launch.commands.data import app
from tests.data.conftest import some_texts, write_jsonl


def orthant_data(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A token file written by the commands."""
    folder = tmp_path_factory.mktemp("commands")
    trained = orthant_data("tokenizer", corpus, "--out", folder / "tok", "--vocab-size", 300)
    assert trained.exit_code == 0, trained.output
    written = orthant_data("tokenize", corpus, "--tokenizer", folder / "tok", "--out", folder / "tokens.v1/corpus")
    assert written.exit_code == 0, written.output
    return folder / "tokens.v1" / "corpus"


def test_files_are_written_and_whole(tokens: Path) -> None:
    assert sorted(path.name for path in tokens.parent.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]
    assert orthant_data("verify", tokens).exit_code == 0
    shown = orthant_data("inspect", tokens, "--json")
    facts = json.loads(shown.stdout)
    assert (facts["documents"], facts["empty_documents"], facts["vocab_size"]) == (400, 40, 300)
    assert facts["tokens"] * 2 == (tokens.parent / "corpus.bin").stat().st_size
    assert "documents" in orthant_data("inspect", tokens).stdout


@pytest.mark.parametrize(("kind", "name"), [("sentencepiece", "tokenizer.model"), ("byte-bpe", "tokenizer.json")])
def test_a_tokenizer_for_a_small_corpus(tmp_path: Path, corpus: Path, kind: str, name: str) -> None:
    done = orthant_data("tokenizer", corpus, "--out", tmp_path, "--vocab-size", 50_000, "--kind", kind)
    assert done.exit_code == 0
    assert "largest possible" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "tokenizer_config.json"])
    other = {"sentencepiece": "byte-bpe", "byte-bpe": "sentencepiece"}[kind]
    again = orthant_data("tokenizer", corpus, "--out", tmp_path, "--vocab-size", 300, "--kind", other)
    assert isinstance(again.exception, RequestError) and "is there already" in str(again.exception)


def test_a_document_is_shown(tokens: Path) -> None:
    tokenizer = tokens.parents[1] / "tok"
    texts = some_texts(400)
    for number in (0, 9, 399):  # 9 is empty
        assert orthant_data("show", tokens, number, "--tokenizer", tokenizer).stdout == texts[number] + "\n"
    shown = json.loads(orthant_data("show", tokens, 3, "--tokenizer", tokenizer, "--json").stdout)
    assert shown["text"] == texts[3] and shown["ids"][-1] == 0
    ids = orthant_data("show", tokens, 3, "--tokenizer", tokenizer, "--ids").stdout
    assert list(map(int, ids.split())) == shown["ids"]
    missing = orthant_data("show", tokens, 400, "--tokenizer", tokenizer)
    assert isinstance(missing.exception, RequestError) and "no document 400" in str(missing.exception)


def test_token_files_are_merged(tmp_path: Path, tokens: Path) -> None:
    assert orthant_data("merge", tokens, tokens, "--out", tmp_path / "twice").exit_code == 0
    assert (tmp_path / "twice.bin").read_bytes() == (tokens.parent / "corpus.bin").read_bytes() * 2
    assert orthant_data("verify", tmp_path / "twice").exit_code == 0
    for words in ((tokens, "--out", tokens), (tmp_path / "none", "--out", tmp_path / "t")):
        assert isinstance(orthant_data("merge", *words).exception, RequestError)


def test_a_run_is_indexed_ahead_of_time(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.samples._WORTH_A_FILE", 0)
    sections = {
        "run": {"folder": str(tmp_path / "run")},
        "data": {"sources": [str(corpus)], "tokenizer": {"kind": "byte-bpe", "vocab_size": 300}},
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        },
        "training": {"seq_length": 32, "global_batch_size": 4, "train_steps": 150},
        "optimizer": {"lr": 1e-3},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(sections))
    done = orthant_data("index", tmp_path / "run.yaml", "training.train_steps=200", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    plan = json.loads(done.stdout)
    assert plan["samples"] == 800 and plan["sources"][0]["epochs"] > 1
    assert len(list((tmp_path / "run" / "data").glob("*/order/*.order"))) >= 2
    again = orthant_data("index", tmp_path / "run.yaml", "training.train_steps=200", "--json")
    assert json.loads(again.stdout) == plan and "as prepared before" in again.stderr
    for wrong in ("/proc/x/y", str(tmp_path / "run.yaml"), str(tmp_path / "run.yaml" / "run"), "x" * 300):
        refused = orthant_data("index", tmp_path / "run.yaml", f"run.folder={wrong}")
        assert isinstance(refused.exception, RequestError) and "run.folder" in str(refused.exception)


def test_damage_exits_with_3(tmp_path: Path, tokens: Path) -> None:
    for path in tokens.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "corpus.bin").read_bytes())
    data[1000] ^= 1
    (tmp_path / "corpus.bin").write_bytes(data)
    done = orthant_data("verify", tmp_path / "corpus", "--json")
    assert done.exit_code == 3
    report = json.loads(done.stdout)
    assert report["ok"] is False and "sha256" in report["differences"][0]


def test_wrong_requests(tmp_path: Path, tokens: Path, corpus: Path) -> None:
    tokenizer = tokens.parents[1] / "tok"
    for words in (
        ("verify", tmp_path / "none"),
        ("inspect", tmp_path / "none"),
        ("tokenize", tmp_path / "none.jsonl", "--tokenizer", tokenizer, "--out", tmp_path / "t"),
        ("tokenize", corpus, "--tokenizer", tmp_path / "none", "--out", tmp_path / "t"),
        ("tokenize", tokens, "--tokenizer", tokenizer, "--out", tmp_path / "t"),
        ("tokenize", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "t.bin"),
        ("tokenize", corpus, "--tokenizer", tokenizer, "--out", tmp_path),
        ("tokenize", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "t", "--text-key", "body"),
        ("tokenizer", corpus, "--out", tmp_path / "tok", "--vocab-size", 3),
        ("tokenize", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "t", "--share", "2/2"),
        ("tokenize", corpus, "--tokenizer", tokenizer, "--out", tmp_path / "t", "--share", "half"),
    ):
        done = orthant_data(*words)
        assert isinstance(done.exception, RequestError), (words, done.output)
        assert done.exception.exit_code == 2
    assert orthant_data("tokenize", corpus).exit_code == 2
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
import data.tokenize
from launch.commands.data import app
real, calls = data.tokenize.write_shard, []
def deadly(*args):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
data.tokenize.write_shard = deadly
app(sys.argv[1:])
"""


def test_killed_while_tokenising(tmp_path: Path, tokens: Path) -> None:
    """Killed in the third of four shards; then the same command again. How it is cut does not matter."""
    source = write_jsonl(tmp_path / "a.jsonl", some_texts(14_000, longest=130))
    tokenizer = tokens.parents[1] / "tok"
    assert orthant_data("tokenize", source, "--tokenizer", tokenizer, "--out", tmp_path / "whole/t").exit_code == 0
    words = ["tokenize", str(source), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "killed/t")]
    words += ["--shard-mib", "1", "--workers", "1"]  # however many cores there are: the one that is killed
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".t.parts"]
    assert isinstance(orthant_data("verify", tmp_path / "killed/t").exception, RequestError)
    again = orthant_data(*words)
    assert again.exit_code == 0 and "2 of 4 shards are there already" in again.stderr, again.stderr
    names = ["t.bin", "t.idx", "t.json"]
    for folder in ("whole", "killed"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names[:2]:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_demo_corpus_is_prose_of_three_megabytes(tmp_path: Path) -> None:
    from data.documents import Reading, read_documents
    from data.sources import find_source

    reading = Reading(find_source(DEMO))
    texts = [document.text for document in read_documents(reading, "text")]
    assert reading.bad_lines == reading.blank_lines == 0
    assert len(texts) == len(set(texts)) == 525
    assert 2.9e6 < sum(len(text.encode()) for text in texts) < 3.3e6
    assert all("<p" not in text and "\r" not in text and min(map(len, text.split("\n\n"))) >= 80 for text in texts)
    paragraphs = [part for text in texts for part in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    parts = sorted(path.name.removesuffix(".jsonl.gz") for path in demo_folder().iterdir())
    licences = demo_folder().parent / "licences"
    assert all((licences / f"{part}.txt").stat().st_size > 500 for part in parts) and len(parts) == 3
