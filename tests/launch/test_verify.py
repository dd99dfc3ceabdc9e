"""`orthant verify`: what it makes of a configuration, and its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foundation.errors import ConfigError, RequestError
from launch.checks import check_sizes
from launch.commands import verify as command
from launch.config import RunConfig, config_from, load_config
from launch.shrink import VOCABULARY, Devices, Shrunk, shrink
from launch.verification import Compared, UnevenDocuments, bounds_for
from model.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs/tiny.yaml"


def config(model: dict[str, Any], parallel: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A configuration whose corpus is nowhere: verifying needs none."""
    values: dict[str, Any] = {
        "run": {"folder": "runs/x"},
        "model": model,
        "parallel": parallel,
        "data": {"sources": ["nowhere"], "tokenizer": {"path": "nowhere"}},
        "training": {"train_steps": 100, "global_batch_size": 1536, "micro_batch_size": 1, "seq_length": 512},
        "optimizer": {"lr": 1e-3},
    }
    return config_from({name: {**values.get(name, {}), **given} for name, given in {**values, **sections}.items()})


def sizes(tp: int = 1, pp: int = 1, dp: int | None = 1, **more: Any) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "data_parallel_size": dp,
        "sequence_parallel": tp > 1,
        **more,
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("max_ranks", [2, 4, 8])
def test_every_preset_shrinks_and_keeps_what_it_is(preset: str, tp: int, max_ranks: int) -> None:
    whole = config({"preset": preset}, sizes(tp, 2 if PRESETS[preset]["num_layers"] % 2 == 0 else 1, 4))
    try:
        check_sizes(whole, world_size=None)
    except ConfigError:
        pytest.skip("the preset itself can't be cut so")
    small = shrink(whole, Devices.cpu(max_ranks))
    model, before = small.config.model, whole.model
    assert small.layout.world_size <= max_ranks
    assert model.num_layers <= 8 and model.num_attention_heads <= 128
    for feature in ("qk_layernorm", "add_qkv_bias", "share_embeddings_and_output_weights", "rotary_base"):
        assert getattr(model, feature) == getattr(before, feature)
    for feature in ("rope_scaling", "window_size"):
        assert (getattr(model, feature) is None) == (getattr(before, feature) is None)
    ratio = before.num_attention_heads // before.query_groups
    assert model.num_attention_heads // model.query_groups >= ratio
    assert model.padded_vocab_size(VOCABULARY, 2) > VOCABULARY


@pytest.mark.parametrize(
    ("parallel", "max_ranks", "verified", "said"),
    [
        (sizes(2, 2, 1), 8, "TP2 x PP2 x DP1", ""),
        (sizes(2, 2, 2), 8, "TP2 x PP2 x DP2", ""),
        (sizes(2, 2, 64), 8, "TP2 x PP2 x DP2", "2 replicas in place of 64"),
        (sizes(8, 4, 2), 8, "TP2 x PP2 x DP2", "tensor-parallel size 2 in place of 8"),
        (sizes(8, 4, 2), 16, "TP4 x PP2 x DP2", "pipeline-parallel size 2 in place of 4"),
        (sizes(4, 1, 1), 8, "TP4 x PP1 x DP1", ""),
        (sizes(2, 2, 2), 4, "TP2 x PP2 x DP1", "one replica only"),
        (sizes(2, 2, 2), 2, "TP2 x PP1 x DP1", "pipeline-parallel size 1 in place of 2"),
        (sizes(2, 1, None, overlap_grad_reduce=True), 8, "TP2 x PP1 x DP2", "left to the world"),
        (sizes(2, 1, 4, context_parallel_size=4), 8, "TP2 x CP2 x PP1 x DP2", "context-parallel size 2 in place of 4"),
        (sizes(1, 1, 1), 8, "TP1 x PP1 x DP1", "both runs are the same"),
    ],
)
def test_a_layout_fits_into_the_ranks_and_says_what_changed(
    parallel: dict[str, Any], max_ranks: int, verified: str, said: str
) -> None:
    small = shrink(config({"preset": "llama3_8b"}, parallel), Devices.cpu(max_ranks))
    assert small.layout.describe() == verified
    assert said in "; ".join(small.notes)
    assert bool(said) == bool(small.notes)


def test_parallel_options_stay() -> None:
    options = {"zero_stage": 0, "overlap_grad_reduce": True, "grad_reduce_in_fp32": False}
    layout = shrink(config({"preset": "llama3_8b"}, sizes(2, 1, 2, **options)), Devices.cpu(8)).layout
    assert layout.sequence_parallel and layout.overlap_grad_reduce
    assert (layout.zero_stage, layout.grad_reduce_in_fp32) == (0, False)


def test_uneven_stages_stay_uneven() -> None:
    parallel = sizes(1, 4, 1, pipeline_layers=(7, 9, 9, 7))
    whole = config({"preset": "llama3_8b"}, parallel)
    assert shrink(whole, Devices.cpu(8)).layout.pipeline_layers == (1, 2, 2, 1)
    parallel = sizes(2, 4, 1, pipeline_layers=(6, 9, 9, 8))
    halved = shrink(config({"preset": "llama3_8b"}, parallel), Devices.cpu(4))
    assert halved.layout.pipeline_layers == (1, 2) and halved.config.model.num_layers == 3


@pytest.mark.parametrize(
    ("layers", "parallel", "asked", "verified"),
    [
        (6, sizes(1, 2), 3, 2),
        (8, sizes(1, 2), 2, 2),
        (8, sizes(1, 4), 2, 2),
        (32, sizes(1, 8), 4, 1),
        (14, sizes(1, 2, pipeline_layers=[6, 8]), 2, 1),
    ],
)
def test_recomputed_layers_fit_the_small_stages(
    layers: int, parallel: dict[str, Any], asked: int, verified: int
) -> None:
    recomputed = {"recompute_granularity": "full", "recompute_num_layers": asked}
    small = shrink(
        config({"preset": "llama3_8b", "num_layers": layers}, parallel, training=recomputed), Devices.cpu(8)
    ).config
    assert small.training.recompute_granularity == "full" and small.training.recompute_num_layers == verified


def test_what_is_profiled_is_no_part_of_the_proof() -> None:
    profiled = {"steps": "90-92", "ranks": "0,17", "timeline": "95"}
    assert (
        shrink(config({"preset": "llama3_8b"}, sizes(2, 1, 16), profile=profiled), Devices.cpu(8)).config.profile.steps
        is None
    )


def test_ranks_that_share_a_key_value_head_still_do() -> None:
    model = {"preset": "llama3_8b", "num_query_groups": 2}
    small = shrink(config(model, sizes(4, 1, 1)), Devices.cpu(8))
    assert small.layout.tp == 4 and small.config.model.query_groups == 2


def test_a_configuration_that_cannot_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="parallel.tensor_model_parallel_size"):
        shrink(config({"preset": "llama3_8b"}, sizes(3, 1, 1)), Devices.cpu(8))


@pytest.mark.parametrize("mask", [False, True])
def test_batches_are_the_same_at_every_data_parallel_size_and_uneven(mask: bool) -> None:
    rules = {"document_mask": mask, "eod_mask_loss": True}
    data = {"sources": ["nowhere"], "tokenizer": {"path": "nowhere"}, **rules}
    small = shrink(config({"preset": "llama3_8b"}, sizes(1, 2, 2), data=data), Devices.cpu(8)).config
    whole, halves = (list(UnevenDocuments(small)(1, 0, 1)), [list(UnevenDocuments(small)(1, r, 2)) for r in (0, 1)])
    for number, batch in enumerate(whole):
        other = halves[number % 2][number // 2]
        assert np.array_equal(batch.tokens, other.tokens) and np.array_equal(batch.loss_mask, other.loss_mask)
        assert (batch.document_lengths is not None) == mask
        assert batch.tokens.max() < VOCABULARY
        assert not batch.loss_mask[batch.tokens == 0].any()
    counted = [float(batch.loss_mask.sum()) for batch in whole]
    assert len(set(counted)) > 2 and sum(counted[::2]) != sum(counted[1::2])


def answer(monkeypatch: pytest.MonkeyPatch, *found: Compared, as_json: bool = False) -> int:
    """The command on the demo layout, with `found` for what its ranks computed."""
    monkeypatch.setattr(command, "compare_with_one_rank", lambda *_, **__: list(found))
    return command.verify(ROOT / "configs/demo.yaml", [], max_ranks=8, device="cpu", as_json=as_json)


LOSS = Compared("fp32", "loss", "step 1", 1e-7, 1e-5)
GRADIENT = Compared("fp32", "gradient", "output_layer.weight", 2e-2, 1e-5)


def test_a_difference_is_named_and_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(monkeypatch, LOSS, GRADIENT) == 3
    shown = capsys.readouterr().out
    assert "fp32: gradient of output_layer.weight: 2.0e-02 is above 1e-05" in shown
    assert "TP2 x PP2 x DP1 DIFFERS from one rank" in shown


def test_what_is_not_finite_differs_and_stays_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer(monkeypatch, LOSS, Compared("fp32", "gradient", "x", float("inf"), 1e-5), as_json=True) == 3
    said = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not said["equal"] and said["checks"][1]["over"] == ["x"] and said["checks"][1]["worst"] is None


def test_equal_layouts_exit_with_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(monkeypatch, LOSS) == 0
    assert "TP2 x PP2 x DP1 equals one rank" in capsys.readouterr().out


def test_bf16_runs_are_compared_in_fp32_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compare(*given: Any, on_gpus: bool) -> list[Compared]:
        assert not on_gpus
        asked.append(given[2])
        return [LOSS]

    monkeypatch.setattr(command, "compare_with_one_rank", compare)
    for precision in ("fp32", "bf16"):
        command.verify(TINY, [f"training.precision={precision}"], max_ranks=8, device="cpu", as_json=True)
    assert asked == [["fp32"], ["fp32", "bf16"]]
    # There a rounding sends tokens to other experts.
    command.verify(TINY, ["training.precision=bf16", "model.num_experts=4"], max_ranks=8, device="cpu", as_json=True)
    assert asked[-1] == ["fp32"]


GPUS = Devices(4, "4 GPUs", gpus=True)


def test_on_gpus_the_kernels_of_the_run_stay() -> None:
    kernels = {"kernels": "auto", "kernel_overrides": {"attention": "torch"}}
    whole = config({"preset": "llama3_8b", **kernels}, sizes(2, 2, 2, cuda_graphs=True))
    there, here = (shrink(whole, devices) for devices in (GPUS, Devices.cpu(4)))
    assert there.config.model.kernels == "auto" and there.config.model.kernel_overrides.attention == "torch"
    assert here.config.model.kernels == "torch" and here.config.model.kernel_overrides.attention is None
    assert there.config.parallel == here.config.parallel and not there.layout.cuda_graphs
    assert [note for note in there.notes if "to fit 4 GPUs" in note and "one replica only" in note]
    assert [note for note in there.notes if note.startswith("parallel.cuda_graphs is off")]


def test_on_gpus_tensors_are_overlapped_where_bf16_is_compared() -> None:
    asked = sizes(2, 1, 1, sequence_parallel=True, tp_comm_overlap=True)
    base = config({"kernels": "transformer_engine", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128,
                   "num_attention_heads": 4}, asked)  # fmt: skip
    whole = base.model_copy(update={"training": base.training.model_copy(update={"precision": "bf16"})})
    there, here, alone = (shrink(whole, devices) for devices in (GPUS, Devices.cpu(4), Devices(1, "1 GPU", gpus=True)))
    assert there.layout.tp_comm_overlap and not [note for note in there.notes if "tp_comm_overlap" in note]
    assert there.config.training.precision == "bf16" and here.config.training.precision == "fp32"
    assert not here.layout.tp_comm_overlap and not alone.layout.tp_comm_overlap
    experts = whole.model_copy(update={"model": whole.model.model_copy(update={"num_experts": 4})})
    assert [note for note in shrink(experts, GPUS).notes if note.startswith("parallel.tp_comm_overlap is off")]


def test_one_gpu_is_compared_with_one_rank_on_the_cpu() -> None:
    small = shrink(config({"preset": "llama3_8b"}, sizes(2, 2, 2)), Devices(1, "1 GPU", gpus=True))
    assert small.layout.world_size == 1 and not [note for note in small.notes if "both runs are the same" in note]


@pytest.mark.parametrize(
    ("settings", "precisions"),
    [
        (["training.precision=fp32"], ["fp32"]),
        (["training.precision=bf16"], ["bf16"]),
        (["training.precision=bf16", "model.num_experts=4"], ["fp32"]),
        (["training.precision=bf16", "model.num_experts=4", "parallel.context_parallel_size=2"], ["bf16"]),
    ],
)
def test_on_gpus_the_precision_of_the_run_is_compared(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], precisions: list[str]
) -> None:
    asked = []

    def compare(*given: Any, on_gpus: bool) -> list[Compared]:
        asked.append((given[0].parallel.context_parallel_size, given[2], on_gpus))
        return [LOSS]

    monkeypatch.setattr(command, "compare_with_one_rank", compare)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.verify(TINY, settings, max_ranks=8, device="gpu", as_json=True) == 0
    assert asked == [(2 if len(settings) == 3 else 1, precisions, True)]


def test_without_a_gpu_none_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RequestError, match="finds no GPU"):
        command.verify(TINY, [], max_ranks=8, device="gpu", as_json=False)


def test_a_gpu_may_round_where_a_cpu_does_not() -> None:
    plain, gpu = (bounds_for("fp32", same_roundings=False, on_gpu=on_gpu) for on_gpu in (False, True))
    assert plain.gradient < gpu.gradient < bounds_for("bf16", same_roundings=False, on_gpu=True).gradient


def test_a_rank_does_not_start_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in announced.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match="one of several ranks"):
        command.verify(TINY, [], max_ranks=8, device="cpu", as_json=False)


def orthant_verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command on the tiny configuration at TP2; modules in `folder` are found first."""
    return subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "launch",
            "verify",
            str(TINY),
            "parallel.tensor_model_parallel_size=2",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        check=False,
    )


def test_tensor_parallel_ranks_equal_one_rank(tmp_path: Path) -> None:
    ran = orthant_verify(tmp_path, "training.precision=bf16", "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = json.loads(ran.stdout)
    assert said["equal"] and said["verified"] == "TP2 x PP1 x DP1"
    assert {(check["precision"], check["kind"]) for check in said["checks"]} == {
        (precision, kind) for precision in ("fp32", "bf16") for kind in ("loss", "gradient norm", "gradient", "weight")
    }
    assert any(check["worst"] > 0 for check in said["checks"]), "nothing was computed twice"


FAULT = """
import os, sys
if "launch.rank" in sys.orig_argv and os.environ["WORLD_SIZE"] == "2":
    from parallel.platform import install
    install()
    import training.objective as objective
    correct = objective._masked_sum
    objective._masked_sum = lambda mask, losses: correct(mask * 0 + 1, losses)
"""


def test_a_fault_in_the_layout_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    ran = orthant_verify(tmp_path)
    assert ran.returncode == 3, ran.stdout + ran.stderr
    assert "fp32: loss of step 1" in ran.stdout and "DIFFERS" in ran.stdout


def test_what_was_asked_for_is_told_beside_what_was_verified(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "compare_with_one_rank", lambda *_, **__: [LOSS])
    path = ROOT / "configs/presets/llama3_70b.yaml"
    assert command.verify(path, ["parallel.data_parallel_size=2"], max_ranks=8, device="cpu", as_json=False) == 0
    asked: Shrunk = shrink(load_config(path, ["parallel.data_parallel_size=2"]), Devices.cpu(8))
    shown = capsys.readouterr().out
    assert f"TP2 x PP2 x DP2, in place of {asked.asked}" in shown
    assert "note     tensor-parallel size 2 in place of 8" in shown
