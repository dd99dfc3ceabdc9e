"""Preparing a corpus: held out by content, reused while nothing changed, never stale, whole after a kill."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.index_check import check_token_file
from data.indexed import IndexedTokens
from data.manifest import read_manifest
from data.prepare import prepare
from data.prepared import PreparedData
from data.samples import open_samples
from data.tokenize_shard import is_held_out
from data.tokenizer import Tokenizer, load_tokenizer
from data.tokenizer_training import train_tokenizer
from foundation.errors import ConfigError, WorkError
from tests.data.conftest import Lines, some_texts, write_jsonl

BPE = {"kind": "byte-bpe", "vocab_size": 300}


def section(*sources: object, **others: object) -> DataConfig:
    return DataConfig.model_validate({"sources": sources, "tokenizer": BPE, "validation_fraction": 0.2, **others})


def written_at(prepared: PreparedData) -> int:
    return Path(f"{prepared.train_prefixes[0]}.bin").stat().st_mtime_ns


def texts_of(prefixes: tuple[str, ...], prepared: PreparedData) -> list[str]:
    tokenizer = load_tokenizer(Path(prepared.tokenizer_path), prepared.eod_token)
    files = [IndexedTokens(prefix) for prefix in prefixes]
    sequences = [file.read(sequence) for file in files for sequence in range(len(file))]
    assert all(tokens[-1] == prepared.eod_id and prepared.eod_id not in tokens[:-1] for tokens in sequences)
    return [tokenizer.decode(tokens[:-1]) for tokens in sequences]


def test_every_document_is_on_one_side(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    prepared = prepare(section(str(corpus)), tmp_path, 32, lines)
    train, held_out = (texts_of(side, prepared) for side in (prepared.train_prefixes, prepared.validation_prefixes))
    everything = [text for text in some_texts(400) if text]
    assert sorted(train + held_out) == sorted(everything)
    assert train == [text for text in everything if text in set(train)]  # in order
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / len(everything) < 0.3
    assert prepared.vocab_size == 300
    assert prepared.unigram_entropy == pytest.approx(2.7, abs=1.0)
    assert all(check_token_file(Path(p)) == [] for p in (*prepared.train_prefixes, *prepared.validation_prefixes))
    assert PreparedData.from_json(prepared.to_json()) == prepared
    assert "documents to train on" in lines[-2] and "held out" in lines[-1]


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    prepared = prepare(section(str(corpus)), tmp_path / "out", 32, lines)
    seen = [text for text in some_texts(400) if not is_held_out(text, 0.2)]
    assert prepared.tokenizer_hash == train_tokenizer(seen, "byte-bpe", 300, tmp_path / "seen", lines).hash
    everything = train_tokenizer(some_texts(400), "byte-bpe", 300, tmp_path / "all", lines)
    assert prepared.tokenizer_hash != everything.hash


def test_who_is_held_out_depends_on_content_only(tmp_path: Path, lines: Lines) -> None:
    texts = some_texts(300)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", [*reversed(texts), *some_texts(100, seed=5)])
    sides = []
    for name in ("a", "b"):
        prepared = prepare(section(str(tmp_path / f"{name}.jsonl")), tmp_path / name, 32, lines)
        sides.append(set(texts_of(prepared.validation_prefixes, prepared)))
    assert sides[0] == sides[1] & set(texts)


def test_a_second_run_reuses_and_a_moved_folder_too(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    config = section(str(corpus))
    first = prepare(config, tmp_path / "a", 32, lines)
    stamp = written_at(first)
    assert prepare(config, tmp_path / "a", 64, lines) == first
    assert lines.about("as prepared before")
    assert written_at(first) == stamp
    (tmp_path / "a").rename(tmp_path / "b")
    moved = prepare(config, tmp_path / "b", 32, lines)
    assert moved.train_prefixes[0] == first.train_prefixes[0].replace(str(tmp_path / "a"), str(tmp_path / "b"))
    assert written_at(moved) == stamp


def test_a_rewritten_source_is_not_served_stale(tmp_path: Path, lines: Lines) -> None:
    """Same size, same name, and the old time put back."""
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(200))
    first = prepare(section(str(path)), tmp_path / "out", 32, lines)
    stat = path.stat()
    path.write_text(path.read_text().replace("that", "taht"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    second = prepare(section(str(path)), tmp_path / "out", 32, lines)
    assert second.train_prefixes != first.train_prefixes
    assert any("taht" in text for text in texts_of(second.train_prefixes, second))
    assert not any("taht" in text for text in texts_of(first.train_prefixes, first))  # a run that reads it still can
    path.write_text(path.read_text().replace("taht", "that"))
    assert prepare(section(str(path)), tmp_path / "out", 32, lines) == first


def test_every_setting_that_matters_prepares_anew(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    settings: list[dict[str, object]] = [
        {},
        {"validation_fraction": 0.1},
        {"validation_sources": [str(corpus)]},
        {"tokenizer": {"kind": "byte-bpe", "vocab_size": 299}},
        {"tokenizer": {"kind": "sentencepiece", "vocab_size": 300}},
    ]
    found = [prepare(section(str(corpus), **setting), tmp_path, 32, lines).train_prefixes for setting in settings]
    assert len(set(found)) == len(settings)


def test_a_damaged_result_is_written_again(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    config = section(str(corpus))
    first = prepare(config, tmp_path, 32, lines)
    path = Path(f"{first.train_prefixes[0]}.bin")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert prepare(config, tmp_path, 32, lines) == first
    assert path.read_bytes() == whole


def test_weighted_sources_and_token_files(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    """A token file is split by content without a copy, and blended with documents."""
    raw = prepare(section(str(corpus), validation_fraction=0.0), tmp_path / "raw", 32, lines)
    assert raw.validation_prefixes == ()
    prefix, other = raw.train_prefixes[0], write_jsonl(tmp_path / "b.jsonl", some_texts(100, seed=7))
    config = section(
        {"path": prefix, "weight": 1}, {"path": str(other), "weight": 3}, tokenizer={"path": raw.tokenizer_path}
    )
    prepared = prepare(config, tmp_path / "blend", 32, lines)
    assert prepared.train_weights == prepared.validation_weights == (1, 3)
    train, held_out = (texts_of(side[:1], prepared) for side in (prepared.train_prefixes, prepared.validation_prefixes))
    assert sorted(train + held_out) == sorted(text for text in some_texts(400) if text) and held_out
    assert Path(f"{prepared.train_prefixes[0]}.bin").resolve() == Path(f"{prefix}.bin")
    assert all(check_token_file(Path(p)) == [] for p in (*prepared.train_prefixes, *prepared.validation_prefixes))
    shares = np.zeros(300)
    for name, weight in zip(prepared.train_prefixes, (0.25, 0.75), strict=True):
        file = IndexedTokens(name)
        counts = np.bincount(np.concatenate([file.read(i) for i in range(len(file))]), minlength=300)
        shares += weight * counts / counts.sum()
    assert prepared.unigram_entropy == pytest.approx(-(shares[shares > 0] * np.log(shares[shares > 0])).sum())
    even = section(
        {"path": prefix, "weight": 1}, {"path": str(other), "weight": 1}, tokenizer={"path": raw.tokenizer_path}
    )
    other_weights = prepare(even, tmp_path / "blend", 32, lines)
    assert other_weights.train_prefixes == prepared.train_prefixes and other_weights.train_weights == (1, 1)
    samples = open_samples(prepared, config, 32, 0, "validation")
    assert len(samples[0].tokens) == 33


def test_token_files_of_another_tokenizer_are_refused(
    tmp_path: Path, corpus: Path, bpe: Tokenizer, lines: Lines
) -> None:
    raw = prepare(section(str(corpus)), tmp_path / "raw", 32, lines)
    config = section(raw.train_prefixes[0], tokenizer={"path": str(bpe.path)})
    with pytest.raises(ConfigError, match="was written with a tokenizer of sha256"):
        prepare(config, tmp_path / "out", 32, lines)


def test_a_megatron_token_file_without_a_manifest(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    raw = prepare(section(str(corpus)), tmp_path / "raw", 32, lines)
    manifest = read_manifest(Path(raw.train_prefixes[0]))
    Path(f"{raw.train_prefixes[0]}.json").unlink()
    config = section(raw.train_prefixes[0], tokenizer={"path": raw.tokenizer_path}, validation_fraction=0.0)
    prepared = prepare(config, tmp_path / "out", 32, lines)
    assert prepared.train_prefixes == raw.train_prefixes
    assert manifest is not None and prepared.unigram_entropy == pytest.approx(manifest.unigram_entropy)


def test_own_validation_sources(tmp_path: Path, corpus: Path, lines: Lines) -> None:
    other = write_jsonl(tmp_path / "v.jsonl", some_texts(50, seed=9))
    prepared = prepare(section(str(corpus), validation_sources=[str(other)]), tmp_path / "out", 32, lines)
    assert texts_of(prepared.validation_prefixes, prepared) == [text for text in some_texts(50, seed=9) if text]
    assert len(texts_of(prepared.train_prefixes, prepared)) == 360


def test_bad_lines_are_told_and_kept(tmp_path: Path, lines: Lines) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(100))
    with open(path, "a") as handle:
        handle.write("{cut\n" * 30)
    prepared = prepare(section(str(path)), tmp_path / "out", 32, lines)
    assert lines.about("30 bad lines, 0 blank") and lines.about(f"{path}:101: not JSON")
    assert lines.about("and 10 more bad lines")
    kept = Path(f"{prepared.train_prefixes[0]}.bad_lines.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in kept] == list(range(101, 131))


def test_too_small_a_corpus(tmp_path: Path, lines: Lines) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(20))
    with pytest.raises(ConfigError, match=r"seq_length = 4096 is refused(?s:.*)tokens in \d+ documents"):
        prepare(section(str(path)), tmp_path / "out", 4096, lines)


# A stand-in for a kill at a chosen moment: the process kills itself when it comes to a function for the nth time.
KILLED = """
import os, signal, sys
from pathlib import Path
import data.{module}
from data.config import DataConfig
from data.prepare import prepare
real, calls = data.{module}.{name}, [0]
def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
data.{module}.{name} = deadly
prepare(DataConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), 32, print)
"""
MOMENTS = {
    "training the tokenizer": ("tokenizer_training", "whole_file", 1),
    "tokenising": ("tokenize_shard", "_write_batch", 1),
    "after the shard's record": ("indexed", "publish", 1),
    "between .bin and .idx of the shard": ("indexed", "manifest_path", 1),
    "between train and validation of the shard": ("indexed", "publish", 2),
    "before the first name": ("merge", "publish", 1),
    "between .bin and .idx": ("indexed", "manifest_path", 3),
    "between train and validation": ("merge", "publish", 2),
    "before the record": ("prepare", "_relative", 1),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("sources.json", "prepare.lock")
    }


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_worked_on(
    tmp_path: Path, corpus: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """And a disk that fails while it is asked for one is not taken for such."""

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for lock in ("lockf", "flock"):
        monkeypatch.setattr(fcntl, lock, none)
    assert prepare(section(str(corpus)), tmp_path / "out", 32, lines.append).train_prefixes
    told = [line for line in lines if "this file system has no locks" in line]
    assert any(
        line.startswith(f"data: {tmp_path / 'out'}: ") and "no other run prepares data there" in line for line in told
    )
    assert any(line.startswith("tokenise: ") and "no other command tokenises there" in line for line in told)
    number = errno.EIO
    with pytest.raises(WorkError, match="Input/output"):
        prepare(section(str(corpus)), tmp_path / "other", 32, lines.append)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("unbroken")
    config = section(str(write_jsonl(folder / "a.jsonl", some_texts(2500, longest=20))))
    prepare(config, folder / "out", 32, lambda _: None)
    return config, contents(folder / "out")


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(tmp_path: Path, unbroken: tuple[DataConfig, dict[str, bytes]], moment: str) -> None:
    config, expected = unbroken
    module, name, call = MOMENTS[moment]
    code = KILLED.format(module=module, name=name, call=call)
    command = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = contents(tmp_path)
    for path in [path for path in left if path.endswith(".idx") and "/." not in path]:
        assert check_token_file((tmp_path / path).with_suffix("")) == []  # what has its final .idx is whole
    if moment in ("tokenising", "before the first name") or "shard" in moment:
        assert not [path for path in left if "tokenizer" not in path and "/." not in path]
    prepare(config, tmp_path, 32, lambda _: None)
    assert contents(tmp_path) == expected


def test_two_processes_at_once(tmp_path: Path, unbroken: tuple[DataConfig, dict[str, bytes]]) -> None:
    config, expected = unbroken
    code = KILLED.format(module="indexed", name="publish", call=-1)  # never
    command = [sys.executable, "-c", code, config.model_dump_json(), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(process.communicate(timeout=300)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert sum("prepared in" in text for text in told) == 1
    assert sum("as prepared before" in text for text in told) == 1
    assert contents(tmp_path) == expected
