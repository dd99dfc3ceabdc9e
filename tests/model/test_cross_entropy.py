"""Vocabulary-parallel cross-entropy against torch's own over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from model.kernels import cross_entropy as kernel
from model.kernels.cross_entropy import BLOCK_BYTES, vocab_parallel_cross_entropy
from tests.model.thread_ranks import on_threads
from tests.ranks import RankPool

VOCABULARY = 37
SHAPE = (3, 5)


def case(
    width: int, dtype: torch.dtype = torch.float32, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [3, 5, width], labels with both ends of the vocabulary and of halves and quarters, loss weights."""
    draw = torch.Generator().manual_seed(2)
    logits = (torch.randn(*SHAPE, width, generator=draw) * scale).to(dtype)
    labels = torch.randint(VOCABULARY, SHAPE, generator=draw)
    borders = [
        0,
        VOCABULARY - 1,
        *(border for border in (9, 10, 11, 19, 20, 21, 29, 30, 31, 35) if border < VOCABULARY),
    ]
    labels.view(-1)[: len(borders)] = torch.tensor(borders)
    weights = torch.rand(SHAPE, generator=draw)
    weights[0, 0] = 0.0
    return logits, labels, weights


def expected(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's loss in fp64 over the true vocabulary, and the gradient of all logits."""
    whole = logits.detach().double().requires_grad_()
    kept = whole[..., :VOCABULARY]
    loss = cross_entropy(kept.reshape(-1, VOCABULARY), labels.reshape(-1), reduction="none").view(labels.shape)
    (loss * weights).sum().backward()
    assert whole.grad is not None
    return loss.detach(), whole.grad


def ours(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, group: Any = None
) -> tuple[torch.Tensor, ...]:
    own = logits.detach().clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own, labels, VOCABULARY, group)
    (loss * weights).sum().backward()
    assert own.grad is not None
    return loss.detach(), own.grad


@pytest.mark.parametrize("width", [VOCABULARY, VOCABULARY + 1, 64])
def test_equals_torch_on_one_rank(width: int) -> None:
    logits, labels, weights = case(width)
    loss, gradient = ours(logits, labels, weights)
    right_loss, right_gradient = expected(logits, labels, weights)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=1e-6, atol=1e-7)
    assert loss.dtype == torch.float32 and not gradient[..., VOCABULARY:].any()


def test_padding_takes_no_probability() -> None:
    logits, labels, weights = case(64)
    raised = logits.clone()
    raised[..., VOCABULARY:] = 1e4
    first, second = ours(logits, labels, weights), ours(raised, labels, weights)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_rows_are_handled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, weights = case(64)
    whole = ours(logits, labels, weights)
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 4 * 64 * 4)  # four rows; 15 do not divide by it
    blocks = ours(logits, labels, weights)
    assert torch.equal(whole[0], blocks[0]) and torch.equal(whole[1], blocks[1])
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 1)
    assert torch.equal(whole[0], ours(logits, labels, weights)[0])


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits, labels, weights = case(64, torch.bfloat16)
    loss, gradient = ours(logits, labels, weights)
    right_loss, right_gradient = expected(logits, labels, weights)
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-6, atol=1e-6)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_do_not_overflow(shift: float) -> None:
    logits, labels, weights = case(64, scale=200.0)
    loss, gradient = ours(logits + shift, labels, weights)
    right_loss, right_gradient = expected(logits + shift, labels, weights)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(loss.double(), right_loss, rtol=1e-5, atol=2e-3)  # fp32 holds 1e4 to 1e-3
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("ranks_count", "width"), [(2, 19), (3, 13), (4, 10), (4, 16), (2, VOCABULARY)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_arithmetic_of_a_split(ranks_count: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    """As on ranks below, without any: the last of 4 x 16 columns, and the second 37, are padding alone."""
    logits, labels, weights = case(width * ranks_count, dtype)
    right_loss, right_gradient = expected(logits, labels, weights)
    logits[..., VOCABULARY:] = 50.0

    def share(group: Any) -> tuple[torch.Tensor, ...]:
        return ours(logits[..., group.rank() * width : (group.rank() + 1) * width], labels, weights, group)

    values = on_threads(ranks_count, share)
    for loss, _ in values:
        torch.testing.assert_close(loss.double(), right_loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(loss, values[0][0]) and loss.dtype == torch.float32
    gradient = torch.cat([part for _, part in values], dim=-1)
    assert gradient.dtype == dtype and not gradient[..., VOCABULARY:].any()
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("width", [VOCABULARY, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_what_a_gpu_compiles(width: int, dtype: torch.dtype, tolerance: float) -> None:
    logits, labels, weights = case(width, dtype)
    loss, grad = expected(logits, labels, weights)
    rows, targets = logits.view(-1, width), labels.view(-1)
    log_sum_exp, predicted = kernel.plain_statistics(rows, targets, VOCABULARY)
    torch.testing.assert_close((log_sum_exp - predicted).double(), loss.view(-1), rtol=1e-5, atol=1e-5)
    got = kernel.plain_gradient(rows, targets, log_sum_exp, weights.view(-1), VOCABULARY)
    assert got.dtype == dtype and not got[:, VOCABULARY:].any()
    torch.testing.assert_close(got.double(), grad.view(-1, width), rtol=tolerance, atol=tolerance)


def test_what_a_gpu_compiles_of_another_ranks_targets() -> None:
    rows, targets = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([-3, 8, 5, 20])
    found, right = kernel.plain_statistics(rows, targets, 6), kernel._local_statistics(rows, targets, 6)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    grad = kernel.plain_gradient(rows, targets, found[0], torch.ones(4), 6)
    torch.testing.assert_close(grad.sum(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]), rtol=1e-5, atol=1e-5)


def test_blocks_fit_a_cores_cache() -> None:
    assert BLOCK_BYTES == 4 * 2**20
    assert len(kernel._row_blocks(torch.empty(5000, 1024))) == 5, "1,024 rows of 1,024 fp32 numbers"
    assert [block.start for block in kernel._row_blocks(torch.empty(3, 2**22))] == [0, 1, 2], "never less than a row"


def on_a_rank(width: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, ...]:
    """This rank's columns of `width` x ranks, and what it computes from them."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    logits, labels, weights = case(width * ranks, dtype, scale)
    return ours(logits[..., rank * width : (rank + 1) * width], labels, weights, torch.distributed.group.WORLD)


@pytest.mark.parametrize(
    ("ranks_count", "width"),
    [(2, 19), (2, 32), (4, 10), (4, 13)],
    ids=["tp2", "tp2 padded", "tp4", "tp4, padding alone on the last rank"],
)
def test_equals_torch_when_split(ranks: RankPool, ranks_count: int, width: int) -> None:
    assert_split_equals_torch(ranks, ranks_count, width, torch.float32, 3.0, 1e-6)


def test_a_rank_of_padding_alone_takes_part(ranks: RankPool) -> None:
    assert_split_equals_torch(
        ranks, 4, 16, torch.float32, 3.0, 1e-6
    )  # the last of 4 x 16 columns begins at 48, past 37
    assert_split_equals_torch(ranks, 2, VOCABULARY, torch.float32, 3.0, 1e-6)


def test_split_bf16_and_large_logits(ranks: RankPool) -> None:
    assert_split_equals_torch(ranks, 2, 19, torch.bfloat16, 3.0, 2**-8)
    assert_split_equals_torch(ranks, 2, 19, torch.float32, 3000.0, 1e-5)


def assert_split_equals_torch(
    ranks: RankPool, ranks_count: int, width: int, dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    logits, labels, weights = case(width * ranks_count, dtype, scale)
    right_loss, right_gradient = expected(logits, labels, weights)
    values = ranks.run(ranks_count, on_a_rank, width, dtype, scale)
    for loss, _ in values:
        torch.testing.assert_close(loss.double(), right_loss, rtol=1e-6, atol=1e-6)
        assert torch.equal(loss, values[0][0])
    gradient = torch.cat([part for _, part in values], dim=-1)
    torch.testing.assert_close(gradient.double(), right_gradient, rtol=tolerance, atol=1e-6)
    assert not gradient[..., VOCABULARY:].any()


def test_a_wrong_label_shows() -> None:
    """The comparison above can fail."""
    logits, labels, weights = case(64)
    moved = (labels + 1) % VOCABULARY
    assert not torch.allclose(ours(logits, labels, weights)[0], ours(logits, moved, weights)[0])
