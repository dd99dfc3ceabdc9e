"""What goes wrong around a conversion: damage, kills, full disks, hostile files, wrong requests."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools import copying
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.copying import DonePart
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.rank_cuts import RankGrid
from checkpoint_tools.journal import JOURNAL, Unfinished
from checkpoint_tools.planning import Form
from checkpoint_tools.record import RECORD
from checkpoint_tools.soundness import check
from checkpoint_tools.verify import Difference
from foundation.errors import RequestError, WorkError
from launch.cli import main
from tests.checkpoint_tools.models import converted, file_tensors, same_bits, saved_model

ALONE = Manner(processes=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in all three formats."""
    folder = tmp_path_factory.mktemp("sources")
    saved_model("llama3", folder / "hf", torch.bfloat16)
    converted(folder / "hf", folder / "distributed", "distributed")
    converted(folder / "hf", folder / "megatron", "megatron", tp=2, pp=2)
    return folder


FORMATS = ("hf", "distributed", "megatron")


def biggest(folder: Path) -> Path:
    """The file with the most tensors in it."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 0x10]))


def tensor_byte(folder: Path) -> tuple[Path, int]:
    """A byte in the middle of a weight."""
    catalog = open_checkpoint(folder)
    piece = catalog.tensors["decoder.layers.2.mlp.linear_fc2.weight"].pieces[0]
    return catalog.folder / piece.file, piece.offset + 100


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_byte_is_found_and_named(sources: Path, tmp_path: Path, kind: str) -> None:
    """In a folder of transformers, too, where the converter left its record."""
    converted(sources / "distributed", tmp_path / "damaged", kind, **({"tp": 2} if kind == "megatron" else {}))
    assert check(tmp_path / "damaged").faults == ()
    flip(*tensor_byte(tmp_path / "damaged"))
    faults = check(tmp_path / "damaged").faults
    assert len(faults) == 1 and ("linear_fc2" in faults[0] or "distcp" in faults[0])
    to = "hf" if kind != "hf" else "distributed"
    with pytest.raises(WorkError, match=r"linear_fc2.weight is not what was written|distcp"):
        convert(tmp_path / "damaged", tmp_path / "out", Form(to), ALONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_found_before_anything_is_written(sources: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(sources / kind, tmp_path / "cut")
    path = biggest(tmp_path / "cut")
    os.truncate(path, path.stat().st_size - 200)
    with pytest.raises(WorkError, match=path.name.split("_optim")[0]):
        convert(tmp_path / "cut", tmp_path / "out", Form("hf" if kind != "hf" else "distributed"), ALONE)
    assert check(tmp_path / "cut").faults
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut"]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = saved_model("llama3", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(WorkError, match=shard.name):
        convert(tmp_path / "hf", tmp_path / "out", Form("distributed"), ALONE)


def test_a_missing_distcp_is_named(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "distributed", tmp_path / "less")
    (tmp_path / "less" / "__0_0.distcp").unlink()
    with pytest.raises(WorkError, match=r"__0_0.distcp"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)


def test_a_missing_rank_file_is_named(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "megatron", tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "release" / "mp_rank_01_001")
    with pytest.raises(WorkError, match=r"mp_rank_01_001"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)
    shutil.rmtree(tmp_path / "less" / "release" / "mp_rank_00_001")
    with pytest.raises(WorkError, match=r"pipeline_model_parallel_size"):
        convert(tmp_path / "less", tmp_path / "out", Form("hf"), ALONE)


def test_what_the_disk_changes_is_found_before_the_target_has_its_name(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte that changes after it was written: the copy that is read back differs."""
    flushed = copying._flushed

    def spoil(done: DonePart, descriptors: list[int]) -> DonePart:
        os.pwrite(descriptors[0], b"\x55", os.fstat(descriptors[0]).st_size // 2)
        return flushed(done, descriptors)

    monkeypatch.setattr(copying, "_flushed", spoil)
    with pytest.raises(Difference, match="do not read back"):
        convert(sources / "distributed", tmp_path / "out", Form("hf"), ALONE)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(sources / "distributed", tmp_path / "out", Form("hf"), Manner(resume=True, processes=1))
    assert same_bits(file_tensors(sources / "hf"), file_tensors(tmp_path / "out")) == []


# --- kills -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FORMS = {
    "hf": ("distributed", Form("hf")),
    "distributed": ("hf", Form("distributed")),
    "megatron": ("hf", Form("megatron", RankGrid(tp=2, pp=2))),
}


@pytest.mark.parametrize("to", FORMS)
def test_resumed_after_any_part_it_gives_the_same_bytes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr("checkpoint_tools.target.PART_BYTES", 10_000)
    monkeypatch.setattr("checkpoint_tools.formats.distributed_target.LEAST_FILE_BYTES", 10_000)
    source, form = FORMS[to]
    whole = convert(sources / source, tmp_path / "unbroken", form, ALONE)
    assert whole.parts >= 5
    written = Unfinished.done

    class Killed(Exception):
        pass

    def die_after(self: Unfinished, part: DonePart) -> None:
        written(self, part)
        raise Killed

    for _ in range(whole.parts - 1):
        monkeypatch.setattr(Unfinished, "done", die_after)
        with pytest.raises(Killed):
            convert(sources / source, tmp_path / "out", form, Manner(resume=True, processes=1))
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Unfinished, "done", written)
    report = convert(sources / source, tmp_path / "out", form, Manner(resume=True, processes=1))
    assert report.resumed == whole.parts - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert not list(tmp_path.glob(".*"))


def test_killed_with_all_its_processes_and_resumed(tmp_path: Path) -> None:
    """kill -9 of the command while its processes copy: none is left, and --resume gives an unbroken run's bytes."""
    saved_model("llama3", tmp_path / "hf", torch.bfloat16, hidden_size=256, intermediate_size=2048, vocab_size=40_000)
    command = [sys.executable, "-P", "-m", "launch", "convert", str(tmp_path / "hf")]
    options = ["--to", "distributed", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begun = subprocess.Popen(
        [*command, str(tmp_path / "out"), *options], env=environment, stderr=subprocess.DEVNULL, start_new_session=True
    )
    journal = tmp_path / ".out.unfinished" / JOURNAL
    deadline = time.monotonic() + 60
    while begun.poll() is None and time.monotonic() < deadline:
        if journal.is_file() and journal.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.001)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "out").exists() or begun.returncode == 0
    assert _gone(begun.pid)
    subprocess.run([*command, str(tmp_path / "out"), *options, "--resume"], env=environment, check=True)
    subprocess.run([*command, str(tmp_path / "unbroken"), *options], env=environment, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def _gone(session: int) -> bool:
    """Whether no process of a session is left, within some seconds."""
    for _ in range(100):
        left = [stat for stat in Path("/proc").glob("[0-9]*/stat") if _session(stat) == session]
        if not left:
            return True
        time.sleep(0.05)
    return False


def _session(stat: Path) -> int | None:
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[3])


def test_what_is_unfinished_is_not_overwritten_or_mixed(sources: Path, tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out")
    unfinished.begin("another plan", resume=False)
    with pytest.raises(RequestError, match="--resume"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    with pytest.raises(RequestError, match="another one"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    unfinished = Unfinished(tmp_path / "out")
    unfinished.begin("plan", resume=False)
    unfinished.done(DonePart(0, {"a": "1"}))
    with (unfinished.folder / JOURNAL).open("ab") as handle:
        handle.write(b'{"number": 1, "hash')
    assert list(Unfinished(tmp_path / "out").begin("plan", resume=True)) == [0]
    unfinished.done(DonePart(2, {"b": "2"}))
    assert list(Unfinished(tmp_path / "out").begin("plan", resume=True)) == [0, 2]


def test_what_a_kill_leaves_beside_the_tensors_is_no_part_of_the_target(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while conversion.json was written: its temporary file stays in the unfinished folder."""

    def killed(source: Any, target: Any, folder: Path, done: Any, plan: str) -> None:
        (folder / f".{RECORD}.0123456789abcdef.tmp").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoint_tools.convert.write_beside", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    monkeypatch.undo()
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert contents(tmp_path / "out") == contents(sources / "distributed")


def test_resume_of_what_is_finished_does_nothing(sources: Path, tmp_path: Path) -> None:
    """A batch script may always say --resume."""
    converted(sources / "hf", tmp_path / "out", "distributed")
    before = contents(tmp_path / "out")
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert contents(tmp_path / "out") == before
    with pytest.raises(RequestError, match="is there already"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)


# --- disks and folders -----------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_found_before_anything_is_written(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        f_bavail, f_frsize = 10, 512

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    with pytest.raises(WorkError, match="free"):
        convert(sources / "hf", tmp_path / "new" / "out", Form("distributed"), ALONE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(WorkError, match=r"No space left(.|\n)*--resume"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert(sources / "hf", tmp_path / "out", Form("distributed"), Manner(resume=True, processes=1))
    assert check(tmp_path / "out").faults == ()


def test_a_folder_that_may_not_be_written(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def refused(self: Path, *arguments: Any, **options: Any) -> None:
        if self.name.startswith(".out"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        made(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(WorkError, match=r"Read-only file system(.|\n)*permissions"):
        convert(sources / "hf", tmp_path / "out", Form("distributed"), ALONE)


# --- hostile files ---------------------------------------------------------------------------------------------------


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


# --- wrong requests and wrong models ---------------------------------------------------------------------------------


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
