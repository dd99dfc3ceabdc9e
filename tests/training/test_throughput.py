"""Model FLOPs utilisation by hand, and the table of peaks."""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from training.throughput import Throughput, device_peak

MODEL = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, vocab_size=None
)
VOCABULARY, LENGTH = 256, 32


def flops_by_hand(pairs: float) -> float:
    """3 x (2 per weight that multiplies + 4 x width x attended pairs): forward once, backward twice."""
    width = 64 // 4
    attention = 64 * (64 + 2 * 2 * width) + 64 * 64
    weights = 2 * (attention + 3 * 64 * 96) + 64 * VOCABULARY
    return 3 * (2 * weights + 2 * 4 * 64 * pairs)


def test_flops_of_both_conventions() -> None:
    throughput = Throughput.of(MODEL, VOCABULARY, LENGTH, world_size=4)
    assert throughput.full_flops == pytest.approx(flops_by_hand(LENGTH), rel=1e-12)
    assert throughput.causal_flops == pytest.approx(flops_by_hand(LENGTH / 2), rel=1e-12)


def test_no_utilisation_where_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "cpu")
    throughput = Throughput.of(MODEL, VOCABULARY, LENGTH, world_size=4)
    assert throughput.peak is None and throughput.mfu(1e6) == (None, None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peak_by_the_drivers_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    assert device_peak() == peak


def test_utilisation_counts_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    throughput = Throughput.of(MODEL, VOCABULARY, LENGTH, world_size=8)
    rate = 0.4 * 8 * 989e12 / flops_by_hand(LENGTH / 2)
    causal, full = throughput.mfu(rate)
    assert causal == pytest.approx(0.4) and full is not None and full > 0.4
