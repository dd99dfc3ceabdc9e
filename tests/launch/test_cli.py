"""The command line: exit codes, messages without tracebacks, and answers that come at once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from foundation.errors import WorkError
from launch import cli
from launch.terminal import print_error
from tests.docs.parsed import parse

ROOT = Path(__file__).resolve().parents[2]


def orthant(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "launch", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment},
        check=False,
    )


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom launch.cli import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'datasets', 'matplotlib', 'rich', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stderr
    for command in ("train", "verify", "generate", "config", "data", "doctor", "model", "submit", "report"):
        assert f"\n  {command} " in answer.stdout
    assert "orthant train configs/demo.yaml" in answer.stdout


def commands() -> Iterator[tuple[str, Any]]:
    """Every command and group with its name, the lazy ones included."""
    root = typer.main.get_command(cli.app)

    def below(group: Any, name: str) -> Iterator[tuple[str, Any]]:
        for inner in group.list_commands(None):
            command = group.get_command(None, inner)
            yield f"{name} {inner}", command
            if hasattr(command, "list_commands"):
                yield from below(command, f"{name} {inner}")

    yield from below(root, "orthant")


def test_every_command_has_help_and_examples_that_its_parser_takes() -> None:
    told = dict(commands())
    assert len(told) > 35 and "orthant data tokenize" in told and "orthant scale report" in told
    for name, command in told.items():
        text, _, examples = (command.help or "").partition("Example:")
        assert len(text.strip().splitlines()[0]) > 20 and examples, name
        lines = [line.strip() for line in examples.splitlines() if line.strip().startswith(("orthant ", "eval "))]
        assert any(
            line.replace('eval "$(', "").startswith(name) or "plan" in name or "scale" in name for line in lines
        ), name
        for line in lines:
            if line.startswith("orthant "):
                parse(shlex.split(line.partition(" > ")[0], comments=True)[1:])
        for option in command.params:
            assert option.param_type_name == "argument" or option.help, f"{name}: {option.name} has no help"


def test_every_command_that_works_takes_quiet() -> None:
    for name, command in commands():
        assert hasattr(command, "list_commands") or any("--quiet" in option.opts for option in command.params), name


def test_data_commands_come_from_their_own_module() -> None:
    answer = orthant("data", "--help")
    assert answer.returncode == 0, answer.stderr
    assert "tokenize" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing argument 'CONFIG.yaml'"),
        (["model", "--seq-length", "0"], "--seq-length"),
        (["doctor", "--what"], "No such option"),
        (["config", "show", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["config", "show", str(ROOT / "configs/tiny.yaml"), "model.layers=3"], "model.layers = 3 is refused"),
    ],
)
def test_wrong_requests_exit_with_2_and_no_traceback(arguments: list[str], says: str) -> None:
    answer = orthant(*arguments)
    assert answer.returncode == 2
    assert says in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_config_show_prints_yaml_and_json() -> None:
    file = str(ROOT / "configs/demo.yaml")
    shown = orthant("config", "show", file, "training.seed=5")
    assert shown.returncode == 0 and "num_layers: 4" in shown.stdout and "seed: 5" in shown.stdout
    assert shown.stdout.startswith("run:\n")
    values = json.loads(orthant("config", "show", file, "--json").stdout)
    assert values["model"]["hidden_size"] == 192


def test_config_schema_prints_json() -> None:
    assert json.loads(orthant("config", "schema").stdout)["properties"]["model"]


def test_model_lists_presets() -> None:
    table = orthant("model").stdout
    assert "llama3_8b" in table and "8.03 B" in table
    listed = json.loads(orthant("model", "--json", "--seq-length", "8192").stdout)
    row = next(one for one in listed["presets"] if one["preset"] == "llama3_1_405b")
    assert row["parameters"] == 405_853_388_800
    assert listed["seq_length"] == 8192


def test_a_pipe_that_closes_leaves_no_traceback() -> None:
    script = f"{shlex.quote(sys.executable)} -P -m launch config schema | head -1"
    answer = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert answer.stdout == "{\n" and "Traceback" not in answer.stderr


def run_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return cli.main(["train", "a.yaml"])


def test_failed_work_exits_with_1_and_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(monkeypatch, WorkError("the disk is full", where="runs/a", cure="free some")) == 1
    assert capsys.readouterr().err == "the disk is full\n  where: runs/a\n  do: free some\n"


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.strip() == "stopped by Ctrl-C"


def test_a_defect_keeps_its_traceback_and_asks_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_with(monkeypatch, ZeroDivisionError("a defect"))
    script = (
        "import launch.cli as cli; cli._run = lambda *a, **k: 1 / 0; raise SystemExit(cli.main(['train', 'a.yaml']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False
    )
    assert answer.returncode == 1
    assert "ZeroDivisionError" in answer.stderr and "Traceback" in answer.stderr
    assert answer.stderr.rstrip().endswith("please report it with the lines above.")


def test_commands_return_their_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    class Module:
        @staticmethod
        def verify(config: Path, overrides: list[str], *, as_json: bool, max_ranks: int, device: str) -> int:
            calls.append((config, overrides, as_json, max_ranks, device))
            return 3

    monkeypatch.setattr("launch.cli_options.import_module", {"launch.commands.verify": Module}.get)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert cli.main(["verify", "a.yaml", "x.y=1", "z.w=2", "--json"]) == 3
    assert calls == [(Path("a.yaml"), ["x.y=1", "z.w=2"], True, 8, "cpu")]


def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = WorkError("it failed", cure="try again")
    print_error(error)
    assert "\033[" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_error(error)
    assert "\033[1;31mit failed" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    print_error(error)
    assert "\033[" not in capsys.readouterr().err
