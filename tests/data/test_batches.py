"""Batches: the same at every data-parallel size, and core's masks and positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.batches import MicroBatch, SampleBatches, collate, global_batch
from data.indexed import IndexedWriter
from data.samples import DocumentRules, Samples
from foundation.errors import ConfigError

EOD, SEQ = 99, 24


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two token files of short documents, some empty; token values tell the file."""
    folder = tmp_path_factory.mktemp("tokens")
    chance = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 50)):
        with IndexedWriter(folder / name, 100) as writer:
            for length in chance.integers(0, 30, 200):
                tokens = (
                    np.append(chance.integers(low, low + 40, length), EOD) if length else np.empty(0, dtype=np.int64)
                )
                writer.add(tokens, [len(tokens)])
            writer.finish("abc", EOD, [])
    return [folder / "a", folder / "b"]


def open_all(prefixes: list[Path], seed: int = 1, **rules: bool) -> Samples:
    return Samples(prefixes, [3, 1], SEQ, seed, DocumentRules(EOD, **rules))


def step_at(samples: Samples, step: int, dp: int, size: int = 8, micro: int = 2) -> dict[int, MicroBatch]:
    """All micro-batches of a step by their place in the step."""
    found = {}
    for rank in range(dp):
        for turn, batch in enumerate(SampleBatches(samples).micro_batches(step, size, micro, rank, dp)):
            found[turn * dp + rank] = batch
    return found


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_a_step_is_the_same_at_every_data_parallel_size(prefixes: list[Path], dp: int) -> None:
    for step in (0, 1, 57):
        found = step_at(open_all(prefixes), step, dp)
        assert sorted(found) == [0, 1, 2, 3]
        rows = np.concatenate([found[place].tokens for place in range(4)])
        samples = open_all(prefixes)
        assert rows.tolist() == [samples[k].tokens[:-1].tolist() for k in global_batch(step, 8)]


def test_a_resumed_run_reads_what_an_unbroken_one_reads(prefixes: list[Path]) -> None:
    unbroken = open_all(prefixes)
    steps = [next(SampleBatches(unbroken).micro_batches(step, 4, 4)).tokens for step in range(400)]
    per_epoch = unbroken.samples_per_epoch
    assert unbroken.epochs(1600)[0] > 5 and len(per_epoch) == 2  # the sources went round several times
    for start in (1, 37, 250, 399):
        resumed = open_all(prefixes)
        for step in range(start, min(start + 5, 400)):
            assert (next(SampleBatches(resumed).micro_batches(step, 4, 4)).tokens == steps[step]).all()


def test_sources_come_by_weight_and_once_an_epoch(prefixes: list[Path]) -> None:
    samples = open_all(prefixes)
    first = [samples[k] for k in range(4 * min(samples.samples_per_epoch[0] // 3, samples.samples_per_epoch[1]))]
    from_b = [sample for sample in first if (sample.tokens[sample.tokens != EOD] >= 50).all()]
    assert len(from_b) * 4 == len(first)
    assert len({sample.tokens.tobytes() for sample in first}) == len(first)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("mask_loss", [False, True])
def test_masks_and_positions_are_those_of_core(prefixes: list[Path], reset: bool, mask_loss: bool) -> None:
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    samples = open_all(prefixes, reset_position_ids=reset, eod_mask_loss=mask_loss)
    for batch in SampleBatches(samples).micro_batches(3, 16, 4):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (4, SEQ)
        kinds = [array.dtype for array in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids)]
        assert kinds == [np.int64, np.int64, np.float32, np.int64]
        assert (batch.tokens[:, 1:] == batch.labels[:, :-1]).all()
        assert batch.document_lengths is None
        for row in range(4):
            tokens = torch.from_numpy(batch.tokens[row])
            _, loss_mask, positions = _get_ltor_masks_and_position_ids(tokens, EOD, reset, False, mask_loss, False)
            assert batch.loss_mask[row].tolist() == loss_mask.tolist()
            assert batch.position_ids[row].tolist() == positions.tolist()


def test_document_lengths_follow_the_ends_of_documents(prefixes: list[Path]) -> None:
    samples = open_all(prefixes, document_mask=True)
    for batch in SampleBatches(samples).micro_batches(0, 64, 4):
        assert batch.document_lengths is not None
        flat = batch.tokens.reshape(-1)
        expected, begin = [], 0
        for at in range(len(flat)):
            if flat[at] == EOD or (at + 1) % SEQ == 0:
                expected.append(at + 1 - begin)
                begin = at + 1
        assert list(batch.document_lengths) == expected
        assert all(type(length) is int for length in batch.document_lengths)
        restarts = np.flatnonzero(batch.position_ids.reshape(-1) == 0)
        assert restarts.tolist() == [0, *np.cumsum(expected)[:-1]]
        assert (batch.loss_mask == 1).all()


def test_a_document_that_begins_at_the_last_label(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", 100) as writer:
        writer.add(np.array([1, 2, 3, EOD, 5]), [4, 1])
        writer.finish("abc", EOD, [])
    samples = Samples([tmp_path / "t"], [1], 4, 0, DocumentRules(EOD, document_mask=True))
    seen = {collate([samples[k]], samples.rules).document_lengths for k in range(20)}
    assert seen == {(4,), (1, 3)}  # documents in either order


def test_what_does_not_divide_is_refused(prefixes: list[Path]) -> None:
    samples = open_all(prefixes)
    with pytest.raises(ConfigError, match=r"(?s)global_batch_size = 6.*2 x 2.*4 or 8"):
        list(SampleBatches(samples).micro_batches(0, 6, 2, 0, 2))
    for size in (3, 0, -4):
        with pytest.raises(ConfigError, match=rf"global_batch_size = {size} (.|\n)*cure: 4$"):
            list(SampleBatches(samples).micro_batches(0, size, 2, 0, 2))
    with pytest.raises(ValueError, match="rank -1 of 2"):
        list(SampleBatches(samples).micro_batches(0, 8, 2, -1, 2))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        list(SampleBatches(samples).micro_batches(0, 8, 2, 2, 2))
    with pytest.raises(IndexError):
        global_batch(-1, 8)


def test_too_small_a_corpus_is_refused_with_numbers(prefixes: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"(?s)seq_length = 100000.*documents.*100,001"):
        Samples(prefixes, [1, 1], 100_000, 0, DocumentRules(EOD))
