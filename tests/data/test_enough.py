"""A corpus too small for one sample is refused before any rank starts, and the cure that is named works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.config import DataConfig, check_files
from data.enough import check_prepared
from data.prepare import prepare
from foundation.errors import ConfigError
from launch.cli import main
from tests.data.conftest import Lines, some_texts, write_jsonl
from tests.launch.test_requests import BASE

BPE = {"kind": "byte-bpe", "vocab_size": 300}
SEQ = 64


def held_out(config: DataConfig, folder: Path, lines: Lines) -> ConfigError | None:
    """What is said against evaluating on what a corpus holds out."""
    try:
        check_prepared(prepare(config, folder, SEQ, lines), config, SEQ, "validation")
    except ConfigError as error:
        return error
    return None


def section(source: Path, **others: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": [str(source)], "tokenizer": BPE, **others})


@pytest.mark.parametrize("fraction", [1e-9, 0.005])
def test_too_little_held_out_names_what_helps(fraction: float, tmp_path: Path, lines: Lines) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(300))
    error = held_out(section(corpus, validation_fraction=fraction), tmp_path / "out", lines)
    assert error is not None and error.field == "data.validation_fraction" and error.cure is not None
    assert "one sample takes training.seq_length + 1 = 65" in (error.rule or "")
    assert "data.validation_sources=[held_out.jsonl]" in error.cure and "evaluation.interval=null" in error.cure
    proposed = re.search(r"data\.validation_fraction=([\d.]+)", error.cure)
    assert proposed is not None
    assert held_out(section(corpus, validation_fraction=float(proposed[1])), tmp_path / "out", lines) is None


def test_one_document_cannot_be_shared(tmp_path: Path, lines: Lines) -> None:
    (tmp_path / "a.txt").write_text("A long text without an end. " * 200)
    error = held_out(section(tmp_path / "a.txt", validation_fraction=0.02), tmp_path / "out", lines)
    assert error is not None and error.cure == "data.validation_sources=[held_out.jsonl], or evaluation.interval=null"


def test_small_validation_sources_are_named_themselves(tmp_path: Path, lines: Lines) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(300))
    (tmp_path / "b.txt").write_text("Short.")
    error = held_out(section(corpus, validation_sources=[str(tmp_path / "b.txt")]), tmp_path / "out", lines)
    assert error is not None and error.field == "data.validation_sources"
    assert error.cure is not None and error.cure.startswith("more text in it, training.seq_length=")


def test_too_little_to_train_on_names_the_share_that_is_held_out(tmp_path: Path, lines: Lines) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    with pytest.raises(ConfigError, match=r"or a data.validation_fraction below 0.3$"):
        prepare(section(corpus, validation_fraction=0.3), tmp_path / "out", 4096, lines)


def test_a_token_file_too_small_is_refused_by_its_size(tmp_path: Path, lines: Lines) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    prepared = prepare(section(corpus, validation_fraction=0.0), tmp_path / "out", SEQ, lines)
    config = section(Path(prepared.train_prefixes[0]), tokenizer={"path": prepared.tokenizer_path})
    check_files(config, SEQ)
    with pytest.raises(ConfigError, match=r"one sample takes training.seq_length \+ 1 = 100,001") as refused:
        check_files(config, 100_000)
    assert refused.value.field == "data.sources"


def test_an_evaluation_without_documents_is_refused_before_ranks_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[object] = []
    monkeypatch.setattr("launch.commands.train.run_ranks", lambda *words, **named: started.append(words))
    (tmp_path / "corpus.txt").write_text("A corpus of one document. " * 100)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    assert main(["train", "run.yaml", "evaluation.interval=10"]) == 2
    assert "data.validation_fraction = 0.02 is refused" in capsys.readouterr().err and not started
    assert main(["train", "run.yaml"]) == 0 and len(started) == 1
