"""Every block of code in the README and in the pages: its commands run, or are read by the program's own parser.

What becomes of a block follows from its language (LANGUAGES), and of a command in a shell block from its first words
(COMMANDS). What stands in neither fails here: say what it is.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.config import config_from
from tests.docs.blocks import ROOT, Block, all_blocks, commands_meant, commands_of
from tests.docs.parsed import check_settings, parse
from tests.docs.workplace import lay_out
from tests.launch.refusals import BASE
from tests.launch.slurm_stubs import stub_slurm
from training.survival.config import PreflightConfig, WatchdogConfig

LANGUAGES = {
    "sh": "commands, each by COMMANDS",
    "": "an indented block: as sh",
    "usage": "what a command takes: each form is read by the parser",
    "yaml": "settings: valid over a small configuration",
    "json": "is JSON",
    "python": "compiles; that of slurm.md runs in tests/cluster/test_docs.py",
    "text": "what a program prints, a drawing, a formula: nothing to run",
}
RUN, SETTINGS, OPTIONS = "run here", "parsed, and its configuration checked", "parsed"
COMMANDS = {
    "orthant ckpt": RUN,
    "orthant config": RUN,
    "orthant convert": RUN,
    "orthant data": RUN,
    "orthant model": RUN,
    "orthant plan": RUN,
    "orthant report": RUN,
    "orthant submit": RUN,  # Slurm's commands are stubs
    "orthant train": SETTINGS,
    "orthant verify": SETTINGS,
    "orthant rehearse": SETTINGS,
    "orthant sft": SETTINGS,
    "orthant reward": SETTINGS,
    "orthant dpo": SETTINGS,
    "orthant ppo": SETTINGS,
    "orthant scale": SETTINGS,  # its jobs: tests/launch/test_scale.py and tests/cluster/test_scaling.py
    "orthant scale report": OPTIONS,
    "orthant generate": OPTIONS,  # needs a model that has learnt: tests/launch/test_generate.py
    "orthant evaluate": OPTIONS,
    "orthant doctor": OPTIONS,  # tells of this machine: tests/launch/test_doctor.py
    "orthant init": RUN,
    "orthant completion": RUN,
    "eval": "not run: tests/launch/test_completion.py has bash run what it evaluates",
    "export": "not run",
    "sbatch": "its script is there; Slurm takes it in tests/cluster/test_docs.py",
    "make": "its target is there",
    "python -m": "its module is there",
    "scripts/": "it is there",
    "git clone": "not run: from where depends",
    "cd": "not run",
}
BLOCKS = all_blocks()
SHELL = [block for block in BLOCKS if block.language in ("sh", "")]


def class_of(words: list[str]) -> str:
    """That of the longest entry of COMMANDS that a command begins with."""
    line = " ".join(words)
    known = [name for name in COMMANDS if line == name or line.startswith(name if name.endswith("/") else f"{name} ")]
    assert known, f"no class for {line!r}: add one to COMMANDS"
    return max(known, key=len)


def words_of(words: list[str]) -> list[str]:
    """Without the way to the environment, which the tests have their own of."""
    return [words[0].removeprefix(".venv/bin/"), *words[1:]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("docs")
        patch.chdir(folder)
        lay_out(folder)
        return folder


@pytest.fixture
def workplace(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder, symlinks=True)
    stubs = stub_slurm(tmp_path / "stubs", monkeypatch)
    (stubs / "nodes-gpu").write_text("".join(f"n{number}|gpu:h100:8|128|idle\n" for number in range(8)))
    partition = "PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP\n"
    (stubs / "partitions").write_text(partition)
    monkeypatch.setattr("launch.checks.gpu_present", lambda: False)
    monkeypatch.chdir(folder)
    return folder


def test_every_block_has_a_class() -> None:
    assert [block.place for block in BLOCKS if block.language not in LANGUAGES] == []
    for block in SHELL:
        assert all(class_of(words_of(words)) for words in commands_of(block.text)), block.place
    assert len(SHELL) > 20


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.place)
def test_the_commands_of_a_block(block: Block, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in map(words_of, commands_of(block.text)):
        name = class_of(words)
        if name.startswith("orthant"):
            check_command(words[1:], COMMANDS[name], capsys)
        elif name == "sbatch":
            assert any((ROOT / word).is_file() for word in words if word.endswith(".sbatch")), words
        elif name == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
            assert words[1] in targets
            if words[2:] and words[2].startswith("AREA="):
                assert (ROOT / "benchmarks" / "prove" / f"{words[2][5:]}.py").is_file()
        elif name == "python -m":
            if words[2].startswith(("benchmarks.", "scripts.")):
                assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), words
            assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/")), words
        elif name == "scripts/":
            assert (ROOT / words[0]).is_file()


def check_command(words: list[str], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run `orthant WORDS`, or read it as far as its class says."""
    command, params = parse(words)
    task = params.get("task", "train")
    if task != "train":  # submit --task sft: its job is in tests/launch/test_submit.py
        command, kind = task, SETTINGS
    if kind == SETTINGS:
        check_settings(command, {**params, "config": _config(command, params["config"])})
    elif kind == RUN:
        assert main(words) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err}"


def _config(command: str, named: Path) -> Path:
    """CONFIG.yaml stands for a configuration of the command's own kind."""
    kinds = ("sft", "reward", "dpo", "ppo")
    return Path("configs") / command / "demo.yaml" if command in kinds and named.name == "CONFIG.yaml" else named


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "usage"], ids=lambda block: block.place)
def test_every_form_of_a_usage_is_taken(block: Block) -> None:
    for line in block.text.splitlines():
        for words in commands_meant(line):
            if words[0] == "orthant":
                parse(["2" if word == "N" else word for word in words[1:]])
            else:
                assert words[0] == "sbatch" and any((ROOT / word).is_file() for word in words), line


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.language == "yaml"], ids=lambda block: block.place)
def test_settings_are_valid(block: Block) -> None:
    given = yaml.safe_load(block.text)
    whole: dict[str, Any] = {
        name: {**BASE.get(name, {}), **given.get(name, {})} if name != "model" else given.get(name, BASE[name])
        for name in {*BASE, *given}
    }
    assert config_from(whole).training.train_steps == whole["training"]["train_steps"]


def test_settings_that_are_called_defaults_are_the_defaults() -> None:
    shown = [yaml.safe_load(block.text) for block in BLOCKS if block.page == "survival.md" and block.language == "yaml"]
    given = {name: section for block in shown for name, section in block.items()}
    assert WatchdogConfig(**given["watchdog"]) == WatchdogConfig()
    assert PreflightConfig(**given["preflight"]) == PreflightConfig()


def test_the_other_languages() -> None:
    for block in BLOCKS:
        if block.language == "json":
            assert json.loads(block.text), block.place
        elif block.language == "python":
            assert compile(block.text, block.place, "exec").co_code, block.place
