"""`orthant plan CONFIG.yaml`: layouts that `orthant train` takes, and a reason for each of the others."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from foundation.accelerators import devices, find_device, in_nodes_of, nearest_device
from foundation.errors import RequestError
from foundation.files import write_text
from launch.checks import check_sizes
from launch.cli import main
from launch.config import load_config
from launch.planner.candidates import candidates
from launch.planner.coefficients import time_coefficients
from launch.planner.from_config import job_of
from launch.planner.links import bandwidth, exchange_bandwidth
from launch.planner.prediction import predict
from launch.planner.report import time_parts
from launch.planner.search import Choice, search
from launch.planner.vocabulary import vocabulary_of
from parallel.layout import ParallelLayout

PRESETS = Path(__file__).parents[3] / "configs" / "presets"
TINY = PRESETS.parent / "tiny.yaml"
TENSOR_OVERLAP = (
    "parallel.tp_comm_overlap=true",
    "parallel.sequence_parallel=true",
    "parallel.tensor_model_parallel_size=2",
)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("preset", "gpus", "more"),
    [
        ("llama3_8b", 8, ()),
        ("llama3_8b", 16384, ("training.global_batch_size=16384",)),
        ("llama3_70b", 64, ()),
        ("llama3_1_405b", 16384, ()),
        ("mixtral_8x7b", 64, ()),
        ("mixtral_8x7b", 16384, ("training.global_batch_size=16384",)),
    ],
)
def test_presets_have_layouts_that_train_takes(
    preset: str, gpus: int, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = PRESETS / f"{preset}.yaml"
    found = planned(capsys, str(path), "--gpus", str(gpus), "--gpu", "h100", "--top", "3", *more)
    assert len(found["layouts"]) == 3
    speeds = [layout["tokens_per_s_per_gpu"] for layout in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for layout in found["layouts"]:
        assert layout["memory_gib"] <= find_device("h100").memory_gib
        assert 0.05 < layout["mfu"] < 0.7
        assert sum(layout["seconds"].values()) == pytest.approx(layout["step_time_s"])
        assert min(layout["seconds"].values()) > -1e-9
        for stage in layout["stages_gib"]:
            parts = sum(value for name, value in stage.items() if name not in ("stage", "total"))
            assert parts == pytest.approx(stage["total"])
        assert max(stage["total"] for stage in layout["stages_gib"]) == pytest.approx(layout["memory_gib"], rel=0.02)
        check_sizes(load_config(path, [*more, *layout["overrides"]]), world_size=gpus)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("llama3_8b", ("data.document_mask=true",)),
        ("llama3_8b", ("training.precision=fp8",)),
        ("llama3_8b", ("parallel.cuda_graphs=true",)),
        ("llama3_8b", ("parallel.overlap=full",)),
        ("llama3_8b", ("training.recompute_granularity=full", "training.recompute_num_layers=8")),
        ("llama3_8b", TENSOR_OVERLAP),
        ("mistral_7b_v0_3", ("model.window_size=4096", "training.seq_length=16384")),
    ],
)
def test_layouts_that_a_run_cannot_have_are_refused_one_by_one(
    preset: str, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(PRESETS / f"{preset}.yaml")
    found = planned(capsys, path, *settings, "--gpus", "8", "--gpu", "h100", "--top", "200")
    assert len(found["layouts"]) == min(200, found["fitting"]) > 0  # each was held against every rule of a run's


def test_every_candidate_is_ranked_or_refused_with_a_reason() -> None:
    config, device = load_config(PRESETS / "llama3_70b.yaml"), find_device("a100")
    found = search(config, device, 64, 128256)
    assert len(found.choices) + len(found.refusals) == len(list(candidates(config, device, 64)))
    assert found.refusals
    assert all(refusal.reason for refusal in found.refusals)
    for choice in found.choices[:20]:
        assert isinstance(choice, Choice)
        assert sum(time_parts(choice).values()) == pytest.approx(choice.time.total)


def tensor_sizes(gpus: int, gpu: str, per_node: int | None) -> set[int]:
    found = candidates(load_config(PRESETS / "llama3_70b.yaml"), find_device(gpu), gpus, per_node)
    return {candidate.tp for candidate in found}


@pytest.mark.parametrize(
    ("gpus", "gpu", "per_node", "sizes"),
    [
        (64, "h100", None, {1, 2, 4, 8}),
        (64, "h100", 4, {1, 2, 4}),
        (21, "h100", 3, {1, 3}),
        (48, "h100", 6, {1, 2, 3, 6}),
        (6, "h100", 6, {1, 2, 3, 6}),
        (4, "h100", 6, {1, 2, 4}),  # a part of one node
        (576, "gb200", None, {1, 2, 4, 8}),  # 16 would be cut by the end of a rack of 72
        (576, "gb200", 4, {1, 2, 4}),
        (16, "tpu-v4", None, {1, 2, 4, 8, 16}),
    ],
)
def test_no_nodes_end_cuts_tensor_parallel_ranks(gpus: int, gpu: str, per_node: int | None, sizes: set[int]) -> None:
    assert tensor_sizes(gpus, gpu, per_node) == sizes


def test_smaller_nodes_have_fewer_fast_links(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(PRESETS / "llama3_70b.yaml")
    by_size = {
        size: planned(capsys, path, "--gpus", "64", "--gpu", "a100", "--gpus-per-node", str(size), "--top", "2000")
        for size in (4, 8)
    }
    speeds = {
        size: {one["layout"]: one["tokens_per_s_per_gpu"] for one in found["layouts"]}
        for size, found in by_size.items()
    }
    both = speeds[4].keys() & speeds[8].keys()
    assert len(both) > 100 and all(speeds[4][layout] <= speeds[8][layout] for layout in both)
    assert any(speeds[4][layout] < 0.99 * speeds[8][layout] for layout in both)
    assert by_size[4]["gpus_per_node"] == 4


def test_a_group_that_some_node_cuts_is_as_slow_as_the_network() -> None:
    config = load_config(PRESETS / "llama3_8b.yaml")
    known = time_coefficients()
    for per_node, inside in ((3, False), (4, True), (6, True), (7, False)):
        device = in_nodes_of(find_device("h100"), per_node)
        job = job_of(config, ParallelLayout(data_parallel_size=84), device, 128256)
        for rate in (bandwidth, exchange_bandwidth):
            assert (rate(job, known, 2, 1) > 1e11) == inside, (per_node, rate)
    rack = in_nodes_of(find_device("gb200"), 4)
    assert rack.scale_up == 72


def test_a_batch_that_no_layout_divides_is_told_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(PRESETS / "llama3_8b.yaml")
    asked = ["plan", path, "--gpus", "5", "model.num_layers=3"]
    assert main([*asked, "training.global_batch_size=512"]) == 2
    assert "cure: training.global_batch_size=515, or" in capsys.readouterr().err
    assert main([*asked, "training.global_batch_size=515"]) == 0


def test_shorter_rows_are_no_cure_for_too_many_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PRESETS / "llama3_1_405b.yaml"), "--gpus", "8"]) == 2
    assert "cure: more GPUs, or GPUs with more memory\n" in capsys.readouterr().err
    path, rows = str(PRESETS / "llama3_8b.yaml"), 1 << 20
    long = [f"model.max_position_embeddings={rows}", f"training.seq_length={rows}"]
    assert main(["plan", path, "--gpus", "8", *long]) == 2
    assert "or a shorter training.seq_length\n" in capsys.readouterr().err


def test_a_layout_that_nearly_fits_is_told_by_how_little_it_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    for gpus in (64, 512):
        found = planned(capsys, str(PRESETS / "llama3_70b.yaml"), "--gpus", str(gpus))
        for one in found["refused"]:
            needed = re.search(r"would need ([\d.]+) GiB of ([\d.]+)", one["reason"])
            assert needed is None or needed[1] != needed[2], one["reason"]


def test_one_file_does_not_take_the_place_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "x")
    assert main(["plan", str(PRESETS / "llama3_8b.yaml"), "--gpus", "8", "--out", target, "--refused", target]) == 2
    assert f"--out and --refused are both {target}" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_setting_that_plan_chooses_is_told_and_not_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["parallel.zero_stage=3", "training.seed=7"]
    assert main(["plan", str(PRESETS / "llama3_8b.yaml"), "--gpus", "16", *asked]) == 0
    printed, told = capsys.readouterr()
    command = next(line.split() for line in printed.splitlines() if line.startswith("orthant train"))
    assert [setting for setting in command if "zero_stage" in setting] == ["parallel.zero_stage=1"]
    assert "training.seed=7" in command and "not as asked: parallel.zero_stage=3;" in told


def test_refusals_and_overrides_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused, out, path = tmp_path / "refused.csv", tmp_path / "plan.overrides", str(PRESETS / "llama3_8b.yaml")
    assert main(["plan", path, "--gpus", "16", "--explain", "--refused", str(refused), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "where" in printed
    assert "orthant train" in printed
    with open(refused, newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["layout"] and row["reason"] for row in rows)
    check_sizes(load_config(path, out.read_text().split()), world_size=16)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("llama3_1_405b.yaml", "--gpus", "8"), ("no layout", "nearest", "GiB")),
        (("llama3_8b.yaml", "--gpus", "8", "--gpu", "abacus"), ("abacus", "h100")),
        (("llama3_8b.yaml", "--gpus", "8", "--gpu", "a100", "training.precision=fp8"), ("fp8", "bf16")),
        (("llama3_8b.yaml", "--gpus", "37", "training.global_batch_size=8"), ("no layout", "global_batch_size")),
        (("llama3_8b.yaml", "--gpus", "8", "model.hiden_size=3"), ("hidden_size",)),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(PRESETS / arguments[0]), *arguments[1:]]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


@pytest.mark.parametrize("option", ["--out", "--refused"])
@pytest.mark.parametrize("target", [".", "file/below.csv", "pipe", "/dev/null", "/proc/none/x.csv", "x" * 300])
def test_targets_that_cannot_be_written_are_refused_before_the_search(
    option: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    os.mkfifo(tmp_path / "pipe")
    commands = [["plan", str(PRESETS / "llama3_8b.yaml"), "--gpus", "8", option, target]]
    if option == "--out":
        commands.append(["plan", "predict", "--table", "nowhere.csv", "--out", target])
    for command in commands:
        assert main(command) == 2
        assert f"{option} {target} cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["folder", "pipe"])
def test_only_regular_files_are_replaced(target: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not replaced"):
        write_text(tmp_path / target, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]
    assert not (tmp_path / target).is_file()


def test_planning_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from launch.cli import main; "
        f"main(['plan', {str(PRESETS / 'llama3_8b.yaml')!r}, '--gpus', '8', '--json']); "
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False).returncode == 0


def test_devices_are_found_by_the_names_people_use() -> None:
    for printed, name in (
        ("H100-80GB (DGX-H100)", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("A100-80GB", "a100"),
        ("GB200 (DGX-GB200)", "gb200"),
        ("B300", "b300"),
        ("h200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("A100 SXM 40GB", "a100-40"),
        ("A100 (40GB)", "a100-40"),
        ("H100 PCIe", "h100-pcie"),
        ("8x H100 SXM5 80GB", "h100"),
        ("TPUv4", "tpu-v4"),
    ):
        assert find_device(printed).name == name
    assert {"a100", "a100-40", "h100", "h200", "b200", "b300", "gb200", "gb300", "l40s", "cpu"} <= set(devices())


@pytest.mark.parametrize(
    ("printed", "nearest"),
    [
        ("A100-PCIE-40GB", "a100-40"),
        ("H100 NVL", "h100"),
        ("V100-16GB", "v100"),
        ("RTX A1000", None),
        ("xxh100yy", None),
        ("", None),
    ],
)
def test_other_devices_are_not_taken_for_known_ones(printed: str, nearest: str | None) -> None:
    with pytest.raises(RequestError, match="known are a100-40, a100"):
        find_device(printed)
    if nearest is None:
        with pytest.raises(RequestError, match="no accelerator"):
            nearest_device(printed)
    else:
        assert nearest_device(printed) == (devices()[nearest], False)
        assert (
            "no known variant"
            in predict({"model": "llama3-8b", "gpu": printed, "tp": "8", "pp": "1"})["predicted_note"]
        )


def test_the_vocabulary_is_asked_of_a_tokenizer_that_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, 999)}
    Tokenizer(WordLevel(words, unk_token="w1")).save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "config.yaml"
    text = TINY.read_text().replace(
        "{kind: byte-bpe, vocab_size: 512}", "{path: " + str(tmp_path / "tokenizer.json") + "}"
    )
    config.write_text(text)
    asked = (str(config), "--gpus", "2", "--gpu", "h100", "--top", "1")
    assert planned(capsys, *asked)["layouts"]
    assert vocabulary_of(load_config(config, [])) == 999
    (tmp_path / "tokenizer.json").unlink()  # it may lie on another machine
    assert main(["plan", *asked]) == 2
    assert f"data.tokenizer.path {tmp_path / 'tokenizer.json'} is not here" in capsys.readouterr().err
    assert planned(capsys, *asked, "model.vocab_size=999")["layouts"]
