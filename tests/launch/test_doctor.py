"""The doctor: what it finds is really there, and what is missing comes with its fix."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from launch.commands import doctor as command
from launch.diagnosis import asking, cluster, gpus, kernels, machine, packages, runtime, tools
from launch.diagnosis.finding import Finding
from launch.machine import gpu_present, package_present


def test_the_project_names_what_it_needs() -> None:
    needed = {one.name for one in packages.requirements()}
    assert {"torch", "megatron-core", "pydantic"} <= needed
    assert not {"pytest", "transformer-engine"} & needed
    assert [one.name for one in packages.requirements("gpu")] == ["transformer-engine"]
    assert {one.name for one in packages._requirements_of_source_tree(None)} == needed


def test_packages_are_held_against_their_tested_versions() -> None:
    assert packages.check_package(Requirement("pytest>=1")).status == "ok"
    old = packages.check_package(Requirement("pytest<1"))
    assert old.status == "broken" and old.is_trouble and "'pytest<1'" in str(old.fix)
    absent = packages.check_package(Requirement("no-such-package-here>=2"))
    assert absent.status == "missing" and absent.is_trouble and "no-such-package-here>=2" in str(absent.fix)


def test_local_versions_count_as_their_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert packages.check_package(Requirement("torch==2.13.0")).status == "ok"


def test_a_module_that_does_not_import_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("raise OSError('libcuda.so.1: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert asking.import_trouble("half_installed") == "OSError: libcuda.so.1: cannot open"
    assert asking.import_trouble("json") is None


def put_package(folder: Path, name: str, *files: str) -> None:
    for file in ("__init__.py", *files):
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('must not be imported')\n")


def test_nvidia_apex_is_told_from_its_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert kernels.apex().status in ("note", "missing")
    put_package(tmp_path, "apex", "auth.py")
    stranger = kernels.apex()
    assert stranger.status == "broken" and "not NVIDIA's" in stranger.found and "uninstall apex" in str(stranger.fix)
    put_package(tmp_path, "apex", "optimizers/fused_adam.py")
    bare = kernels.apex()
    assert bare.status == "missing" and "without FusedAdam" in bare.found
    for module in ("amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda"):
        (tmp_path / f"{module}.py").write_text("")
    whole = kernels.apex()
    assert whole.status == "ok" and "weight-gradient accumulation" in whole.found


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_a_logger").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not package_present("left_by_a_logger")
    assert package_present("json") and not package_present("no_such_package_here")


def test_a_gpu_is_known_by_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not gpu_present(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not gpu_present(tmp_path)
    (tmp_path / "dev/nvidia0").touch()
    assert gpu_present(tmp_path)
    other = tmp_path / "other"
    (other / "proc/driver/nvidia").mkdir(parents=True)
    assert gpu_present(other)


def test_gpus_are_listed_or_the_driver_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpu_present", lambda: True)
    answer = SimpleNamespace(returncode=0, stdout="NVIDIA H100, 81559 MiB, 550.1\nNVIDIA H100, 81559 MiB, 550.1\n")
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: answer)
    assert [one.status for one in gpus.gpus()] == ["ok", "ok"]
    failed = SimpleNamespace(returncode=9, stdout="", stderr="NVML: Driver/library version mismatch\n")
    monkeypatch.setattr(gpus.subprocess, "run", lambda *_, **__: failed)
    (finding,) = gpus.gpus()
    assert finding.is_trouble and "mismatch" in finding.found and finding.fix

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpus.subprocess, "run", absent)
    (finding,) = gpus.gpus()
    assert finding.status == "missing" and not finding.is_trouble and "utility" in str(finding.fix)


@pytest.mark.parametrize(("visible", "hidden"), [("", True), ("-1", True), ("0,1", False), ("GPU-8f", False)])
def test_gpus_that_are_hidden_are_not_here(
    visible: str, hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_present(tmp_path) is not hidden
    assert ("hidden by CUDA_VISIBLE_DEVICES" in gpus.gpus()[0].found) is hidden


def test_a_gpu_that_torch_cannot_use_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(runtime, "gpu_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = runtime.torch_runs()
    assert finding.is_trouble and "a GPU is here" in finding.found and finding.fix


def test_slurm_is_whole_absent_or_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [one.status for one in cluster.slurm()] == ["note"]
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (part,) = cluster.slurm()
    assert part.status == "missing" and part.found == "without sinfo" and not part.is_trouble
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho slurm 23.11.4\n")
    (tmp_path / "sinfo").chmod(0o755)
    (whole,) = cluster.slurm()
    assert (whole.status, whole.found) == ("ok", "slurm 23.11.4")


SINFO = """\
#!/bin/sh
case "$*" in
  --version) echo slurm 23.11.4 ;;
  *) printf '%s\\n' 'gpu*|up|4|gpu:h100:8|1-00:00:00' 'old|down|2|(null)|infinite' ;;
esac
"""


def test_partitions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "sinfo").write_text(SINFO)
    (tmp_path / "sinfo").chmod(0o755)
    first, second = cluster.partitions()
    assert (first.name, first.status) == ("partition gpu", "ok")
    assert first.found == "up, 4 nodes, gpu:h100:8, 1-00:00:00 at most, the default"
    assert second.status == "note" and "no GPUs" in second.found
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    (silent,) = cluster.partitions()
    assert silent.status == "missing" and "scontrol ping" in str(silent.fix)


def test_tools_that_lack_come_with_their_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = {one.name: one for one in tools.tools()}
    assert set(lacking) == {"git", "make", "gcc", "chromium"}
    assert all(one.fix for one in lacking.values()) and lacking["chromium"].status == "note"
    for name in ("git", "make", "clang", "chromium"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert [one.status for one in tools.tools()] == ["ok"]


@pytest.mark.parametrize(
    ("given", "status"), [(None, None), ("1", "ok"), ("100000", "note"), ("many", "note"), ("0", "note")]
)
def test_threads_beyond_the_cores_are_noted(
    given: str | None, status: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    found = [one for one in machine.cores() if one.name == "OMP_NUM_THREADS"]
    assert [one.status for one in found] == ([] if status is None else [status])
    assert all(one.fix for one in found if one.status == "note")


def test_little_memory_disk_and_limits_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    assert machine.free_memory(tmp_path) is None
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert machine.free_memory(tmp_path) == 2 << 20
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 30)
    assert machine.memory().status == "note" and machine.memory().fix
    room = SimpleNamespace(free=1 << 20, total=1 << 30)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: room)
    assert [one.status for one in machine.disk()] == ["note", "note"] and all(one.fix for one in machine.disk())
    assert [one.status for one in machine.shared_memory()] == []
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (256, 256))
    assert {one.name for one in machine.limits()} == {"open files", "processes", "address space"}
    assert "hard limit is 256" in str(machine.limits()[0].fix)
    infinite = machine.resource.RLIM_INFINITY
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (infinite, infinite))
    assert machine.limits() == []


def test_a_home_that_cannot_be_written_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.home() == []
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    (finding,) = machine.home()
    assert finding.status == "note" and finding.fix


def test_our_packages_are_ours() -> None:
    (finding,) = [one for one in packages.our_packages() if one.name == "imports"]
    assert finding.status == "ok"


def test_a_stranger_in_place_of_our_package_is_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    shadowed, absent = packages.our_packages(["stranger", "no_such_package_here"])[:2]
    assert shadowed.is_trouble and str(tmp_path / "stranger.py") in shadowed.found
    assert "PYTHONSAFEPATH=1" in str(shadowed.fix)
    assert absent.is_trouble and absent.found == "not found"


def test_a_file_in_the_working_folder_that_would_shadow_ours_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    noted = [one for one in packages.our_packages() if one.name == "working folder"]
    assert [one.status for one in noted] == ["note"] and "data.py" in noted[0].found
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert [one for one in packages.our_packages() if one.name == "working folder"] == []


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    whole = machine.memory_bytes(tmp_path)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.memory_bytes(tmp_path) == whole
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1048576\n")
    assert machine.memory_bytes(tmp_path) == 1 << 20


@pytest.mark.parametrize("needed", [True, False])
def test_only_what_is_needed_fails_the_command(
    needed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Finding("kernels", "thing", "missing", "not installed", "install thing", needed=needed)
    monkeypatch.setattr(command, "examine", lambda: [Finding("runtime", "torch", "ok", "2.13"), missing])
    assert command.doctor(as_json=False) == int(needed)
    assert "fix: install thing" in capsys.readouterr().out
    assert command.doctor(as_json=True) == int(needed)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is not needed and report["findings"][1]["fix"] == "install thing"


def test_this_machine_can_be_examined(capsys: pytest.CaptureFixture[str]) -> None:
    code = command.doctor(as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is (code == 0)
    assert all(one["fix"] for one in report["findings"] if one["status"] in ("missing", "broken"))
    assert any(one["name"] == "Python" and sys.executable in one["found"] for one in report["findings"])
