"""What the disk does not give, and what no reader is made for: one message, never a traceback."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.catalog import OPTIMIZER_PREFIX
from checkpoint_tools.convert import Manner, convert
from checkpoint_tools.formats.detect import open_checkpoint
from checkpoint_tools.formats.distributed_target import plan_distributed
from checkpoint_tools.manifest import MANIFEST
from checkpoint_tools.planning import Form
from checkpoint_tools.soundness import check
from checkpoint_tools.workers import _received
from foundation.errors import RequestError, WorkError

NAME = "decoder.final_layernorm.weight"


def refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the file `name` be one that may not be read."""

    def guarded(call: Any) -> Any:
        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(str(path)).name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path, *arguments, **options)

        return opened

    monkeypatch.setattr(os, "open", guarded(os.open))
    monkeypatch.setattr(Path, "open", guarded(Path.open))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hf", "model.safetensors"),
        ("hf", "config.json"),
        ("hf", "conversion.json"),
        ("distributed", ".metadata"),
        ("distributed", "__0_0.distcp"),
        ("distributed", "conversion.json"),
        ("distributed", MANIFEST),
        ("megatron", "model_optim_rng.pt"),
    ],
)
def test_a_file_that_may_not_be_read_is_named(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    refused(monkeypatch, name)
    with pytest.raises(WorkError, match=f"{name}(.|\n)*Permission denied"):
        convert(sources / kind, tmp_path / "out", Form("distributed"), Manner(processes=1))
    (fault,) = check(sources / kind, processes=1).faults
    assert name in fault and "Permission denied" in fault


def test_a_disk_that_fails_while_tensors_are_read(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    (fault,) = check(sources / "hf", processes=1).faults
    assert "model.safetensors cannot be read: Input/output error" in fault


def test_a_disk_that_fills_up_in_one_of_several_processes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("checkpoint_tools.target.PART_BYTES", 10_000)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(WorkError, match=r"No space left(.|\n)*where: (.|\n)*--resume"):
        convert(sources / "distributed", tmp_path / "out", Form("hf"), Manner(processes=2))


def test_more_files_than_may_be_open_at_a_time(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 4,096 ranks writes as many, and people's limit is 1,024."""
    monkeypatch.setattr("checkpoint_tools.formats.distributed_target.LEAST_FILE_BYTES", 1)
    monkeypatch.setattr("checkpoint_tools.formats.distributed_target.FILES", 1000)
    convert(sources / "hf", tmp_path / "many", Form("distributed"), Manner(processes=1))
    assert len(list((tmp_path / "many").glob("*.distcp"))) > 20
    usual, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 12, allowed))
        convert(tmp_path / "many", tmp_path / "out", Form("hf"), Manner(processes=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, allowed))


def test_a_process_that_is_killed_before_it_takes_its_work() -> None:
    """Its end of the pipe is then not closed but reset."""

    class Killed:
        exitcode = -9

        def join(self) -> None: ...

    ours, theirs = socket.socketpair()
    ours.send(b"work")
    theirs.close()
    with pytest.raises(WorkError, match="was ended .exit code -9"):
        _received(Connection(ours.detach()), Killed())


def test_optimizer_state_without_its_groups(sources: Path) -> None:
    catalog = open_checkpoint(sources / "hf")
    state = {OPTIMIZER_PREFIX + "exp_avg." + NAME: catalog.tensors[NAME]}
    source = replace(catalog, tensors={**catalog.tensors, **state})
    dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
    with pytest.raises(WorkError, match=r"common\.pt cannot be read"):
        plan_distributed(source, dtypes)


@pytest.mark.parametrize(
    ("name", "content"),
    [("latest", b"\xff\xfe"), ("latest_checkpointed_iteration.txt", "²".encode()), ("latest", b"\0")],
)
def test_a_pointer_that_is_no_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be looked into: File name too long"):
        open_checkpoint(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_json_of_endless_depth(sources: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    raw = b"[" * 100_000
    (tmp_path / "hf" / name).write_bytes(raw if name == "config.json" else len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(WorkError, match=f"{name} is damaged"):
        open_checkpoint(tmp_path / "hf")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": float("inf")}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN},
        {"rms_norm_eps": 10**400},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**12, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
    ],
)
def test_a_config_with_absurd_numbers(sources: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(sources / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(RequestError):
        open_checkpoint(tmp_path / "hf")
