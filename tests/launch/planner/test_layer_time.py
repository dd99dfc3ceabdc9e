"""Where a layer's time goes: launches that a device hides or not, state-space scans, experts' software by its year."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foundation.accelerators import find_device
from launch.planner.coefficients import TimeCoefficients, time_coefficients
from launch.planner.job import Job
from launch.planner.layer_time import LayerTime, layer_time
from launch.planner.table import understand

KNOWN = replace(time_coefficients(), layer_seconds=1e-3, expert_layer_seconds=2e-3, local_expert_seconds=1e-4)


def job(model: str, gpu: str = "h100", **fields: str) -> Job:
    row = {"model": model, "gpu": gpu, "tp": "1", "pp": "1", "num_gpus": "8", "mbs": "1", "gbs": "64", "seq": "4096"}
    return understand(row | fields).job


def of(given: Job, known: TimeCoefficients = KNOWN) -> LayerTime:
    return layer_time(given, known)


def test_a_busy_device_hides_launches_of_dense_layers() -> None:
    large = of(job("llama3-8b"))
    assert large.launches < 0.005 * large.total


def test_a_device_that_is_done_early_waits_for_launches_of_dense_layers() -> None:
    small = of(job("a llama", layers="24", hidden="512", vocab="8192", seq="256"))
    assert small.total == pytest.approx(24 * 1e-3, rel=0.01)
    twice = of(job("a llama", layers="24", hidden="512", vocab="8192", seq="256", mbs="2"))
    assert twice.total == pytest.approx(small.total, rel=0.01)


def test_launches_of_layers_with_experts_add_up() -> None:
    alone, eight = of(job("mixtral-8x7b")), of(job("mixtral-8x7b", ep="8"))
    assert alone.launches == pytest.approx(32 * (2e-3 + 8 * 1e-4) * older(2025.0))
    assert eight.launches == pytest.approx(32 * (2e-3 + 1e-4) * older(2025.0))


def test_a_cpu_hides_no_launches() -> None:
    found = of(job("llama3-8b", "cpu"))
    assert found.launches == pytest.approx(32 * 1e-3)


def older(year: float) -> float:
    return KNOWN.older_software ** (2026.0 - year)


def test_experts_get_quicker_with_years_that_were_measured() -> None:
    given = job("mixtral-8x7b", ep="8")
    then, later = of(replace(given, year=2025.5)), of(replace(given, year=2026.5))
    for part in ("launches", "expert_parallel"):
        assert getattr(then, part) / getattr(later, part) == pytest.approx(KNOWN.older_software), part
    assert then.memory > later.memory
    assert (then.matrices, then.attention) == (later.matrices, later.attention)
    assert of(replace(given, year=2019.0)) == of(replace(given, year=2025.0))
    assert of(replace(given, year=2031.0)) == of(replace(given, year=2026.7))
    dense = job("llama3-8b")
    assert of(replace(dense, year=2025.5)) == of(replace(dense, year=2026.5))


def test_scans_take_the_operations_and_bytes_that_were_counted() -> None:
    given = job("nemotron-h-8b")
    model = given.architecture
    without = replace(given, architecture=replace(model, state_layers=0))
    free = replace(KNOWN, state_elements=1e-12)
    channels = model.state_layers * model.state_width * given.local_tokens
    rate = given.device.peak("bf16") * KNOWN.efficiency_attention_hopper
    assert of(given).attention - of(without).attention == pytest.approx(channels * 3072 / rate)
    moved = KNOWN.state_elements * KNOWN.element_bytes / (3350e9 * KNOWN.efficiency_memory)
    assert of(given).memory - of(given, free).memory == pytest.approx(channels * moved)


def test_narrow_heads_have_as_many_scores_for_fewer_operations() -> None:
    given = job("llama3-8b")
    model = given.architecture

    def attention(width: int, gpu: str = "h100") -> float:
        cut = replace(model, head_width=width, heads=model.query_width // width)
        return of(replace(given, architecture=cut, device=find_device(gpu))).attention

    assert attention(64) == pytest.approx(4 / 3 * attention(128))
    assert attention(256) == pytest.approx(attention(128))
    assert attention(64, "cpu") == pytest.approx(attention(128, "cpu"))
