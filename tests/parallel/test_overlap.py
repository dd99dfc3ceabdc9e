"""What is hidden under computation: presets, what each needs, and what is refused where it cannot run."""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from foundation.errors import ConfigError
from launch.alignment_run import refuse_one_shape
from launch.config import config_from
from launch.device_environment import QUEUES, check_environment, needed_environment, set_environment
from launch.overlap_checks import graphs_have_one_shape, user_buffers_hold_the_type
from model.config import ModelConfig
from model.core_config import core_config
from model.kernels.choice import TORCH
from parallel import groups
from parallel.config import ParallelConfig
from parallel.layout import ParallelLayout
from parallel.tensor_overlap import make_user_buffers

VALUES: dict[str, Any] = {
    "run": {"folder": "run"},
    "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 32, "num_attention_heads": 2},
    "data": {"sources": ["orthant:demo"], "tokenizer": {"kind": "byte-bpe", "vocab_size": 512}},
    "training": {"train_steps": 4, "global_batch_size": 2, "seq_length": 16},
    "optimizer": {"lr": 1e-3},
}
FLAGS = ("overlap_grad_reduce", "overlap_param_gather", "tp_comm_overlap", "cuda_graphs")


def flags(**given: Any) -> tuple[bool, ...]:
    config = ParallelConfig.model_validate(given)
    again = ParallelConfig.model_validate(config.model_dump())
    assert again == config  # what is shown is what runs
    layout = ParallelLayout.from_config(config)
    assert tuple(getattr(layout, name) for name in FLAGS) == tuple(getattr(config, name) for name in FLAGS)
    return tuple(getattr(config, name) for name in FLAGS)


TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (False, False, False, False)),
        ({"overlap": "none"}, (False, False, False, False)),
        ({"overlap": "data_parallel"}, (True, True, False, False)),
        ({"overlap": "data_parallel", "zero_stage": 0}, (True, False, False, False)),
        ({"overlap": "data_parallel", "overlap_param_gather": False}, (True, False, False, False)),
        ({"overlap": "data_parallel", **TP}, (True, True, False, False)),
        ({"overlap": "full"}, (True, True, False, True)),
        ({"overlap": "full", **TP}, (True, True, True, True)),
        ({"overlap": "full", **TP, "cuda_graphs": False}, (True, True, True, False)),
    ],
)
def test_presets(given: dict[str, Any], expected: tuple[bool, ...]) -> None:
    assert flags(**given) == expected


def test_sharded_weights_overlap_by_themselves() -> None:
    config = ParallelConfig.model_validate({"overlap": "full", "zero_stage": 3, "data_parallel_size": 2})
    assert not any(getattr(config, name) for name in FLAGS)


def test_tensor_overlap_needs_sequence_parallel() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel is false"):
        ParallelConfig(tensor_model_parallel_size=2, tp_comm_overlap=True)


def test_core_is_told() -> None:
    model = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=32, num_attention_heads=2)
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True,
                            cuda_graphs=True)  # fmt: skip
    core = core_config(model, layout, "bf16", TORCH)
    assert core.tp_comm_overlap and core.cuda_graph_impl == "local" and core.cuda_graph_scope == []
    plain = core_config(model, ParallelLayout(), "bf16", TORCH)
    assert not plain.tp_comm_overlap and plain.cuda_graph_impl == "none"
    # What a stage hands on is a graph's own memory, which core may not give back.
    assert plain.deallocate_pipeline_outputs and not core.deallocate_pipeline_outputs


@pytest.mark.parametrize(
    ("fp8", "bf16", "kinds"), [(False, True, ["none"]), (True, False, ["fp8"]), (True, True, ["fp8", "none"])]
)
def test_user_buffers_are_made_once(fp8: bool, bf16: bool, kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    base = ModuleType("base")

    def initialize_ub(**options: Any) -> None:
        made.append(options)
        base._ub_communicators = {"qkv": 1}  # type: ignore[attr-defined]

    base.initialize_ub = initialize_ub  # type: ignore[attr-defined]
    base.tex = SimpleNamespace(device_supports_multicast=lambda: True)  # type: ignore[attr-defined]
    base.UserBufferQuantizationMode = SimpleNamespace(FP8="fp8", NONE="none")  # type: ignore[attr-defined]
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)
    make_user_buffers(ParallelLayout(), tokens=64, hidden_size=32, fp8=False, bf16=True)
    assert not made
    for _ in range(2):
        make_user_buffers(layout, tokens=64, hidden_size=32, fp8=fp8, bf16=bf16)
    assert made == [{"shape": [64, 32], "tp_size": 2, "quantization_modes": kinds, "ub_cfgs": {},
                     "bootstrap_backend": "nccl"}]  # fmt: skip


@pytest.mark.parametrize(
    ("multicast", "told", "left"), [(False, None, "1"), (True, None, None), (False, "0", "0"), (True, "1", "1")]
)
def test_cards_without_multicast_write_to_each_other(
    monkeypatch: pytest.MonkeyPatch, multicast: bool, told: str | None, left: str | None
) -> None:
    seen: list[str | None] = []
    base = SimpleNamespace(
        initialize_ub=lambda **_: seen.append(os.environ.get("UB_SKIPMC")),
        tex=SimpleNamespace(device_supports_multicast=lambda: multicast),
        UserBufferQuantizationMode=SimpleNamespace(FP8="fp8", NONE="none"),
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)
    monkeypatch.setenv("UB_SKIPMC", told or "")
    if told is None:
        monkeypatch.delenv("UB_SKIPMC")
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)
    make_user_buffers(layout, tokens=64, hidden_size=32, fp8=False, bf16=True)
    assert seen == [left]


def test_the_environment_follows_the_layout() -> None:
    tensor = ParallelLayout(tensor_model_parallel_size=2)
    sharded = ParallelLayout(data_parallel_size=2, zero_stage=3)
    assert QUEUES not in needed_environment(ParallelLayout(data_parallel_size=8))
    assert needed_environment(tensor)[QUEUES] == "1" and needed_environment(sharded)[QUEUES] == "8"
    assert needed_environment(ParallelLayout(cuda_graphs=True))["NCCL_GRAPH_REGISTER"] == "0"
    own = {QUEUES: "4"}
    set_environment(tensor, own)
    assert own == {QUEUES: "4", "NCCL_DEBUG": "WARN"}
    check_environment(tensor, {QUEUES: "1"})
    with pytest.raises(ConfigError, match="one at a time"):
        check_environment(sharded, {QUEUES: "1"})


@pytest.mark.parametrize("name", ["cuda_graphs", "tp_comm_overlap"])
def test_post_training_has_rows_of_many_lengths(name: str) -> None:
    refuse_one_shape("critic.parallel", ParallelLayout())
    with pytest.raises(ConfigError) as caught:
        refuse_one_shape("critic.parallel", replace(ParallelLayout(), **{name: True}))
    assert caught.value.field == f"critic.parallel.{name}" and "critic.parallel.overlap=data_parallel" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"precision": "bf16"}, None),
        ({"precision": "fp32"}, "training.precision=bf16"),
        ({"precision": "fp8"}, None),
        ({"precision": "fp8", "fp8": {"recipe": "blockwise"}}, "training.fp8.recipe=current"),
        ({"precision": "fp8", "fp8": {"recipe": "mxfp8"}, "seq_length": 256}, None),
        ({"precision": "fp8", "fp8": {"recipe": "mxfp8"}, "seq_length": 128}, "training.fp8.recipe=current"),
    ],
)
def test_user_buffers_take_bf16_and_some_recipes(settings: dict[str, Any], cure: str | None) -> None:
    training = {"train_steps": 4, "global_batch_size": 2, "seq_length": 16} | settings
    config = config_from(VALUES | {"training": training})
    layout = ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True)
    user_buffers_hold_the_type(config, replace(layout, tp_comm_overlap=False))
    if cure is None:
        return user_buffers_hold_the_type(config, layout)
    with pytest.raises(ConfigError) as caught:
        user_buffers_hold_the_type(config, layout)
    assert caught.value.field == "parallel.tp_comm_overlap" and cure in str(caught.value.cure)


@pytest.mark.parametrize("wanted", [True, False])
def test_graphs_draw_from_streams_that_a_capture_knows(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    """Transformer Engine's attention refuses another tracker while a graph is captured."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(groups, "parallel_state", MagicMock())
    monkeypatch.setattr(groups, "model_parallel_cuda_manual_seed", lambda _seed, **options: asked.update(options))
    with groups.ProcessGroups(ParallelLayout(cuda_graphs=wanted), seed=1):
        assert asked["te_rng_tracker"] is asked["use_cudagraphable_rng"] is wanted


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("data", "document_mask", True), ("model", "hidden_dropout", 0.1), ("model", "num_experts", 4),
     ("training", "recompute_granularity", "full")],
)  # fmt: skip
def test_graphs_have_one_shape(section: str, field: str, value: Any) -> None:
    values = deepcopy(VALUES)
    graphs = ParallelLayout(cuda_graphs=True)
    graphs_have_one_shape(config_from(values), graphs)
    values[section][field] = value
    graphs_have_one_shape(config_from(values), ParallelLayout())
    with pytest.raises(ConfigError, match="cuda_graphs") as caught:
        graphs_have_one_shape(config_from(values), graphs)
    assert caught.value.field == f"{section}.{field}"
