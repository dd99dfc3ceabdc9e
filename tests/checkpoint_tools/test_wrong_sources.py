"""Hostile files and sources that are no model: refused by name, and nothing of them is run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.catalog import MOMENTS, OPTIMIZER_PREFIX
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.inert_pickle import load_inert
from checkpoint_tools.planning import Form, plan
from checkpoint_tools.record import RECORD
from checkpoint_tools.soundness import check
from foundation.errors import RequestError, WorkError
from launch.cli import main
from tests.checkpoint_tools.models import converted, saved_model

ALONE = Manner(processes=1)


class Hostile:
    """Touches a file when a pickle of it is loaded by Python."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def hostile_metadata(folder: Path, touched: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(touched)))


def hostile_distcp(folder: Path, touched: Path) -> None:
    """The first archive of a data file, its pickle replaced and its sums made right."""
    path = folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(data[: first_archive(data)]))) as archive:
        info = archive.getinfo("archive/data.pkl")
        start = info.header_offset + 30 + sum(struct_at(data, info.header_offset + 26))
        size = info.file_size
    attack = pickle.dumps(Hostile(touched), protocol=2)
    assert len(attack) <= size
    data[start : start + size] = attack + b" " * (size - len(attack))
    sum_ = zlib.crc32(bytes(data[start : start + size])).to_bytes(4, "little")
    data[info.header_offset + 14 : info.header_offset + 18] = sum_
    entry = bytes(data).index(b"PK\1\2")
    data[entry + 16 : entry + 20] = sum_
    path.write_bytes(bytes(data))
    (folder / "manifest.json").unlink()


def struct_at(data: bytearray, offset: int) -> tuple[int, int]:
    return int.from_bytes(data[offset : offset + 2], "little"), int.from_bytes(data[offset + 2 : offset + 4], "little")


def first_archive(data: bytearray) -> int:
    return bytes(data).index(b"PK\5\6") + 22


def hostile_common(folder: Path, touched: Path) -> None:
    torch.save({"args": Hostile(touched)}, folder / "common.pt")
    (folder / RECORD).unlink()
    (folder / "manifest.json").unlink()


def hostile_rank_file(folder: Path, touched: Path) -> None:
    path = folder / "release" / "mp_rank_00_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    torch.save({**state, "rng_state": Hostile(touched)}, path)


ATTACKS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    ".metadata": ("distributed", hostile_metadata),
    ".distcp": ("distributed", hostile_distcp),
    "common.pt": ("distributed", hostile_common),
    "rank file": ("megatron", hostile_rank_file),
}


@pytest.mark.parametrize("where", ATTACKS)
def test_a_hostile_pickle_is_named_and_not_run(sources: Path, tmp_path: Path, where: str) -> None:
    kind, attack = ATTACKS[where]
    shutil.copytree(sources / kind, tmp_path / "hostile")
    touched = tmp_path / "touched"
    attack(tmp_path / "hostile", touched)
    with pytest.raises(WorkError, match=r"names (io|builtins|_io|__builtin__)\.open"):
        convert(tmp_path / "hostile", tmp_path / "out", Form("hf"), ALONE)
    assert not touched.exists() and not (tmp_path / "out").exists()


def test_a_path_out_of_the_folder_is_refused(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "distributed", tmp_path / "hostile")
    path = tmp_path / "hostile" / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))
    (tmp_path / "hostile" / "manifest.json").unlink()
    with pytest.raises(WorkError, match="no file of this folder"):
        convert(tmp_path / "hostile", tmp_path / "out", Form("hf"), ALONE)


KEY = "decoder.layers.mlp.linear_fc2.weight"


def changed_metadata(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Let `.metadata` be read as if it said something else."""

    def read(data: bytes, where: Any) -> Any:
        metadata = load_inert(data, where)
        change(metadata)
        return metadata

    monkeypatch.setattr("checkpoint_tools.formats.distributed.load_inert", read)


def in_described(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: metadata.field("state_dict_metadata")[KEY].state.update(fields)


def in_chunk(**fields: Any) -> Callable[[Any], None]:
    return lambda metadata: metadata.field("state_dict_metadata")[KEY].field("chunks")[0].state.update(fields)


def in_first_row(metadata: Any) -> None:
    """The first layer's part begins five rows before its tensor does."""
    chunk = metadata.field("state_dict_metadata")[KEY].field("chunks")[0]
    for index in metadata.field("storage_data"):
        if index.field("fqn") == KEY and index.field("offset") == chunk.field("offsets"):
            index.state["offset"] = (0, -5, 0)
    chunk.state["offsets"] = (0, -5, 0)


@pytest.mark.parametrize(
    "change",
    [
        in_described(size=("a", "b", "c")),
        in_described(size=()),
        in_described(size=(4, -32, 48)),
        in_chunk(sizes=("a", "b", "c")),
        in_chunk(sizes=(1, 32 * 48)),
        in_first_row,
    ],
)
def test_metadata_that_lies_is_damaged(
    sources: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    changed_metadata(monkeypatch, change)
    with pytest.raises(WorkError, match="metadata is damaged"):
        open_checkpoint(sources / "distributed")


def test_state_of_another_shape_than_its_weight_is_left_aside(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As forms of core's before the fully reshardable one have it."""

    def lie(metadata: Any) -> None:
        state = f"optimizer.state.exp_avg.{KEY}"
        of_other = "decoder.layers.mlp.linear_fc1.weight"
        metadata.field("state_dict_metadata")[state] = metadata.field("state_dict_metadata")[of_other]
        places = metadata.field("storage_data")
        for index, place in [(index, place) for index, place in places.items() if index.field("fqn") == of_other]:
            places[again(index, fqn=state)] = place

    changed_metadata(monkeypatch, lie)
    catalog = open_checkpoint(sources / "distributed")
    plan(catalog, Form("distributed"))
    assert not catalog.optimizer_state and "state is left aside: optimizer.state.exp_avg.decoder" in catalog.notes[0]


def again(one: Any, **fields: Any) -> Any:
    """A stand-in like `one`, with other fields."""
    made = type(one)()
    made.state = one.state | fields
    return made


def test_state_of_some_layers_alone_is_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both moments of every weight, but for one moment of one layer; weights alone may be taken."""
    lost: list[tuple[int, ...]] = []

    def with_moments(metadata: Any) -> None:
        described, places = metadata.field("state_dict_metadata"), metadata.field("storage_data")
        for kind in MOMENTS:
            before = f"{OPTIMIZER_PREFIX}{kind}."
            for key in [key for key in described if "_extra_state" not in key and not key.startswith("optimizer")]:
                described[before + key] = again(described[key])
            for index, place in list(places.items()):
                places[again(index, fqn=before + index.field("fqn"))] = place
        moment = described[f"{OPTIMIZER_PREFIX}exp_avg_sq.{KEY}"]
        moment.state["chunks"] = [one for one in moment.field("chunks") if tuple(one.field("offsets")) not in lost]

    changed_metadata(monkeypatch, with_moments)
    assert check(sources / "distributed", processes=1).faults == ()
    plan(open_checkpoint(sources / "distributed"), Form("distributed"))
    lost.append((2, 0, 0))
    name = "optimizer.state.exp_avg_sq.decoder.layers.2.mlp.linear_fc2.weight"
    (fault,) = check(sources / "distributed", processes=1).faults
    assert fault == f"the optimizer's state is not whole: it lacks {name}"
    with pytest.raises(WorkError, match=f"it lacks {name}"):
        convert(sources / "distributed", tmp_path / "out", Form("distributed"), ALONE)
    assert plan(open_checkpoint(sources / "distributed"), Form("hf")).format == "hf"


def changed_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"model_type": "qwen2"}, r"are missing: model.layers.0.self_attn.k_proj.bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 3}, r"unknown to a llama: model.layers.3"),
        ({"num_hidden_layers": 5}, r"are missing: model.layers.4"),
        ({"vocab_size": 999}, r"\[131, 32\], and the model's sizes make it \[999, 32\]"),
        ({"num_key_value_heads": 2}, "k_proj"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"hidden_size": None}, "describes no llama"),
    ],
)
def test_a_config_that_does_not_go_with_the_weights(
    sources: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    changed_config(tmp_path / "hf", **changes)
    with pytest.raises(RequestError, match=said):
        convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), ALONE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.update({"lora_A.weight": torch.zeros(2)}), "unknown to a llama: lora_A.weight"),
        (lambda tensors: tensors.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}), "is I8"),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}),
            "up_proj.weight is fp32 and .*gate_proj.weight is bf16",
        ),
    ],
)
def test_tensors_that_are_not_the_model(
    sources: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    changed_tensors(tmp_path / "hf", change)
    with pytest.raises(RequestError, match=said):
        convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), ALONE)


def test_two_models_in_one_folder(sources: Path, tmp_path: Path) -> None:
    """One file and an index: what is converted is what transformers loads."""
    import transformers

    shutil.copytree(sources / "hf", tmp_path / "hf")
    shard, name = "model-00001-of-00001.safetensors", "model.norm.weight"
    tensors = load_file(tmp_path / "hf/model.safetensors")
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "hf" / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()[name]
    converted(tmp_path / "hf", tmp_path / "out", "hf")
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")[name], loaded)


def test_old_buffers_are_dropped_and_said(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed_tensors(tmp_path / "hf", lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert any(name in note for note in converted(tmp_path / "hf", tmp_path / "out", "distributed").notes)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_matrix_beside_a_tied_embedding(tmp_path: Path, same: bool) -> None:
    """Left out where it is the embedding; refused where it is something else."""
    saved_model("llama_tied", tmp_path / "hf")
    changed_tensors(
        tmp_path / "hf",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + (0 if same else 1)}),
    )
    if same:
        converted(tmp_path / "hf", tmp_path / "out", "distributed")
        return
    with pytest.raises(WorkError, match="copies of embedding.word_embeddings.weight differ"):
        converted(tmp_path / "hf", tmp_path / "out", "distributed")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["SRC", "OUT", "--to", "gguf"], 2),
        (["SRC", "OUT", "--to", "hf", "--dtype", "int4"], 2),
        (["SRC", "OUT", "--to", "hf", "--tp", "2"], 2),
        (["SRC", "OUT", "--to", "megatron", "--tp", "3"], 2),
        (["NOWHERE", "OUT", "--to", "hf"], 2),
        (["SRC", "SRC", "--to", "distributed"], 2),
        (["SRC", "OUT", "--to", "distributed"], 0),
    ],
)
def test_exit_codes(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    places = {"SRC": str(sources / "hf"), "OUT": str(tmp_path / "out"), "NOWHERE": str(tmp_path / "nowhere")}
    assert main(["convert", *(places.get(one, one) for one in arguments), "--processes", "1"]) == code
    if code:
        assert "Traceback" not in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
