"""Signatures, buckets and clusters, each against a plain way to the same result."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.clean import bucket_stage
from data.clean.bucket_stage import equal_pairs
from data.clean.cluster_stage import find, join
from data.clean.normalise import normalise
from data.clean.records import read_run, write_run
from data.clean.settings import CleanSettings, NearSettings
from data.clean.signatures import WordHashes, band_hashes, comparable_words, ngram_hashes
from foundation.errors import ConfigError
from tests.data.clean.cases import edited, result, run, text, write_lines

NEAR = NearSettings(bands=20, rows=8)


def test_words_are_compared_without_case_accents_and_punctuation() -> None:
    plain = comparable_words("the cafe s 12 doors opened")
    assert comparable_words("The  CAF\u00c9's 12 doors\u2014opened!") == plain
    assert comparable_words("the cafe's (12) DOORS, opened") == plain
    assert comparable_words("cafe\u0301") == comparable_words("caf\u00e9") == [b"cafe"]


def test_scripts_without_spaces_are_compared_by_letters() -> None:
    assert len(comparable_words("\u4eca\u5929\u5929\u6c14\u5f88\u597d abc")) == 7
    assert len(comparable_words("\u0e27\u0e31\u0e19")) == 3


@pytest.mark.parametrize("lengths", [[3], [0], [2, 7], [0, 5, 1, 0, 9, 2], [5, 5], [1, 1, 1]])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_ngrams_stay_within_documents(lengths: list[int], size: int) -> None:
    """Each document's n-grams are those that it has alone, and as many as there are."""
    words = np.arange(1, sum(lengths) + 1, dtype=np.uint64)
    hashes, counts = ngram_hashes(words, np.array(lengths), size)
    assert counts.tolist() == [0 if n == 0 else max(1, n - size + 1) for n in lengths]
    assert len(set(hashes.tolist())) == len(hashes) == counts.sum()
    alone = [
        ngram_hashes(words[end - n : end], np.array([n]), size)[0]
        for n, end in zip(lengths, np.cumsum(lengths), strict=True)
    ]
    assert np.array_equal(hashes, np.concatenate(alone))


def test_a_signature_depends_on_its_text_alone() -> None:
    """Not on what else is in the batch, nor on which words were met before."""
    chance = random.Random(0)
    texts = [text(chance, chance.randint(0, 300)) for _ in range(200)]
    known = WordHashes()
    together, documents = band_hashes(texts, known, NEAR)
    for row, document in list(zip(together, documents, strict=True))[::7]:
        assert np.array_equal(band_hashes([texts[document]], WordHashes(), NEAR)[0][0], row)
    assert set(documents) == {number for number, found in enumerate(texts) if found}
    other = band_hashes(texts, known, NearSettings(seed=2))[0]
    assert not (other == together).any()


def test_documents_meet_as_often_as_their_similarity_says() -> None:
    """1 - (1 - J**rows)**bands, within four standard deviations, where that is neither 0 nor 1."""
    settings = NearSettings(bands=6, rows=3, ngram=1)
    count, shared, own = 1500, 80, 40
    jaccard = shared / (shared + 2 * own)
    chance = random.Random(1)
    texts = []
    for number in range(count):
        common = [f"c{number}x{i}" for i in range(shared)]
        texts += [" ".join([*common, *(f"{side}{number}x{i}" for i in range(own))]) for side in "ab"]
    chance.shuffle(common)
    hashes = band_hashes(texts, WordHashes(), settings)[0]
    met = (hashes[0::2] == hashes[1::2]).any(axis=1).mean()
    expected = settings.probability(jaccard)
    assert 0.3 < expected < 0.7
    assert abs(met - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_runs_are_read_back_by_ranges(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    hashes = chance.integers(0, 2**64, (500, 3, 2), dtype=np.uint64)
    rows = np.arange(7, 507, dtype=np.uint32)
    with open(tmp_path / "runs", "wb") as handle:
        first = write_run(handle, 0, hashes[:200], rows[:200])
        second = write_run(handle, first.byte_count, hashes[200:], rows[200:])
    assert (tmp_path / "runs").stat().st_size == first.byte_count + second.byte_count
    for band in range(3):
        found = []
        for run_ in (first, second):
            for low, high in pairwise([0, 2**62, 2**63, 2**64]):
                values, numbers = read_run(tmp_path / "runs", run_, band, low, high)
                assert all(low <= int(value) < high for value in values[:, 0])
                found += [
                    (tuple(value.tolist()), number) for value, number in zip(values, numbers.tolist(), strict=True)
                ]
        assert sorted(found) == sorted(
            (tuple(value[band].tolist()), row) for value, row in zip(hashes, rows.tolist(), strict=True)
        )


@pytest.mark.parametrize("width", [1, 2])
def test_equal_pairs(width: int) -> None:
    chance = np.random.default_rng(width)
    hashes = chance.integers(0, 40, (300, width), dtype=np.uint64)
    documents = chance.permutation(300)
    groups: dict[tuple[int, ...], list[int]] = {}
    for value, document in zip(hashes.tolist(), documents.tolist(), strict=True):
        groups.setdefault(tuple(value), []).append(document)
    expected = {(min(group), other) for group in groups.values() for other in group if other != min(group)}
    pairs = equal_pairs(hashes, documents)
    assert len(pairs) == len(expected) and set(map(tuple, pairs.tolist())) == expected
    assert equal_pairs(hashes[:0], documents[:0]).shape == (0, 2)


@pytest.mark.parametrize("seed", range(5))
def test_clusters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain union-find, in chunks of any size; the order of the pairs does not matter."""
    monkeypatch.setattr("data.clean.cluster_stage._CHUNK", 7 if seed % 2 else 1 << 20)
    chance = np.random.default_rng(seed)
    count = 400
    pairs = np.concatenate([chance.integers(0, count, (250, 2)), [[i, i + 1] for i in range(300, 399)]])
    plain = list(range(count))

    def end(node: int) -> int:
        while plain[node] != node:
            node = plain[node]
        return node

    for left, right in pairs.tolist():
        ends = sorted((end(left), end(right)))
        plain[ends[1]] = ends[0]
    for order in (pairs, pairs[::-1], chance.permutation(pairs)):
        roots = np.arange(count)
        join(roots, order)
        while not np.array_equal(roots[roots], roots):
            roots = roots[roots]
        assert roots.tolist() == [end(node) for node in range(count)]


@pytest.mark.parametrize("order", ["rising", "falling", "any"])
def test_a_chain_is_one_cluster(order: str) -> None:
    """Each document like the next one only: link by link it would take hours."""
    count = 300_000
    pairs = np.stack([np.arange(count - 1), np.arange(1, count)], axis=1)
    shuffled = np.random.default_rng(0).permutation(count)
    pairs = {"rising": pairs, "falling": pairs[::-1], "any": shuffled[pairs]}[order]
    roots = np.arange(count)
    join(roots, pairs)
    assert not find(roots, np.arange(count)).any()


def test_ranges_of_hashes_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(4)
    originals = [text(chance) for _ in range(40)]
    source = write_lines(
        tmp_path / "a.jsonl", [{"text": t} for t in [*originals, *(edited(chance, o) for o in originals), originals[0]]]
    )
    settings = CleanSettings(rules=None, exact=True, near=NEAR, shard_bytes=9000)
    run(source, tmp_path / "one", settings)
    monkeypatch.setattr(bucket_stage, "RECORDS_PER_UNIT", 28)
    monkeypatch.setattr("data.clean.filter_stage._RUN_ROWS", 5)
    monkeypatch.setattr("data.clean.filter_stage._BATCH_DOCUMENTS", 3)
    run(source, tmp_path / "many", settings)
    assert result(tmp_path / "one") == result(tmp_path / "many")


@pytest.mark.parametrize("values", [{"bands": 0}, {"rows": 0}, {"ngram": 0}, {"bands": 1000, "rows": 10}])
def test_settings_that_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        NearSettings(**values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("plain text.\n\nmore", "plain text.\n\nmore"),
        ("  a \t\r\nb\rc\u2028d\x85e  ", "a\nb\nc\nd\ne"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("cafe\u0301", "caf\u00e9"),
        ("a\x00b\x07\x7fc\ufeffd\xade", "abcde"),
        ("a\fb\vc \f\n\u00e9", "a\nb\nc\n\n\u00e9"),
        ("a\u200bb \u200b c\ufeff\u200b\nd\x1ce\u200b", "a b  c\nd e"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("x\xa0\ny", "x\ny"),
        ("\ud800x", "\ufffdx"),
        ("\n \n", ""),
    ],
)
def test_normalise(before: str, after: str) -> None:
    assert normalise(before) == after
    assert normalise(after) == after


def test_normal_text_is_not_copied() -> None:
    for plain in ("nothing to do\n\nhere", "nichts f\u00fcr dich"):
        assert normalise(plain) is plain
