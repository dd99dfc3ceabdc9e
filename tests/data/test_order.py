"""The order of the data: every sample once an epoch, and nothing but the seed and the number decides which."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data.blend import Blend, Integers
from data.order import SampleOrder, permutation

LENGTHS = np.array([5, 0, 17, 1, 40, 3, 3, 90, 0, 11], dtype=np.int32)  # 170 tokens
SEQ = 16


def tokens_of(order: SampleOrder, index: int) -> list[tuple[int, int]]:
    return [(piece.sequence, at) for piece in order.pieces(index) for at in range(piece.start, piece.stop)]


def test_an_epoch_holds_every_sample_once() -> None:
    order = SampleOrder(LENGTHS, SEQ, seed=3)
    assert order.samples_per_epoch == (170 - 1) // SEQ == 10
    epochs = []
    for epoch in range(3):
        samples = [tokens_of(order, epoch * 10 + k) for k in range(10)]
        assert all(len(sample) == SEQ + 1 for sample in samples)
        inputs = [token for sample in samples for token in sample[:-1]]
        assert len(set(inputs)) == len(inputs) == 160  # no token is an input twice
        labels = [token for sample in samples for token in sample[1:]]
        assert len(set(labels)) == 160
        epochs.append(samples)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_sample_is_a_run_of_the_epochs_stream() -> None:
    """Rebuild the stream by its definition, and find every sample in it."""
    order = SampleOrder(LENGTHS, SEQ, seed=3, source=2)
    for epoch in range(2):
        documents = permutation(len(LENGTHS), 3, 2, epoch, 0)
        stream = [(int(document), at) for document in documents for at in range(LENGTHS[document])]
        places = permutation(10, 3, 2, epoch, 1)
        for k in range(10):
            begin = int(places[k]) * SEQ
            assert tokens_of(order, epoch * 10 + k) == stream[begin : begin + SEQ + 1]
            assert all(piece.stop > piece.start for piece in order.pieces(epoch * 10 + k)), "no empty sequence"


def test_neither_history_nor_order_of_access_matters() -> None:
    forward = SampleOrder(LENGTHS, SEQ, seed=3)
    expected = [forward.pieces(k) for k in range(50)]
    for k in reversed(range(50)):
        assert SampleOrder(LENGTHS, SEQ, seed=3).pieces(k) == expected[k]
    shuffled = SampleOrder(LENGTHS, SEQ, seed=3)
    assert all(shuffled.pieces(k) == expected[k] for k in (49, 0, 33, 12, 1, 49, 20))


def test_seed_and_source_change_the_order() -> None:
    orders = [SampleOrder(LENGTHS, SEQ, seed, source) for seed in (0, 1) for source in (0, 1)]
    assert len({tuple(map(tuple, (order.pieces(k) for k in range(10)))) for order in orders}) == 4


def test_the_shuffle_is_frozen() -> None:
    """A change of these numbers reorders every run that is under way: it must not happen unseen."""
    assert permutation(8, 1234, 0, 0, 0).tolist() == [1, 6, 2, 0, 3, 5, 7, 4]
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.035  # 5 standard deviations


def test_two_epochs_are_held_and_the_older_one_goes() -> None:
    order = SampleOrder(LENGTHS, SEQ, seed=3)
    for epoch, held in ((0, [0]), (1, [0, 1]), (0, [1, 0]), (2, [0, 2]), (3, [2, 3])):
        order.pieces(epoch * 10)
        assert list(order._epochs) == held and order._epoch(epoch) is order._epoch(epoch)
    with pytest.raises(IndexError, match="count from 0"):
        order.pieces(-1)


def test_a_source_is_number_0_unless_told() -> None:
    assert SampleOrder(LENGTHS, SEQ, 3).pieces(0) == SampleOrder(LENGTHS, SEQ, 3, 0).pieces(0)


def test_too_few_tokens() -> None:
    assert SampleOrder(np.array([16, 1], dtype=np.int32), SEQ, 0).samples_per_epoch == 1
    with pytest.raises(ValueError, match=r"16 tokens hold no sample of 16 \+ 1"):
        SampleOrder(np.array([16], dtype=np.int32), SEQ, 0)


def test_a_large_corpus_is_quick_to_open() -> None:
    lengths = np.full(1_000_000, 1000, dtype=np.int32)  # a billion tokens
    order = SampleOrder(lengths, 4096, seed=1)
    assert order.samples_per_epoch == (10**9 - 1) // 4096
    assert sum(piece.stop - piece.start for piece in order.pieces(123_456)) == 4097


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [1e-4, 1.0, 5.0, 0.3, 0.3]])
def test_a_blend_keeps_its_shares(weights: list[float]) -> None:
    blend, count = Blend(weights), 20_000
    sources, indices = blend.block(0, count)
    for source, share in enumerate(np.array(weights) / sum(weights)):
        mine = sources == source
        assert indices[mine].tolist() == list(range(int(mine.sum())))  # each source in its own order, none left out
        drift = np.abs(np.cumsum(mine) - share * np.arange(1, count + 1)).max()
        assert drift <= 0.5 + share * len(weights) / 2


def test_a_blend_needs_no_history() -> None:
    weights = [0.61, 0.2, 0.11, 0.05, 0.03]
    sources, indices = Blend(weights).block(0, 30_000)
    for start, count in ((0, 1), (1, 1), (4095, 3), (12_345, 5000), (29_999, 1)):
        some_sources, some_indices = Blend(weights).block(start, count)
        assert some_sources.tolist() == sources[start : start + count].tolist()
        assert some_indices.tolist() == indices[start : start + count].tolist()
    blend = Blend(weights)
    assert all(blend.locate(k) == (sources[k], indices[k]) for k in (0, 29_999, 4095, 4096, 17))
    scaled = Blend([weight * 8 for weight in weights]).block(0, 1000)
    assert scaled[0].tolist() == sources[:1000].tolist()


def test_a_blend_far_out() -> None:
    sources, indices = Blend([3, 1]).block(10**12, 8)
    assert np.bincount(sources).tolist() == [6, 2]
    assert abs(int(indices[sources == 1][0]) - 10**12 // 4) <= 1


@pytest.mark.parametrize("weights", [[3, 1], [1, 1, 1, 1], [1023, 1], [5, 2, 1], [1, 511, 512]])
def test_a_blend_goes_in_order_of_due_times(weights: list[int]) -> None:
    """Shares that are exact in binary, ties among them: the whole order is that of the definition."""
    count = 2 * sum(weights)
    due = ((Fraction(2 * j + 1, weight), source, j) for source, weight in enumerate(weights) for j in range(count))
    expected = [(source, j) for _, source, j in sorted(due)[:count]]
    sources, indices = Blend(weights).block(0, count)
    assert list(zip(sources.tolist(), indices.tolist(), strict=True)) == expected


class Watched(Blend):
    """Says which blocks were made."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__(weights)
        self.asked: list[int] = []

    def block(self, start: int, count: int) -> tuple[Integers, Integers]:
        self.asked.append(start)
        return super().block(start, count)


def test_neighbours_are_located_in_one_block() -> None:
    blend = Watched([3, 1])
    assert [blend.locate(k)[0] for k in (0, 1, 2, 3, 1000)] == [0, 0, 1, 0, 0]
    assert blend.asked == [0]
    assert [blend.locate(k)[0] for k in (10_000, 10_001, 5)] == [0, 0, 0]
    assert len(blend.asked) == 3 and blend.asked[2] == 0


def test_one_source_needs_no_block() -> None:
    blend = Watched([2.5])
    assert [blend.locate(k) for k in (0, 7, 2**60 + 1)] == [(0, 0), (0, 7), (0, 2**60 + 1)]
    assert blend.asked == []


@pytest.mark.parametrize("weights", [[1], [3, 1]])
def test_samples_count_from_0(weights: list[float]) -> None:
    for k in (-1, -5000):
        with pytest.raises(IndexError, match=f"sample {k}: samples count from 0"):
            Blend(weights).locate(k)
    with pytest.raises(IndexError, match="sample -1: samples count from 0"):
        Blend(weights).block(-1, 3)


def test_weights_are_positive() -> None:
    for weights in ([], [1, 0], [1, -1], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="positive"):
            Blend(weights)
