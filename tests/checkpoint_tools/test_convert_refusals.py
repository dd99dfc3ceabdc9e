"""What a conversion refuses in a message before it writes a byte."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.manifest import MANIFEST, read_manifest
from checkpoint_tools.planning import Form
from foundation.errors import ConfigError, OrthantError, RequestError, WorkError
from tests.checkpoint_tools.models import converted, saved_model

ALONE = Manner(processes=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama."""
    folder = tmp_path_factory.mktemp("source") / "hf"
    saved_model("llama3", folder, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma, which the decoder cannot run."""
    folder = tmp_path_factory.mktemp("gemma") / "hf"
    saved_model("gemma2", folder)
    return folder


# --- found while planning --------------------------------------------------------------------------------------------


def test_a_tokenizer_that_cannot_be_loaded_is_found_first(source: Path, tmp_path: Path) -> None:
    """Llama 3's tokenizer.model is tiktoken's, not sentencepiece's."""
    shutil.copytree(source, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match=str(tmp_path / "hf" / "tokenizer.model")):
        convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    convert(tmp_path / "hf", tmp_path / "copy", Form("hf"), ALONE)
    assert (tmp_path / "copy" / "tokenizer.model").is_file(), "nothing reads it there: it is copied"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": ["llama"]},
        {"num_attention_heads": "6"},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_size": 32.0},
        {"head_dim": None},
        {"tie_word_embeddings": "no"},
    ],
)
def test_a_malformed_configuration_is_refused(gemma: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(gemma, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RequestError, match=next(iter(changes))):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}])
def test_a_mixture_in_some_layers_only_is_refused_by_what_says_so(tmp_path: Path, changes: dict[str, Any]) -> None:
    saved_model("qwen3_moe", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    ((name, value),) = changes.items()
    with pytest.raises(RequestError, match=re.escape(f"config.json has {name} = {value}")):
        open_checkpoint(tmp_path / "hf")


def _change_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def _fractions(header: dict[str, Any]) -> None:
    entry = header["model.layers.0.input_layernorm.weight"]
    entry["data_offsets"] = [offset + 0.5 for offset in entry["data_offsets"]]


def _overlap(header: dict[str, Any]) -> None:
    first, second = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    header[first]["data_offsets"] = header[second]["data_offsets"]


@pytest.mark.parametrize(("change", "said"), [(_fractions, "has shape"), (_overlap, "overlap")])
def test_a_header_that_lies_is_refused(source: Path, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(source, tmp_path / "hf")
    _change_header(tmp_path / "hf" / "model.safetensors", change)
    with pytest.raises(WorkError, match=said):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", ""])
def test_a_manifest_that_names_files_elsewhere_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    converted(source, tmp_path / "out", "distributed")
    path = tmp_path / "out" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(OrthantError, match="is no file below the checkpoint"):
        read_manifest(tmp_path / "out")


# --- said ------------------------------------------------------------------------------------------------------------


def test_what_rank_files_cannot_say_is_said(source: Path, gemma: Path, tmp_path: Path) -> None:
    assert "gemma2" in converted(gemma, tmp_path / "gemma", "megatron").notes[0]
    scalings: dict[str, dict[str, Any]] = {
        "yarn": {"rope_type": "yarn", "factor": 4.0},
        "linear": {"rope_type": "linear", "factor": 4.0},
        "high_freq_factor = 5.0": {"high_freq_factor": 5.0, "original_max_position_embeddings": 8192},
        "": {"original_max_position_embeddings": 8192},
    }
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for number, (said, scaling) in enumerate(scalings.items()):
        folder = tmp_path / f"hf{number}"
        shutil.copytree(source, folder)
        config = json.loads((folder / "config.json").read_text())
        rope = {"rope_theta": 10000.0, **(llama3 if "rope_type" not in scaling else {}), **scaling}
        (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
        notes = converted(folder, tmp_path / f"out{number}", "megatron").notes
        assert [said in note for note in notes] == ([True] if said else [])
