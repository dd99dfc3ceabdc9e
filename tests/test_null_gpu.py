"""The null GPU's script, its names and the campaign's commands: all that can be said without its environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.gpu import cases
from benchmarks.prove import null_gpu, null_gpu_numbers
from benchmarks.prove._null_gpu_commands import Command, commands, wanted, write_data
from benchmarks.prove.null_gpu import Environment, launches, run_command
from launch.config import load_config
from launch.shrink import Devices, shrink
from parallel.layout import ParallelLayout
from scripts.null_gpu.build import LIBRARIES, driver_names, empty_functions, exported_names

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/null_gpu.sh"

HEADER = """
#define cuMemAlloc                          cuMemAlloc_v2
    #define cuMemcpy                        __CUDA_API_PTDS(cuMemcpy)
#define CUDA_VERSION 13000
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
typedef void (CUDA_CB *CUhostFn)(void *userData);
"""
LISTING = """
0000000000001000 T cudaMalloc@@libcudart.so.13
0000000000001000 W cudaFree
0000000000000000 A libcudart.so.13
0000000000001000 D cudaData
0000000000001000 T _ZN4cuda3fooEv
0000000000001000 T _init
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "install FOLDER, build FOLDER, or run FOLDER CMD"),
        (["install"], "install FOLDER"),
        (["run", "folder"], "run FOLDER CMD"),
        (["remove", "folder"], "install FOLDER"),
        (["run", "folder", "true"], "null_gpu.sh install folder makes one"),
        (["build", "folder"], "null_gpu.sh install folder makes one"),
    ],
)
def test_the_script_says_what_it_takes(words: list[str], said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_environment_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("mine")
    done = subprocess.run(
        ["bash", str(SCRIPT), "install", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and "name a folder that is not there" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pyvenv.cfg"]


def test_names_come_from_what_nvidia_exports() -> None:
    assert driver_names(HEADER) == {"cuInit", "cuMemAlloc", "cuMemAlloc_v2", "cuMemcpy"}
    assert exported_names(LISTING) == {"cudaMalloc", "cudaFree"}
    source = empty_functions({"cuInit", "cuCtxCreate"})
    assert source.index("int cuCtxCreate(void)") < source.index("int cuInit(void)")
    for source in {source for library in LIBRARIES for source in library.sources}:
        head = (ROOT / "scripts/null_gpu" / source).read_text().splitlines()[0]
        assert head.startswith("// In the place of "), source


def test_commands_come_after_what_they_need() -> None:
    every = commands()
    names = [one.name for one in every]
    assert len(set(names)) == len(names)
    for place, one in enumerate(every):
        assert all(needed in names[:place] for needed in one.needs), one.name
    chosen = [one.name for one in wanted({"resume at TP2"}, every)]
    assert chosen == ["train bf16", "resume", "resume at TP2"]


@pytest.mark.parametrize(
    "command", [one for one in commands() if one.text.startswith("train ")], ids=lambda one: one.name
)
def test_trainings_ask_for_the_cards_that_they_see(command: Command) -> None:
    _, path, *overrides = command.text.replace("{runs}", "runs").split()
    config = load_config(path, overrides)
    assert ParallelLayout.from_config(config.parallel).world_size == command.cards


def test_every_axis_recipe_and_library_is_asked_for(tmp_path: Path) -> None:
    text = " ".join(one.text for one in commands())
    for asked in (
        "tensor_model_parallel_size=2", "sequence_parallel=true", "pipeline_model_parallel_size=2", "zero_stage=3",
        "context_parallel_size=2", "expert_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2", "fsdp2",
        "recipe=current", "recipe=delayed", "recipe=blockwise", "kernels=torch", "cuda_graphs=true", "dropout=0.1",
        "precision=fp32", "precision=bf16", "granularity=full", "granularity=selective", "overlap=data_parallel",
    ):  # fmt: skip
        assert asked in text, asked
    write_data(tmp_path)
    assert all((tmp_path / Path(word).name).exists() for word in text.split() if word.endswith(".jsonl"))


def answered(folder: Path, log: str, code: int = 0) -> Environment:
    """An environment whose commands write `log` and end with `code`."""

    class Answered(Environment):
        def run(self, words: list[str], cards: int, more: Mapping[str, str], seconds: float = 0.0) -> tuple[int, str]:
            Path(more[null_gpu.LOG] + ".17").write_text(log)
            return code, f"no luck in {folder}\n"

    return Answered(folder / "environment", folder)


def test_a_command_that_fails_or_stays_on_the_cpu_is_a_failure(tmp_path: Path) -> None:
    command = Command("one", "train one.yaml")
    good = run_command(command, answered(tmp_path, "kernel 1 1 1 32 f\nproduct 1 2 3\nkernel 1 1 1 32 g\nfill 8\n"))
    assert good["launched"] == {"kernels": 2, "products": 1} and "failure" not in good
    (tmp_path / "logs" / "one.17").unlink()
    on_cpu = run_command(command, answered(tmp_path, "copy 8 host host\n"))
    assert on_cpu["failure"] == "nothing was launched on a card"
    failed = run_command(command, answered(tmp_path, "kernel 1 1 1 1 f\n", code=1))
    assert failed["exit_code"] == 1 and failed["failure"] == "no luck in runs"
    (tmp_path / "logs" / "one.18").write_text("kernel 1 1 1 1 f\ncollective send 8\n")
    assert launches(tmp_path / "logs" / "one") == {"kernels": 2, "collectives": 1}


@pytest.mark.parametrize("replays", [True, False])
def test_graphs_that_are_replayed_find_their_memory(tmp_path: Path, replays: bool) -> None:
    told: dict[str, str] = {}

    class Listening(Environment):
        def run(self, words: list[str], cards: int, more: Mapping[str, str], seconds: float = 0.0) -> tuple[int, str]:
            told.update(more)
            return 0, ""

    run_command(
        Command("one", f"train one.yaml parallel.cuda_graphs={str(replays).lower()}"), Listening(tmp_path, tmp_path)
    )
    assert told.get("ORTHANT_NULL_GPU_CACHE") == ("1" if replays else None)


def test_the_campaign_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(null_gpu.ENVIRONMENT, raising=False)
    monkeypatch.setattr("sys.argv", ["null_gpu"])
    assert null_gpu.main() == 2
    assert "scripts/null_gpu.sh install FOLDER" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["null_gpu", "--list"])
    assert null_gpu.main() == 0
    assert capsys.readouterr().out.splitlines() == [*(one.name for one in commands()), *(one.name for one in cases())]


@pytest.mark.parametrize("name", null_gpu_numbers.comparisons())
def test_comparisons_fit_the_cards(name: str) -> None:
    config = load_config(ROOT / "configs/tiny.yaml", null_gpu_numbers.comparisons()[name].split())
    small = shrink(config, Devices(4, "4 GPUs", gpus=True))
    assert not [note for note in small.notes if "to fit" in note]
    assert config.model.kernels in name and config.training.precision in name


def compared(folder: Path, said: str, code: int = 0) -> null_gpu.Row:
    """The row of a comparison that said this."""

    class Said(Environment):
        def run(self, words: list[str], cards: int, more: Mapping[str, str], seconds: float = 0.0) -> tuple[int, str]:
            assert words[-3:] == ["--device", "gpu", "--json"] and more == null_gpu_numbers.COMPUTE
            return code, said

    return null_gpu_numbers.run_comparison("training.precision=fp32", Said(folder, folder))


@pytest.mark.parametrize(("worst", "fails"), [(2e-6, False), (2e-4, True), (None, True)])
def test_a_comparison_in_fp32_is_held_to_what_cpus_are(tmp_path: Path, worst: float | None, fails: bool) -> None:
    check = {"precision": "fp32", "kind": "gradient", "count": 3, "worst": worst, "bound": 8e-3, "name": "one"}
    said = "warning: {not this}\n" + json.dumps({"verified": "TP1", "checks": [check]}, indent=2) + "\n"
    row = compared(tmp_path, said)
    assert row["layout"] == "TP1" and row["checks"] == [check]
    assert ("failure" in row) == fails


def test_a_comparison_that_says_nothing_or_ends_badly_is_a_failure(tmp_path: Path) -> None:
    assert compared(tmp_path, "all is well\n")["failure"] == "nothing was compared"
    row = compared(tmp_path, f"null GPU: nothing computes what f would\nlost in {tmp_path}\n", code=1)
    assert row["exit_code"] == 1 and "nothing computes what f would\nlost in " in row["failure"]
