"""The doctor on machines with GPUs: made-up facts, and a CPU in the place of a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch import rates
from launch.diagnosis import gpus_at_work as at_work
from launch.diagnosis.gpus_at_work import GpuFacts, gather, gpus_at_work, judge
from launch.diagnosis.kernels import chosen_kernels

H200 = GpuFacts(
    name="NVIDIA H200",
    capability=(9, 0),
    driver_cuda=13000,
    torch_cuda="13.0",
    cudnn=91900,
    nccl=(2, 28, 9),
    engine={"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0"},
    product=7.8e14,
    copy=4.0e12,
)


def statuses(facts: GpuFacts) -> dict[str, str]:
    return {finding.name: finding.status for finding in judge(facts)}


def test_a_sound_machine() -> None:
    assert set(statuses(H200).values()) == {"ok"}
    text = {finding.name: finding.found for finding in judge(H200)}
    assert text["cuDNN"] == "9.19.0" and text["NCCL"] == "2.28.9"
    assert text["bf16 product"].startswith("780 TFLOP/s, 79%") and "GB/s" in text["copy"]


@pytest.mark.parametrize(
    ("changes", "name", "status"),
    [
        ({"driver_cuda": 12080}, "CUDA", "broken"),
        ({"driver_cuda": 13010, "torch_cuda": "13.2"}, "CUDA", "ok"),
        ({"cudnn": 90100}, "cuDNN", "broken"),
        ({"cudnn": 90100, "engine": {}}, "cuDNN", "ok"),
        ({"cudnn": None}, "cuDNN", "missing"),
        ({"nccl": None}, "NCCL", "broken"),
        ({"engine": H200.engine | {"transformer-engine-torch": "2.10.0"}}, "Transformer Engine's parts", "broken"),
        ({"engine": H200.engine | {"transformer-engine-torch": "2.11.0+cu130"}}, "Transformer Engine's parts", "ok"),
        ({"torch_cuda": "12.8"}, "Transformer Engine's parts", "broken"),
        ({"engine": {"transformer-engine": "2.13.0"}}, "Transformer Engine's parts", "note"),
        ({"product": 3e14}, "bf16 product", "note"),
        ({"copy": 1e12}, "copy", "note"),
        ({"name": "A chip of tomorrow"}, "measured", "note"),
        ({"name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "product": 1e14}, "measured", "note"),
        ({"trouble": "CUDA out of memory"}, "measured", "broken"),
    ],
)
def test_what_is_wrong_is_said_with_its_fix(changes: dict[str, Any], name: str, status: str) -> None:
    found = next(finding for finding in judge(replace(H200, **changes)) if finding.name == name)
    assert found.status == status
    assert found.fix or status == "ok" or name == "measured"


def test_parts_of_another_cuda_are_replaced_by_those_of_torchs() -> None:
    findings = judge(replace(H200, torch_cuda="12.8", driver_cuda=12080))
    fix = next(finding.fix for finding in findings if finding.name == "Transformer Engine's parts")
    assert fix is not None and "core_cu12" in fix and "pip uninstall " in fix and "--force-reinstall" not in fix


def _write_13000(where: Any) -> int:
    where._obj.value = 13000  # what ctypes.byref points to
    return 0


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": SimpleNamespace(cuDriverGetVersion=_write_13000)}.__getitem__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.usefixtures("faked")
def test_facts_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    product, copy = rates.product_rate, rates.copy_rate
    monkeypatch.setattr(rates, "product_rate", lambda _, size: product(cpu, size))
    monkeypatch.setattr(rates, "copy_rate", lambda _, size: copy(cpu, size))
    facts = gather(size=32, copied=1 << 12)
    assert facts.product > 0 and facts.copy > 0 and facts.driver_cuda == 13000 and not facts.trouble
    assert facts.nccl == (2, 28, 9)

    def full(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(rates, "product_rate", full)
    assert gather(size=32, copied=1 << 12).trouble == "CUDA out of memory. Tried to allocate"


@pytest.mark.usefixtures("faked")
def test_a_torch_without_nccl_is_told_and_does_not_end_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise AttributeError("module 'torch._C' has no attribute '_nccl_version'")

    for name in ("product_rate", "copy_rate"):
        monkeypatch.setattr(rates, name, lambda *_: 1.0)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    monkeypatch.setattr(torch.cuda.nccl, "version", absent)
    assert statuses(gather())["NCCL"] == "broken"


def test_the_doctor_measures_where_torch_reaches_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus_at_work() == []
    monkeypatch.setattr(at_work, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(at_work, "gather", lambda: H200)
    assert {finding.name for finding in gpus_at_work()} >= {"CUDA", "NCCL", "bf16 product"}


def test_the_doctor_says_which_kernels_are_chosen() -> None:
    assert chosen_kernels().found.startswith("torch: linear")
