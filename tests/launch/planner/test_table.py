"""Rows of a table as jobs, and `orthant plan predict`."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from launch.cli import main
from launch.planner.prediction import PREDICTED, predict
from launch.planner.step_time import StepTime, step_time
from launch.planner.table import understand

COLUMNS = (
    "source,model,params_b,layers,hidden,ffn,heads,kv_heads,seq,vocab,gpu,num_gpus,tp,pp,vpp,cp,ep,dp,zero,mbs,gbs,"
    "precision,recompute,tflops_per_gpu,mfu_pct,tokens_per_s_per_gpu,step_time_s,note"
).split(",")
MEASURED = ("tflops_per_gpu", "mfu_pct", "tokens_per_s_per_gpu", "step_time_s")


def row(**values: str) -> dict[str, str]:
    given = {"model": "LLAMA3_70B", "gpu": "H100", "num_gpus": "64", "tp": "4", "pp": "4", "seq": "8192", "gbs": "128"}
    return dict.fromkeys(COLUMNS, "") | given | values


def test_measured_columns_are_not_read() -> None:
    blank = predict(row())
    for column in MEASURED:
        assert predict(row(**{column: "12345"})) == blank | {column: "12345"}
    noted = predict(row(note="mem 77GB; HFU 56.7%; sheet also gives Megatron-formula TFLOPs 266.5"))
    assert {name: noted[name] for name in PREDICTED} == {name: blank[name] for name in PREDICTED}


def test_least_of_a_row_is_enough_and_the_rest_is_said() -> None:
    least = dict.fromkeys(COLUMNS, "") | {"model": "Llama 3.1 8B", "gpu": "H100", "tp": "1", "pp": "1"}
    predicted = predict(least)
    assert all(predicted[name] for name in PREDICTED)
    for word in ("GPUs from the layout", "sequences of", "micro-batch of 1", "bf16", "ZeRO-1", "global batch"):
        assert word in predicted["predicted_note"]


@pytest.mark.parametrize(
    ("change", "word"),
    [({"tp": ""}, "tp is blank"), ({"gpu": "abacus"}, "abacus"), ({"model": "?"}, "model"), ({"seq": "long"}, "seq")],
)
def test_a_row_that_cannot_be_understood_says_why(change: dict[str, str], word: str) -> None:
    predicted = predict(row(**change))
    assert predicted["predicted_step_time_s"] == predicted["predicted_fits"] == ""
    assert word in predicted["predicted_note"]


def test_a_batch_that_its_source_lacks_is_one_of_four_million_tokens() -> None:
    noted = row(gbs="2048", note="kernel=torch; GBS not in sheet")
    assert understand(noted).job.global_batch_size == 512
    assert understand(row(gbs="2048")).job.global_batch_size == 2048


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"precision": "fp8-mx"}, "arithmetic", "fp8"),
        ({"precision": "nvfp4"}, "arithmetic", "fp4"),
        ({"precision": "fp16"}, "arithmetic", "bf16"),
        ({"recompute": "every_layer"}, "recompute", "full"),
        ({"recompute": "selective+sequence_parallel"}, "recompute", "selective"),
        ({"recompute": "full, no sequence parallel"}, "sequence_parallel", False),
        ({"zero": "FSDP shard group 8"}, "zero", 3),
        ({"zero": "FSDP shard group 8"}, "shard", 8),
        ({"zero": "ZeRO-2"}, "zero", 2),
        ({"zero": "3"}, "zero", 3),
        ({"zero": "ZeRO stage 3"}, "zero", 3),
        ({"zero": "zero_2"}, "zero", 2),
        ({"zero": "none"}, "zero", 0),
        ({"recompute": "0"}, "recompute", "none"),
        ({"recompute": "n/a"}, "recompute", "none"),
        ({"recompute": "1"}, "recompute", "full"),
        ({"note": "kernel=torch; sequence_parallel=1"}, "attention", "unfused"),
        ({"source": "NeMo 24.07"}, "year", 2024.5),
        ({"source": "somebody (arXiv 2104.04473)"}, "attention", "fused"),
        ({"num_gpus": "", "dp": "3"}, "num_gpus", 48),
    ],
)
def test_what_a_row_says_is_heard(change: dict[str, str], field: str, value: object) -> None:
    assert getattr(understand(row(**change)).job, field) == value


@pytest.mark.parametrize("change", [{"zero": "4"}, {"recompute": "n/a"}, {"precision": "banana"}, {"zero": "banana"}])
def test_words_that_are_not_understood_are_told(change: dict[str, str]) -> None:
    ((field, word),) = change.items()
    told, blank = predict(row(**change)), predict(row())
    assert f"{field} = {word!r} is not understood" in told["predicted_note"]
    assert told["predicted_memory_gib"] == blank["predicted_memory_gib"]


def test_recomputing_and_sharding_take_less_memory() -> None:
    plain = float(predict(row(recompute="none"))["predicted_memory_gib"])
    assert float(predict(row(recompute="full"))["predicted_memory_gib"]) < plain
    assert float(predict(row(recompute="none", tp="8", num_gpus="128"))["predicted_memory_gib"]) < plain
    assert predict(row(recompute="none", mbs="16"))["predicted_fits"] == "0"


def test_more_work_takes_longer() -> None:
    def seconds(**values: str) -> float:
        return float(predict(row(**values))["predicted_step_time_s"])

    assert seconds(gbs="256") > 1.7 * seconds()
    assert seconds(gpu="A100") > 2 * seconds()
    assert seconds(precision="fp8") < seconds()
    assert seconds(recompute="full") > 1.15 * seconds(recompute="none")


def test_shard_groups_within_a_node_exchange_there_and_reduce_between_nodes() -> None:
    def step(zero: str) -> StepTime:
        return step_time(understand(row(tp="1", pp="1", num_gpus="64", gbs="4096", zero=zero)).job)

    node, whole = step("FSDP shard group 8"), step("FSDP shard group 64")
    assert step("FSDP").as_values() == whole.as_values()
    assert node.data_parallel < 0.95 * whole.data_parallel  # 64 micro-batches gather inside the node
    assert node.optimizer == pytest.approx(8 * whole.optimizer)
    every, plain = step("FSDP shard group 1"), step("none")
    assert every.data_parallel == pytest.approx(plain.data_parallel)


def test_the_command_keeps_rows_and_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "rows.csv", tmp_path / "out" / "predicted.csv"
    rows = [row(note='a "quoted", note'), row(model="?"), row(recompute="full")]
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    assert main(["plan", "predict", "--table", str(table), "--out", str(out)]) == 0
    assert "2 of 3 rows" in capsys.readouterr().err
    with open(out, newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [*COLUMNS, *PREDICTED]
    assert [{name: one[name] for name in COLUMNS} for one in read] == rows
    assert [one["predicted_fits"] for one in read] == ["1", "", "1"]


@pytest.mark.parametrize("text", [None, "", "gpu,tp\nH100,1\n", 'model,gpu,tp,pp\n"open'])
def test_what_is_no_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None) -> None:
    table = tmp_path / "rows.csv"
    if text is not None:
        table.write_text(text)
    assert main(["plan", "predict", "--table", str(table), "--out", str(tmp_path / "out.csv")]) == 2
    assert str(table) in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pp": "inf"},
        {"gbs": "nan"},
        {"vpp": "1e400"},
        {"pp": "4096", "layers": "5000", "hidden": "64"},
        {"mbs": "-1"},
        {"tp": "0"},
        *({field: "0.5"} for field in ("tp", "mbs", "heads", "layers", "ep")),
        {"seq": "inf"},
        {"model": "GPT " + "7" * 400 + "B"},
        {"layers": "1000000", "hidden": "4096"},
        {"layers": "4000", "hidden": "4096", "pp": "200", "vpp": "20"},
    ],
)
def test_impossible_numbers_are_told_not_computed(change: dict[str, str]) -> None:
    predicted = predict(row(**change))
    assert predicted["predicted_step_time_s"] == ""
    assert "not predicted" in predicted["predicted_note"]


def test_a_zero_is_told_to_count_as_blank() -> None:
    told = predict(row(seq="0"))
    assert "seq = 0 taken as blank" in told["predicted_note"]
    assert told["predicted_step_time_s"] == predict(row(seq=""))["predicted_step_time_s"]


def test_more_chunks_than_layers_are_cut_down() -> None:
    assert understand(row(vpp="999999")).job.vpp == 20


@pytest.mark.parametrize(("model", "length"), [("Llama 3 8B", 8192), ("LLAMA2-7B", 4096), ("GPT 22B", 2048)])
def test_a_blank_length_is_the_models_usual_one(model: str, length: int) -> None:
    assert understand(row(model=model, seq="")).job.seq_length == length


@pytest.mark.parametrize(
    ("printed", "known"),
    [
        ("meta-llama/Llama-3.1-70B", "llama3-70b"),
        ("llama-2-70b-chat-hf", "llama2-70b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("allenai/OLMo-2-1124-7B", "olmo2-7b"),
        ("meta-llama/Llama-4-Scout-17B-16E", "llama4-scout"),
        ("bigscience/bloom", "bloom-176b"),
        ("bigscience/bloom-560m", "bigscience/bloom-560m"),
    ],
)
def test_models_are_known_by_their_names_on_the_hub(printed: str, known: str) -> None:
    assert understand(row(model=printed, num_gpus="", gbs="")).job.architecture.name == known


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_gpus": "8"}, "tp x pp x cp = 16 does not divide 8 GPUs"),
        ({"dp": "3"}, "tp x pp x cp x dp = 48 is not 64 GPUs"),
        ({"gbs": "2"}, "mbs x dp = 4 does not divide a global batch of 2"),
        ({"zero": "FSDP shard group 3"}, "a shard group of 3 does not divide dp x cp = 4"),
        ({"ep": "4"}, "ep = 4 does not divide 0 experts"),
        ({"model": "Mixtral 8x7B", "ep": "3"}, "ep = 3 does not divide 8 experts"),
    ],
)
def test_contradictions_are_named_and_predicted(change: dict[str, str], word: str) -> None:
    predicted = predict(row(**change))
    assert predicted["predicted_step_time_s"]
    assert f"contradictory: {word}" in predicted["predicted_note"]
    assert "contradictory" not in predict(row())["predicted_note"]


def test_uneven_stages_and_blank_parts_of_a_layout_are_told() -> None:
    assert "pp x vpp = 3 does not divide 80" in predict(row(pp="3", num_gpus="12"))["predicted_note"]
    assert "vpp = 1; cp = 1" in predict(row())["predicted_note"]
    assert "ep = 1" in predict(row(model="Mixtral 8x7B"))["predicted_note"]
    assert "cp = 1" not in predict(row(cp="1", vpp="1"))["predicted_note"]
