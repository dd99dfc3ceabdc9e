"""What megatron-core asks of torch.cuda, answered by the CPU platform."""

from __future__ import annotations

import time
import types
from typing import Any

import pytest
import torch

from foundation.errors import RequestError
from tests.ranks import RankFailure, RankPool


def device_answers() -> dict[str, Any]:
    torch.cuda.set_device(3)
    with torch.cuda.device(1):
        inside = torch.cuda.current_device()
    return {
        "device": str(torch.device(torch.cuda.current_device())),
        "inside": str(inside),
        "initialised": torch.cuda.is_initialized(),
        "capability": torch.cuda.get_device_capability(),
        "name": torch.cuda.get_device_name(),
        "memory": torch.cuda.get_device_properties(0).total_memory > 1 << 20,
        "capturing": torch.cuda.is_current_stream_capturing(),
    }


def test_the_device_is_the_cpu(ranks: RankPool) -> None:
    assert ranks.run(1, device_answers)[0] == {
        "device": "cpu",
        "inside": "cpu",
        "initialised": True,
        "capability": (0, 0),
        "name": "cpu",
        "memory": True,
        "capturing": False,
    }


def stream_answers() -> dict[str, Any]:
    stream, first, second = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    began = time.perf_counter()
    first.record()
    with torch.cuda.stream(stream), stream:
        value = torch.ones(2) * 2
        time.sleep(0.01)
    second.record(stream)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.nvtx.range("part"):
        torch.cuda.nvtx.range_push("inner")
        torch.cuda.nvtx.range_pop()
    return {
        "value": value.tolist(),
        "milliseconds": first.elapsed_time(second),
        "around": 1e3 * (time.perf_counter() - began),
        "done": stream.query() and stream.record_event().query(),
        "handle": torch.cuda.current_stream().cuda_stream,
    }


def test_streams_and_events_measure_the_wall_clock(ranks: RankPool) -> None:
    said = ranks.run(1, stream_answers)[0]
    assert said["value"] == [2.0, 2.0] and said["done"] and said["handle"] == 0
    assert 9.0 < said["milliseconds"] <= said["around"]


def elapsed_without_record() -> None:
    torch.cuda.Event().elapsed_time(torch.cuda.Event())


def test_an_event_that_was_not_recorded_has_no_time(ranks: RankPool) -> None:
    with pytest.raises(RankFailure, match="needs both events recorded"):
        ranks.run(1, elapsed_without_record)


def memory_answers() -> tuple[Any, ...]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    counted = (torch.cuda.memory_allocated(), torch.cuda.max_memory_reserved(), torch.cuda.memory_stats()["any key"])
    return counted, 0 < free <= total


def test_memory_is_the_machines(ranks: RankPool) -> None:
    assert ranks.run(1, memory_answers)[0] == ((0, 0, 0), True)


FACTORIES: dict[str, Any] = {
    "torch.tensor": lambda device: torch.tensor([1.0], device=device),
    "torch.as_tensor": lambda device: torch.as_tensor([1.0], device=device),
    "torch.empty": lambda device: torch.empty(2, device=device),
    "torch.zeros": lambda device: torch.zeros(2, device=device, pin_memory=True),
    "torch.full": lambda device: torch.full((2,), 1.0, device=device),
    "torch.arange": lambda device: torch.arange(3, device=device),
    "torch.rand": lambda device: torch.rand(2, device=device),
    "torch.randn": lambda device: torch.randn(2, device=device),
    "torch.randint": lambda device: torch.randint(3, (2,), device=device),
    "torch.zeros_like": lambda device: torch.zeros_like(torch.ones(2), device=device),
    "torch.empty_strided": lambda device: torch.empty_strided((2,), (1,), device=device),
    "Tensor.new_zeros": lambda device: torch.ones(1).new_zeros(2, device=device),
    "Tensor.new_tensor": lambda device: torch.ones(1).new_tensor([2.0], device=device),
    "Tensor.to": lambda device: torch.ones(1).to(device),
    "Tensor.to, by name": lambda device: torch.ones(1).to(device=device, dtype=torch.bfloat16),
    "Tensor.cuda": lambda device: torch.ones(1).cuda(),
    "Tensor.pin_memory": lambda device: torch.ones(1).pin_memory(),
    "Module.to": lambda device: torch.nn.Linear(2, 2).to(device).weight,
    "Module.cuda": lambda device: torch.nn.Linear(2, 2).cuda().weight,
}
SPELLINGS: tuple[Any, ...] = ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), 0)


def devices_of_factories() -> dict[str, set[str]]:
    return {name: {str(make(device).device) for device in SPELLINGS} for name, make in FACTORIES.items()}


def test_tensors_asked_for_on_cuda_lie_on_the_cpu(ranks: RankPool) -> None:
    said = ranks.run(1, devices_of_factories)[0]
    assert said == {name: {"cpu"} for name in FACTORIES}


def tensors_on_meta() -> tuple[str, str, str]:
    made = torch.zeros(2, device="meta")
    return str(made.device), str(torch.ones(1).to("meta").device), str(made.new_empty(1).device)


def test_other_devices_are_left_alone(ranks: RankPool) -> None:
    assert ranks.run(1, tensors_on_meta)[0] == ("meta", "meta", "meta")


def moved_dtype() -> tuple[str, str]:
    return str(torch.ones(1).to(torch.bfloat16).dtype), str(torch.ones(1).to("cuda", torch.float64).dtype)


def test_moves_still_convert(ranks: RankPool) -> None:
    assert ranks.run(1, moved_dtype)[0] == ("torch.bfloat16", "torch.float64")


def type_names() -> tuple[Any, ...]:
    single: Any = torch.ones(1)
    return single.type(), single.bfloat16().type(), single.type(torch.int64).dtype


def test_type_names_are_those_that_cores_optimizer_knows(ranks: RankPool) -> None:
    assert ranks.run(1, type_names)[0] == ("torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor", torch.int64)


def capture_a_graph(name: str) -> None:
    getattr(torch.cuda, name)()


@pytest.mark.parametrize("name", ["CUDAGraph", "graph", "make_graphed_callables"])
def test_cuda_graphs_are_refused_by_name(ranks: RankPool, name: str) -> None:
    with pytest.raises(RankFailure, match="CUDA graphs need a GPU") as caught:
        ranks.run(1, capture_a_graph, name)
    assert isinstance(caught.value.first, RequestError) or "RequestError" in str(caught.value)


def test_libraries_that_name_cuda_classes_in_annotations_can_be_imported() -> None:
    assert isinstance(torch.cuda.CUDAGraph | None, types.UnionType)
    assert isinstance(torch.cuda.Stream | torch.cuda.Event, types.UnionType)


def ask_what_has_no_stand_in() -> None:
    torch.cuda.memory_snapshot()
    torch.cuda.list_gpu_processes()
    torch.cuda.utilization()


def test_what_has_no_stand_in_is_loud(ranks: RankPool) -> None:
    with pytest.raises(RankFailure):
        ranks.run(1, ask_what_has_no_stand_in)
