"""Attention of the torch provider against a softmax written out, values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from foundation.errors import RequestError
from model.kernels import attention as kernel
from model.kernels.attention import TorchAttention
from tests.ranks import RankPool

HEADS, GROUPS, WIDTH = 4, 2, 8
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def build(
    window: int | None = None, scale: float | None = None, dropout: float = 0.0, **options: Any
) -> TorchAttention:
    config = SimpleNamespace(
        window_size=None if window is None else (window - 1, 0), attention_dropout=dropout, sequence_parallel=False
    )
    options = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | options
    return TorchAttention(config, 1, softmax_scale=scale, **options)


def inputs(length: int, batch: int | None = 2, groups: int = GROUPS) -> Inputs:
    """[s, b, heads, d], or [t, heads, d] without `batch`."""
    draw = torch.Generator().manual_seed(3)
    lead = (length,) if batch is None else (length, batch)
    query = torch.randn(*lead, HEADS, WIDTH, generator=draw)
    key, value = (torch.randn(*lead, groups, WIDTH, generator=draw) for _ in range(2))
    return tuple(tensor.requires_grad_() for tensor in (query, key, value))  # type: ignore[return-value]


def explicit(inputs: Inputs, seen: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """softmax over what `seen` [s, s] lets each query see, in fp64: [s, b, heads, d]."""
    query, key, value = (tensor.double() for tensor in inputs)
    repeats = HEADS // key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * (WIDTH**-0.5 if scale is None else scale)
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, value)


def causal(length: int, window: int | None = None) -> torch.Tensor:
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = key <= query
    return seen if window is None else seen & (query - key < window)


def assert_equals_definition(
    attention: TorchAttention, ours: Inputs, seen: torch.Tensor, scale: float | None = None
) -> None:
    """Values and all three gradients."""
    theirs = tuple(tensor.detach().clone().requires_grad_() for tensor in ours)
    length, batch = ours[0].shape[:2]
    out = attention(*ours, attention_mask=None)
    right = explicit(theirs, seen, scale)  # type: ignore[arg-type]
    assert out.shape == (length, batch, HEADS * WIDTH)
    torch.testing.assert_close(out.double(), right.reshape(length, batch, -1), rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * upstream).sum().backward()
    (right.reshape(length, batch, -1) * upstream).sum().backward()
    for name, mine, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
def test_grouped_queries(groups: int) -> None:
    assert_equals_definition(build(), inputs(13, groups=groups), causal(13))


def test_scale() -> None:
    assert_equals_definition(build(scale=0.7), inputs(9), causal(9), scale=0.7)


@pytest.mark.parametrize("window", [1, 2, 5, 12, 13, 14, 100])
def test_sliding_window(window: int) -> None:
    assert_equals_definition(build(window), inputs(13), causal(13, window))


@pytest.mark.parametrize("block", [1, 3, 4, 13])
@pytest.mark.parametrize("window", [1, 3, 4, 6, 12])
def test_sliding_window_across_blocks(monkeypatch: pytest.MonkeyPatch, window: int, block: int) -> None:
    monkeypatch.setattr(kernel, "WINDOW_BLOCK", block)
    assert_equals_definition(build(window), inputs(13), causal(13, window))


def test_a_window_that_is_off_by_one_shows() -> None:
    """The comparison above can fail."""
    with pytest.raises(AssertionError):
        assert_equals_definition(build(5), inputs(13), causal(13, 6))


def packed(*lengths: int) -> PackedSeqParams:
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams("thd", borders, borders, max_seqlen_q=longest, max_seqlen_kv=longest)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents_do_not_see_each_other(window: int | None) -> None:
    lengths = (5, 1, 7)
    ours = inputs(13, batch=None)
    document = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    seen = causal(13, window) & (document[:, None] == document[None, :])
    theirs = tuple(tensor.detach().clone().requires_grad_() for tensor in ours)
    out = build(window)(*ours, attention_mask=None, packed_seq_params=packed(*lengths))
    right = explicit(tuple(tensor[:, None] for tensor in theirs), seen)[:, 0]  # type: ignore[arg-type]
    assert out.shape == (13, HEADS, WIDTH)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    right.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_refuses_masks_and_other_attentions() -> None:
    with pytest.raises(RequestError, match="no explicit mask or bias"):
        build()(*inputs(4), attention_mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(RequestError, match="no explicit mask or bias"):
        build()(*inputs(4), attention_mask=None, attention_bias=torch.zeros(4, 4))
    with pytest.raises(RequestError, match="not padding"):
        build(attn_mask_type=AttnMaskType.padding)
    with pytest.raises(RequestError, match="causal self-attention"):
        build(attention_type="cross")


def test_refuses_what_a_ring_of_context_ranks_lacks() -> None:
    shared = SimpleNamespace(cp=SimpleNamespace(size=lambda: 2))
    with pytest.raises(RequestError, match="context parallelism .* sliding window"):
        build(pg_collection=shared, window=4)
    with pytest.raises(RequestError, match="context parallelism .* attention dropout"):
        build(pg_collection=shared, dropout=0.1)
    build(pg_collection=shared)


def with_dropout() -> dict[str, bool]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel()
    attention, given = build(dropout=0.5), [tensor.detach() for tensor in inputs(6)]
    results = []
    for seed in (1, 1, 2):
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        results.append(attention(*given, attention_mask=None))
    cpu = torch.get_rng_state()
    attention(*given, attention_mask=None)
    stayed = torch.equal(cpu, torch.get_rng_state())
    attention.eval()
    return {
        "same seed": torch.equal(results[0], results[1]),
        "other seed": not torch.equal(results[0], results[2]),
        "cpu stream stays": stayed,
        "none in evaluation": torch.equal(attention(*given, attention_mask=None), build()(*given, attention_mask=None)),
    }


def test_dropout_draws_from_the_tensor_parallel_stream(ranks: RankPool) -> None:
    said = ranks.run(1, with_dropout)[0]
    assert all(said.values()), said
