"""`orthant init`: what it writes is valid, explained and never in place of something; questions and flags agree."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from foundation.accelerators import find_device
from launch.checks import check_request, check_sizes
from launch.cli import main
from launch.config import load_config
from launch.initial_config import Wanted, draft
from model.presets import DEMO_VOCABULARIES, PRESETS

ON_GPUS = {"llama3_8b": 64, "llama3_1_405b": 1024}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_a_valid_configuration(preset: str) -> None:
    for gpus in {0, ON_GPUS.get(preset, 0)}:
        made = draft(Wanted(preset, gpus=gpus), "first", "orthant init")
        assert made.config.model.preset == preset and made.config.origin.file is not None
        ranks = check_sizes(made.config, world_size=gpus or None).world_size
        assert ranks == gpus if gpus else ranks in (1, 4)
        assert (made.predicted is None) == (gpus == 0)
        assert made.config.parallel.tensor_model_parallel_size <= 8


def test_every_setting_says_why() -> None:
    made = draft(Wanted("qwen3_30b_a3b", gpus=64, gpu="h100"), "first", "orthant init")
    lines = made.text.splitlines()
    settings = [line for line in lines if line.startswith("  ") and not line.lstrip().startswith("#")]
    assert len(settings) > 15
    for line in settings:
        before = lines[lines.index(line) - 1].lstrip()
        assert " # " in line or before.startswith("# "), line
    assert max(map(len, lines)) <= 120
    values = yaml.safe_load(made.text)
    assert values["parallel"]["expert_model_parallel_size"] > 1 and values["training"]["precision"] == "bf16"


def test_tensor_parallel_ranks_stay_inside_a_node() -> None:
    wanted = Wanted("llama3_70b", gpus=64, gpus_per_node=2)
    assert draft(wanted, "first", "orthant init").config.parallel.tensor_model_parallel_size <= 2


@pytest.mark.parametrize(("preset", "per_node"), [("llama3_8b", 3), ("llama3_70b", 6), ("llama3_70b", 5)])
def test_no_nodes_end_cuts_tensor_parallel_ranks(preset: str, per_node: int) -> None:
    wanted = Wanted(preset, gpus=8 * per_node, gpus_per_node=per_node)
    made = draft(wanted, "first", "orthant init")
    assert per_node % made.config.parallel.tensor_model_parallel_size == 0


def test_nodes_of_a_rack_share_its_links() -> None:
    first, second = (
        draft(Wanted("llama3_8b", gpus=144, gpus_per_node=size, gpu="gb200"), "first", "orthant init").predicted
        for size in (4, 8)
    )
    assert first == second


def test_a_first_layout_leaves_some_memory_free() -> None:
    made = draft(Wanted("llama3_8b", gpus=64, gpu="h100"), "first", "orthant init")
    needed = re.search(r"(\d+) GiB on the fullest stage", made.predicted or "")
    assert needed is not None and int(needed[1]) <= 0.9 * find_device("h100").memory_gib


def test_flags_write_a_file_that_train_takes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "mé texts").mkdir()
    (workplace / "mé texts" / "a b.txt").write_text("Words. " * 50)
    code = main(["init", "--preset", "demo_3m", "--data", "mé texts", "--tokenizer", "300", "--out", "new/my run.yaml"])
    said = capsys.readouterr()
    assert code == 0 and "orthant train 'new/my run.yaml'" in said.out and said.err == ""
    config = load_config(Path("new/my run.yaml"))
    assert check_request(config, world_size=None).world_size == 4
    assert config.data.sources == ("mé texts",) and config.data.tokenizer.vocab_size == 300
    assert str(config.run.folder) == "runs/my run"


def test_what_is_missing_is_said_and_the_file_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--preset", "llama3_8b", "--gpus", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert any("corpus" in what for what in told["missing"])
    assert told["path"] == "llama3_8b.yaml" and "tokens/s/GPU" in told["predicted"]
    assert any("submit llama3_8b.yaml --nodes 2 --gpus-per-node 8" in command for command in told["next"])


def test_submit_takes_what_init_wrote(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.submission.slurm.shutil.which", lambda name: None)
    (workplace / "corpus.txt").write_text("A corpus.\n")
    (workplace / "tokenizer.json").write_text("{}")
    files = ["--data", "corpus.txt", "--tokenizer", "tokenizer.json"]
    assert main(["init", "--preset", "llama3_8b", *files, "--gpus", "64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    submit = next(command for command in told["next"] if " submit " in command)
    assert main(submit.split()[1:]) == 0
    assert "#SBATCH --nodes=8" in capsys.readouterr().out


def test_a_file_that_is_there_stays(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "mine.yaml").write_text("mine\n")
    assert main(["init", "--preset", "demo_3m", "--out", "mine.yaml"]) == 2
    assert "mine.yaml is there already" in capsys.readouterr().err
    assert (workplace / "mine.yaml").read_text() == "mine\n"


def answer(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_questions_and_flags_write_the_same(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "there.yaml").write_text("")
    answer(monkeypatch, "llama3_8", "llama3_8b", "a, b", "tok", "many", "16", "h1000", "h100", "0", "4", "there.yaml",
           "asked.yaml")  # fmt: skip
    assert main(["init"]) == 0
    text = (workplace / "asked.yaml").read_text()
    (command,) = [line for line in text.splitlines() if line.startswith("# Made by: ")]
    (workplace / "asked.yaml").unlink()
    assert main(command.removeprefix("# Made by: orthant ").split()) == 0
    assert (workplace / "asked.yaml").read_text() == text
    assert "sources: [a, b]" in text


def test_empty_answers_take_the_usual(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, *[""] * 5)
    assert main(["init"]) == 0
    config = load_config(workplace / "demo_3m.yaml")
    assert config.data.tokenizer.vocab_size == DEMO_VOCABULARIES["demo_3m"]


def test_nobody_to_ask_is_a_wrong_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answer(monkeypatch, "demo_3m")
    assert main(["init"]) == 2
    assert "orthant init --preset demo_3m" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--preset", "lama"], "model.preset = 'lama' is refused"),
        (["--preset", "llama3_8b", "--gpus", "8", "--gpu", "z9"], "no accelerator is known as 'z9'"),
        (["--preset", "llama3_1_405b", "--gpus", "8"], "no layout of this run works on 8 x h100"),
        (["--preset", "demo_3m", "--seq-length", "9999"], "training.seq_length = 9999 is refused"),
        (["--preset", "demo_3m", "--out", "/dev/full/x.yaml"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not list(Path().glob("*.yaml"))
