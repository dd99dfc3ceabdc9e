"""A faster device never makes a step longer, nor a longer sequence or a larger batch a shorter one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from foundation.accelerators import Device, find_device
from launch.config import load_config
from launch.planner.job import Job
from launch.planner.memory import fullest_stage
from launch.planner.search import search
from launch.planner.step_time import step_time

PRESETS = Path(__file__).parents[3] / "configs" / "presets"
ROUNDING = 1 + 1e-9


def faster(device: Device) -> Iterator[Device]:
    for name in ("scale_up_gb_per_s", "scale_out_gb_per_s", "memory_gb_per_s"):
        yield replace(device, **{name: 1.5 * getattr(device, name)})
    yield replace(device, tflops={kind: 1.5 * peak for kind, peak in device.tflops.items()})


def longer(job: Job) -> Iterator[Job]:
    yield replace(job, seq_length=2 * job.seq_length)
    yield replace(job, global_batch_size=2 * job.global_batch_size)


@pytest.mark.parametrize(
    ("preset", "gpus", "gpu"),
    [("llama3_8b", 64, "h100"), ("llama3_8b", 512, "h100"), ("qwen3_30b_a3b", 64, "a100"), ("llama3_70b", 64, "b200")],
)
def test_more_of_what_a_step_takes_is_never_slower(preset: str, gpus: int, gpu: str) -> None:
    """Also where gathering weights under ZeRO-3 hides computing, or is hidden by it."""
    found = search(load_config(PRESETS / f"{preset}.yaml"), find_device(gpu), gpus, 128256).choices
    assert {choice.candidate.zero for choice in found} == {1, 3}
    for choice in found:
        seconds, layout = step_time(choice.job).total, choice.candidate.describe()
        for device in faster(choice.job.device):
            assert step_time(replace(choice.job, device=device)).total <= seconds * ROUNDING, layout
        for job in longer(choice.job):
            assert step_time(job).total * ROUNDING >= seconds, layout
            assert fullest_stage(job).total >= choice.memory.total, layout
