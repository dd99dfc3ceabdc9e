"""What `--resume` takes for done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.dtypes import FP32
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.planning import Form
from checkpoint_tools.record import RECORD
from checkpoint_tools.verify import Difference
from foundation.errors import RequestError
from launch.cli import main
from tests.checkpoint_tools.models import converted, saved_model

ALONE = Manner(processes=1)
RESUME = Manner(resume=True, processes=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    saved_model("llama3", folder, torch.bfloat16)
    return folder


def test_a_source_of_the_same_name_with_other_weights_is_not_done(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", "distributed")
    other = tmp_path / "other" / source.name
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(RequestError, match="the source's files"):
        convert(other, tmp_path / "out", Form("distributed"), RESUME)
    assert main(["convert", str(other), str(tmp_path / "out"), "--to", "distributed", "--resume"]) == 2


def test_another_dtype_is_not_done(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", "distributed")
    with pytest.raises(RequestError, match=r"dtype of .*: bf16, not fp32"):
        convert(source, tmp_path / "out", Form("distributed", dtype=FP32), RESUME)


def test_a_record_without_a_fingerprint_is_not_trusted(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", "hf")
    path = tmp_path / "out" / RECORD
    record = json.loads(path.read_text())
    del record["plan"]
    path.write_text(json.dumps(record))
    with pytest.raises(RequestError, match="does not say of which files"):
        convert(source, tmp_path / "out", Form("hf"), RESUME)


@pytest.mark.parametrize("to", ["hf", "distributed", "megatron"])
def test_a_finished_target_is_read_back(source: Path, tmp_path: Path, to: Any) -> None:
    converted(source, tmp_path / "out", to)
    assert convert(source, tmp_path / "out", Form(to), RESUME).verified
    catalog = open_checkpoint(tmp_path / "out")
    piece = catalog.tensors["decoder.layers.2.mlp.linear_fc2.weight"].pieces[0]
    with (catalog.folder / piece.file).open("r+b") as handle:
        handle.seek(piece.offset + 100)
        handle.write(b"\x11\x22\x33\x44")
    with pytest.raises(Difference):
        convert(source, tmp_path / "out", Form(to), RESUME)
    unread = convert(source, tmp_path / "out", Form(to), Manner(resume=True, verify="none", processes=1))
    assert not unread.verified
