"""`orthant ckpt`: inspect, verify, diff, average; and other dtypes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.average import check_same_model
from checkpoint_tools.convert import Manner, average, convert
from checkpoint_tools.diff import diff
from checkpoint_tools.dtypes import BF16, BY_NAME, FP16, FP32, FP64, DType, converted
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.inspection import describe
from checkpoint_tools.manifest import MANIFEST, read_manifest
from checkpoint_tools.planning import Form
from foundation.errors import RequestError, WorkError
from launch.cli import main
from tests.checkpoint_tools.models import converted as converted_to
from tests.checkpoint_tools.models import file_tensors, same_bits, saved_model

ALONE = Manner(processes=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts in all three formats."""
    folder = tmp_path_factory.mktemp("model")
    saved_model("mixtral", folder / "hf", torch.bfloat16)
    converted_to(folder / "hf", folder / "distributed", "distributed")
    converted_to(folder / "hf", folder / "megatron", "megatron", tp=2, pp=2, ep=2)
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Exit code and the JSON object of a command."""
    capsys.readouterr()
    code = main(["ckpt", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_inspect_says_the_same_of_all_formats(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {kind: told(capsys, "inspect", str(model / kind))[1] for kind in ("hf", "distributed", "megatron")}
    parameters = sum(tensor.numel() for tensor in file_tensors(model / "hf").values())
    for kind, found in facts.items():
        assert found["format"] == kind
        assert found["parameters"] == parameters and found["bytes"] == 2 * parameters
        assert sum(found["modules"].values()) == found["bytes"] and "other" not in found["modules"]
        assert found["architecture"] == "mixtral" and found["vocab_size"] == 131
        assert found["dtypes"] == {"bf16": found["bytes"]}
        assert found["model"] == facts["hf"]["model"]
    assert facts["megatron"]["written_at"] == "TP2 x PP2 x EP2" and facts["hf"]["written_at"] is None
    assert facts["hf"]["hashes"] == "none" and facts["distributed"]["hashes"] == "tensors"


@pytest.mark.parametrize("kind", ["hf", "distributed", "megatron"])
def test_verify_of_what_is_whole(model: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    code, found = told(capsys, "verify", str(model / kind))
    assert code == 0 and found["whole"] and found["held_to"] == ("none" if kind == "hf" else "tensors")


def test_formats_of_one_model_do_not_differ(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for a, b in (("hf", "distributed"), ("megatron", "hf"), ("distributed", "megatron")):
        code, found = told(capsys, "diff", str(model / a), str(model / b))
        assert code == 0 and found["same"] and found["differences"] == []


def changed(model: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a folder of transformers with other tensors."""
    shutil.copytree(model / "hf", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors[name] = value(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_diff_names_what_differs_and_by_how_much(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_element(tensor: torch.Tensor) -> torch.Tensor:
        tensor[5, 7] = 4.0
        return tensor

    def not_a_number(tensor: torch.Tensor) -> torch.Tensor:
        tensor[0] = float("nan")
        return tensor

    other = changed(
        model,
        tmp_path / "other",
        **{
            "model.layers.1.self_attn.k_proj.weight": one_element,
            "model.norm.weight": not_a_number,
            "model.layers.3.block_sparse_moe.gate.weight": lambda tensor: tensor.float(),
        },
    )
    code, found = told(capsys, "diff", str(model / "distributed"), str(other))
    assert code == 3 and not found["same"]
    by_name = {one["name"]: one for one in found["differences"]}
    assert list(by_name) == [
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.3.mlp.router.weight",
        "decoder.final_layernorm.weight",
    ]
    qkv = by_name["decoder.layers.1.self_attention.linear_qkv.weight"]
    was = float(file_tensors(model / "hf")["model.layers.1.self_attn.k_proj.weight"][5, 7])
    assert qkv["differing"] == 1 and qkv["largest"] == pytest.approx(4.0 - was)
    assert by_name["decoder.layers.3.mlp.router.weight"]["kind"] == "dtype"
    assert by_name["decoder.final_layernorm.weight"]["largest"] is None, "JSON has no infinity"


def test_diff_of_different_models(model: Path, tmp_path: Path) -> None:
    saved_model("mixtral", tmp_path / "wider", torch.bfloat16, intermediate_size=64, num_hidden_layers=3)
    found = diff(open_checkpoint(model / "hf"), open_checkpoint(tmp_path / "wider"), 1)
    assert {one.kind for one in found} == {"shape", "only in A", "values"} - (
        {"values"} if not any(one.kind == "values" for one in found) else set()
    )
    assert (
        sum(one.kind == "only in A" for one in found) == 4 + 1 + 2 * 4
    )  # layer 3: two norms, qkv, proj, router, experts


# --- averages --------------------------------------------------------------------------------------------------------


def test_the_mean_of_three(model: Path, tmp_path: Path) -> None:
    """In fp32, rounded once; from any formats."""
    name = "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    factors = (1.0, 3.0, 5.0)
    for factor in factors:
        changed(model, tmp_path / f"x{factor}", **{name: lambda tensor, by=factor: tensor * by})
    converted_to(tmp_path / "x3.0", tmp_path / "ranks", "megatron", tp=2)
    places = [tmp_path / "x1.0", tmp_path / "ranks", tmp_path / "x5.0"]
    average(places, tmp_path / "mean", Form("hf"), ALONE)
    means = file_tensors(tmp_path / "mean")
    originals = [file_tensors(tmp_path / f"x{factor}")[name].float() for factor in factors]
    assert torch.equal(means[name], (sum(originals) / 3).bfloat16())
    rest = {key: tensor for key, tensor in file_tensors(model / "hf").items() if key != name}
    assert same_bits({key: means[key] for key in rest}, rest) == []


@pytest.mark.parametrize("kind", ["hf", "distributed"])
def test_a_mean_is_not_taken_over_damage(model: Path, tmp_path: Path, kind: str) -> None:
    """Sources that were converted have hashes of their tensors."""
    converted_to(model / "distributed", tmp_path / "one", kind)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    piece = open_checkpoint(tmp_path / "other").tensors["decoder.layers.1.mlp.router.weight"].pieces[0]
    with (tmp_path / "other" / piece.file).open("r+b") as file:
        file.seek(piece.offset + 1)
        file.write(b"\x11")
    with pytest.raises(WorkError, match="router.weight is not what was written(.|\n)*other"):
        average([tmp_path / "one", tmp_path / "other"], tmp_path / "mean", Form("hf"), ALONE)
    assert not (tmp_path / "mean").exists()


def test_a_mean_of_different_models_is_refused(model: Path, tmp_path: Path) -> None:
    saved_model("llama3", tmp_path / "other")
    with pytest.raises(RequestError, match="another model"):
        average([model / "hf", tmp_path / "other"], tmp_path / "mean", Form("hf"), ALONE)
    with pytest.raises(RequestError, match="two checkpoints or more"):
        average([model / "hf"], tmp_path / "mean", Form("hf"), ALONE)


@pytest.mark.parametrize("family", ["llama3", "gemma2"])
def test_a_mean_of_other_configurations_is_refused(tmp_path: Path, family: str) -> None:
    """Same names and shapes, and the weights mean something else."""
    for name in ("one", "same", "other"):
        saved_model(family, tmp_path / name)
    path = tmp_path / "other" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_parameters": {"rope_theta": 9.0}}))
    check_same_model([open_checkpoint(tmp_path / name) for name in ("one", "same")])
    with pytest.raises(RequestError, match=r"other is another model than .*one: ro"):
        average([tmp_path / "one", tmp_path / "other"], tmp_path / "mean", Form("hf"), ALONE)
    assert not (tmp_path / "mean").exists()


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "asked", "name"),
    [
        (torch.float16, None, "fp16"),
        (torch.float16, BF16, "bf16"),
        (torch.float64, None, "fp64"),
        (torch.float32, None, "fp32"),
        (torch.bfloat16, FP32, "fp32"),
    ],
)
def test_a_model_is_labelled_with_the_type_of_its_weights(
    tmp_path: Path, dtype: torch.dtype, asked: DType | None, name: str
) -> None:
    saved_model("llama3", tmp_path / "hf", dtype)
    convert(tmp_path / "hf", tmp_path / "ours", Form("distributed", dtype=asked), ALONE)
    convert(tmp_path / "ours", tmp_path / "back", Form("hf"), ALONE)
    assert read_manifest(tmp_path / "ours").precision == name
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == BY_NAME[name].torch
    assert {str(tensor.dtype) for tensor in file_tensors(tmp_path / "back").values()} == {
        f"torch.{BY_NAME[name].torch}"
    }


def test_a_copy_of_what_was_trained_in_fp8_says_so(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / "distributed", tmp_path / "ours")
    manifest = read_manifest(tmp_path / "ours").model_copy(update={"precision": "fp8"})
    (tmp_path / "ours" / MANIFEST).write_text(manifest.model_dump_json())
    for asked, name in ((None, "fp8"), (BF16, "fp8"), (FP32, "fp32")):
        convert(tmp_path / "ours", tmp_path / f"to {asked}", Form("distributed", dtype=asked), ALONE)
        assert read_manifest(tmp_path / f"to {asked}").precision == name


TORCH = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16, FP64: torch.float64}


@pytest.mark.parametrize("source", TORCH, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("target", TORCH, ids=lambda dtype: dtype.name)
def test_dtypes_are_converted_as_torch_does(source: DType, target: DType) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int64, generator=torch.Generator().manual_seed(1))
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), 65504, 65520, 3.39e38, 1e-40, 1.00390625, 1.01171875]
    )
    values = torch.cat([bits.to(torch.int32).view(torch.float32), special])
    values = values[~values.isnan()].to(TORCH[source])
    as_bits = values.view(torch.uint16).numpy() if source is BF16 else values.numpy()
    ours = converted(as_bits, source, target)
    wanted = values.to(TORCH[target])
    wanted_bits = wanted.view(torch.uint16).numpy() if target is BF16 else wanted.numpy()
    assert (ours.view("u1") == wanted_bits.view("u1")).all()


def test_to_another_dtype(model: Path, tmp_path: Path) -> None:
    convert(model / "hf", tmp_path / "wide", Form("distributed", dtype=FP32), ALONE)
    convert(tmp_path / "wide", tmp_path / "back", Form("hf", dtype=BF16), ALONE)
    assert same_bits(file_tensors(model / "hf"), file_tensors(tmp_path / "back")) == []
    assert describe(open_checkpoint(tmp_path / "wide"))["dtypes"].keys() == {"fp32"}
    check_same_model([open_checkpoint(model / "hf"), open_checkpoint(tmp_path / "wide")])
