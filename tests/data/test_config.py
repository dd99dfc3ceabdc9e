"""The data section: what it refuses, by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from data.config import DataConfig, TokenizerConfig, check_files
from data.sources import find_source
from foundation.errors import ConfigError

BPE = TokenizerConfig(kind="byte-bpe", vocab_size=300)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"kind": "byte-bpe", "vocab_size": 300, "path": "x"},
        {"kind": "byte-bpe"},
        {"kind": "byte-bpe", "vocab_size": 200},
        {"kind": "sentencepiece", "vocab_size": 259},
        {"path": "x", "vocab_size": 300},
        {"kind": "byte-bpe", "vocab_size": 300, "eod_token": "</s>"},
    ],
)
def test_a_tokenizer_is_loaded_or_trained(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer"):
        TokenizerConfig.model_validate(wrong)


def test_weights_for_all_or_none() -> None:
    with pytest.raises(ConfigError, match=r"every source or to none"):
        DataConfig.model_validate({"sources": ["a.txt", {"path": "b.txt", "weight": 2}], "tokenizer": BPE})


@pytest.mark.parametrize(
    "wrong",
    [{"sources": []}, {"validation_fraction": 1.0}, {"sources": [{"path": "a", "weight": 0}]}, {"text_kye": "text"}],
)
def test_values_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"sources": ["a.txt"], "tokenizer": BPE, **wrong})


def test_missing_files_are_named(tmp_path: Path, corpus: Path) -> None:
    missing = tmp_path / "nothing.jsonl"
    with pytest.raises(ConfigError, match=r"nothing\.jsonl"):
        check_files(DataConfig(sources=(str(missing),), tokenizer=BPE))
    with pytest.raises(ConfigError, match=r"(?s)data\.validation_sources.*nothing\.jsonl"):
        check_files(DataConfig(sources=(str(corpus),), validation_sources=(str(missing),), tokenizer=BPE))
    with pytest.raises(ConfigError, match=r"(?s)data\.tokenizer\.path.*nothing\.jsonl"):
        check_files(DataConfig(sources=(str(corpus),), tokenizer=TokenizerConfig(path=missing)))
    check_files(DataConfig(sources=(str(corpus),), tokenizer=BPE))


def test_half_a_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"part\.idx is missing"):
        find_source(str(tmp_path / "part"))
    (tmp_path / "part.idx").write_bytes(b"")
    assert find_source(str(tmp_path / "part")).prefix == tmp_path / "part"
    with pytest.raises(ConfigError, match=r"without its ending"):
        find_source(str(tmp_path / "part.bin"))
    with pytest.raises(ConfigError, match=r"tokenised already"):
        check_files(DataConfig(sources=(str(tmp_path / "part"),), tokenizer=BPE))


def test_a_folder_is_its_readable_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", "notes.md", ".hidden.txt", "sub/.cache/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = find_source(str(tmp_path))
    names = [file.path.relative_to(tmp_path).as_posix() for file in source.files]
    assert names == ["a.jsonl", "b.txt", "sub/c.parquet"]
    assert [path.relative_to(tmp_path).as_posix() for path in source.ignored] == [
        ".hidden.txt",
        "notes.md",
        "sub/.cache",
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no file in this folder"):
        find_source(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"ending of notes\.md"):
        find_source(str(tmp_path / "notes.md"))


def test_links_are_followed_once_and_never_upwards(tmp_path: Path) -> None:
    for name in ("corp/a.txt", "real/b.txt", "real/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    corpus = tmp_path / "corp"
    for link, target in (("part", "../real"), ("twice", "../real"), ("up", ".."), ("z.txt", "../real/b.txt")):
        (corpus / link).symlink_to(target)
    (tmp_path / "real" / "round").symlink_to("../real")
    source = find_source(str(corpus))
    names = [file.path.relative_to(corpus).as_posix() for file in source.files]
    assert names == ["a.txt", "part/b.txt", "part/deep/c.txt", "z.txt"]
    assert [path.relative_to(corpus).as_posix() for path in source.ignored] == ["twice", "up", "part/round"]
    (corpus / "gone.txt").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"gone\.txt is no file"):
        find_source(str(corpus))


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x" * 300, "~no-such-person/corpus"):
        with pytest.raises(ConfigError, match="can look up"):
            find_source(name)
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.txt").write_bytes(b"x")
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*shut"):
        find_source(str(tmp_path))


def test_importing_the_section_stays_light() -> None:
    heavy = "{'torch', 'datasets', 'tokenizers', 'sentencepiece', 'numpy'}"
    code = f"import sys, data.config; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
