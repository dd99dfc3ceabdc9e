"""`orthant submit`: every refusal before the queue, quoting that holds, chains; Slurm's commands are stubs here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundation.errors import RequestError
from launch.cli import main
from launch.submission.request import duration, shown
from launch.submission.script import slurm_word
from launch.submission.slurm import parse_node
from tests.launch.refusals import BASE
from tests.launch.slurm_stubs import stub_slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, `run.yaml`, that eight ranks can run; no Slurm."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (tmp_path / "corpus.txt").write_text("A corpus.\n")
    (tmp_path / "a_file").write_text("no folder\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr("launch.submission.slurm.shutil.which", lambda name: None)
    return tmp_path


@pytest.fixture
def slurm(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands, which write down what they are told, into the folder that this is."""
    return stub_slurm(workplace / "stubs", monkeypatch)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Submit = Callable[..., Answer]


@pytest.fixture
def submit(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Submit:
    def call(*arguments: str, nodes: int = 2, gpus: int = 4) -> Answer:
        code = main(["submit", "run.yaml", "--nodes", str(nodes), "--gpus-per-node", str(gpus), *arguments])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a layout that does not fill the nodes": (
        {"arguments": ["parallel.tensor_model_parallel_size=3", "--dry-run"]},
        "world size = 8 is refused",
        "is a multiple of tensor 3 x context 1 x pipeline 1 = 3 ranks",
    ),
    "a batch that does not divide": (
        {"arguments": ["training.global_batch_size=12"]},
        "training.global_batch_size = 12 is refused",
        "replicas = 1 x 8 = 8",
    ),
    "a time shorter than a checkpoint interval": (
        {"arguments": ["--time", "0:20:00", "--gpu", "cpu", "checkpoint.interval=50", "model.num_layers=2",
                       "training.global_batch_size=65536"]},
        "--time 0:20:00 is refused",
        "is shorter than one checkpoint interval: 50 steps",
    ),
    "a time that is over before the ranks could be asked to save": (
        {"arguments": ["--time", "6"]},
        "--time 0:06:00 is refused",
        "is above 6 minutes",
    ),
    "a time that is none": ({"arguments": ["--time", "tomorrow"]}, "--time tomorrow is refused", "above 0"),
    "a time above the partition's": (
        {"arguments": ["--time", "3-00:00:00"]},
        "--time 3-00:00:00 is refused",
        "MaxTime 2-00:00:00",
    ),
    "GPUs that nodes lack": ({"nodes": 1, "gpus": 8}, "--gpus-per-node 8 is refused", "the 4 GPUs of a node of"),
    "more nodes than a job may have": (
        {"nodes": 4, "arguments": ["training.global_batch_size=16"]}, "--nodes 4 is refused", "is at most 3",
    ),
    "more nodes than there are": (
        {"nodes": 3, "gpus": 0, "arguments": ["--partition", "cpu", "training.global_batch_size=3"]},
        "--nodes 3 is refused",
        "is at most 2",
    ),
    "more CPUs than a node has": ({"arguments": ["--cpus-per-rank", "5"]}, "5 CPUs each", "take 20 CPUs"),
    "an unknown partition": (
        {"arguments": ["--partition", "gup"]}, "--partition gup is refused", "partitions are cpu, gpu, old",
    ),
    "a partition that takes no jobs": (
        {"gpus": 2, "nodes": 1, "arguments": ["--partition", "old", "--time", "30"]}, "partition old takes no jobs",
        "not UP",
    ),
    "an image that is not there": (
        {"arguments": ["--container", "./image.sqsh"]}, "--container ./image.sqsh is refused", "is not there",
    ),
    "a run folder that the container does not see": (
        {"arguments": ["--container", "image", "run.folder=/var/tmp/a run"]}, "/var/tmp/a run is not in the container",
        "see the working folder, the checkout and --mounts",
    ),
    "a run folder that the container sees elsewhere": (
        {"arguments": ["--container", "image", "--mounts", "/var/tmp:/scratch", "run.folder=/var/tmp/run"]},
        "/var/tmp/run is not in the container", "under the same path",
    ),
    "a run folder that cannot be written": (
        {"arguments": ["run.folder=a_file/run"]}, "run.folder = 'a_file/run' is refused", "is a file",
    ),
    "a run folder that ends Slurm's line": (
        {"arguments": ["run.folder=runs/x\n#SBATCH --wrap=id"]}, "an override", "Slurm's options end there",
    ),
    "a run folder with a backslash": (
        {"arguments": ["run.folder=runs/a\\b"]}, "run.folder = 'runs/a\\\\b' is refused", "change their meaning",
    ),
    "sbatch's nodes, which would undo what was checked": (
        {"arguments": ["--sbatch", "--nodes=9"]}, "--sbatch --nodes=9 is refused", "Slurm heeds the last of two",
    ),
    "sbatch's time, in short": ({"arguments": ["--sbatch", "-t99"]}, "--sbatch -t99 is refused", "--time would take"),
    "sbatch's option and value in words": (
        {"arguments": ["--sbatch", "--ntasks 4"]}, "--sbatch --ntasks 4 is refused", "--ntasks would take",
    ),
    "another folder to work in": (
        {"arguments": ["--sbatch", "--chdir=/"]}, "--sbatch --chdir=/ is refused", "relative paths",
    ),
    "an array": ({"arguments": ["--sbatch", "--array=0-3"]}, "--sbatch --array=0-3 is refused", "the same run"),
    "no option of sbatch's": ({"arguments": ["--sbatch", "mem=10"]}, "--sbatch 'mem=10' is refused", "one option"),
    "an option without a name": ({"arguments": ["--sbatch", "--=x"]}, "--sbatch '--=x' is refused", "one option"),
    "an account without a name": ({"arguments": ["--account", ""]}, "--account '' is refused", "is a name"),
    "an image without a name": ({"arguments": ["--container", ""]}, "--container '' is refused", "is a name"),
    "an unknown accelerator": ({"arguments": ["--gpu", "h1000"]}, "no accelerator is known as 'h1000'", "known are"),
    "a corpus that is not there": (
        {"arguments": ["data.sources=[nothing.txt]"]}, "data.sources = 'nothing.txt' is refused", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_fail_is_refused_before_the_queue(name: str, submit: Submit, slurm: Path) -> None:
    call, says, rule = REFUSALS[name]
    answer = submit(*call.get("arguments", []), nodes=call.get("nodes", 2), gpus=call.get("gpus", 4))
    assert answer.code == 2, answer
    assert says in answer.err and rule in answer.err and "cure: " in answer.err
    assert "Traceback" not in answer.err and answer.out == ""
    assert not list(slurm.glob("submitted*")) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("cured", "nodes"),
    [
        (["--time", "2-00:00:00"], 2),
        (["parallel.tensor_model_parallel_size=4", "--gpu", "h100", "checkpoint.interval=100"], 2),
        (["--container", "nvcr.io#nvidia/pytorch:25.03-py3", "--mounts", "/etc:/etc,/var:/var:ro"], 2),
        (["--cpus-per-rank", "4", "--qos", "high", "--account", "us"], 1),
    ],
)
def test_a_right_request_is_submitted(cured: list[str], nodes: int, submit: Submit, slurm: Path) -> None:
    answer = submit(*cured, nodes=nodes)
    assert answer.code == 0, answer
    assert answer.out.startswith("submitted job 41\n")
    assert "squeue --jobs=41" in answer.out and "tail -F" in answer.out and "orthant report runs/test" in answer.out
    (script,) = [line for line in (slurm / "submitted0").read_text().splitlines() if not line.startswith("-")]
    assert Path(script) == Path("runs/test/submit/train.sbatch").absolute()
    assert Path("runs/test/logs").is_dir()  # Slurm makes no folder for its output


def test_measured_steps_are_worth_more_than_predicted_ones(submit: Submit, slurm: Path) -> None:
    folder = Path("runs/test")
    folder.mkdir(parents=True)
    lines = [{"step": step, "tokens": step * 8 * 64, "step_seconds": 9.0} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    answer = submit("--time", "30", "--gpu", "h100", "checkpoint.interval=200", "training.train_steps=400")
    assert answer.code == 2
    assert "200 steps of 9 s (median of 16 earlier steps in runs/test/metrics.jsonl) take 0:30:00" in answer.err
    assert "checkpoint.interval=160" in answer.err and "--time 0:36:00" in answer.err
    again = submit("--time", "36", "--gpu", "h100", "checkpoint.interval=200", "training.train_steps=400")
    assert again.code == 0, again.err


def test_a_name_of_its_partition_tells_the_planner_what_the_gpus_are(submit: Submit, slurm: Path) -> None:
    assert "predicted by the planner for h100" in submit("--dry-run").err
    assert "not checked" in submit("--dry-run", "--partition", "cpu", nodes=2, gpus=0).err


def test_a_vocabulary_that_only_the_tokenizer_knows_is_no_reason_to_refuse(submit: Submit, workplace: Path) -> None:
    (workplace / "tokenizer.json").write_text("{}")
    given = {**BASE, "model": {**BASE["model"], "vocab_size": None}, "data": {"sources": ["corpus.txt"],
             "tokenizer": {"path": "tokenizer.json"}}}  # fmt: skip
    (workplace / "run.yaml").write_text(yaml.safe_dump(given))
    answer = submit("--dry-run", "--gpu", "h100")
    assert answer.code == 0 and "not checked: whether --time holds" in answer.err, answer.err


def test_without_slurm_there_is_a_dry_run_and_nothing_else(submit: Submit) -> None:
    refused = submit()
    assert refused.code == 2 and "there is no Slurm on this machine" in refused.err and "--dry-run" in refused.err
    answer = submit("--dry-run")
    assert answer.code == 0 and answer.out.startswith("#!/usr/bin/env bash\n") and "no Slurm here" in answer.err
    described = json.loads(submit("--dry-run", "--json").out)
    assert described["text"] == answer.out and described["layout"] == "TP1 x PP1 x DP8"
    assert not Path("runs").exists()


HOSTILE = "runs/a b; touch pwned $(touch pwned) `touch pwned` 'q' \"d\"#c %j & x"


def run_words(script: str, workplace: Path) -> list[str]:
    """What the shell hands to `run_ranks`, and ORTHANT_LOGS, one a line."""
    tools = workplace / "checkout" / "slurm"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "lib.sh").write_text('run_ranks() { printf "%s\\n" "$@" "$ORTHANT_LOGS" "$ORTHANT_CONTAINER"; }\n')
    text = re.sub(r"^export ORTHANT_HOME=.*$", f"export ORTHANT_HOME={tools.parent}", script, flags=re.MULTILINE)
    answer = subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=True, timeout=300, env={"SLURM_JOB_ID": "7"}
    )
    return answer.stdout.splitlines()


def test_no_name_injects_shell(submit: Submit, workplace: Path) -> None:
    answer = submit(
        f"run.folder={HOSTILE}", "--partition", "$(touch pwned)", "--container", "a;touch pwned#b",
        "--sbatch", "--comment=x; touch pwned", "--dry-run", "optimizer.lr=0.002",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    words = run_words(answer.out, workplace)
    assert words == [
        "train",
        str(workplace / "run.yaml"),
        f"run.folder={HOSTILE}",
        "optimizer.lr=0.002",
        f"{workplace / HOSTILE}/logs/7",
        "a;touch pwned#b",
    ]
    assert not list(workplace.rglob("pwned"))
    named = next(line for line in answer.out.splitlines() if line.startswith("#SBATCH --job-name="))
    assert re.fullmatch(r"#SBATCH --job-name=[\w.-]+", named)
    escaped = HOSTILE.replace("%", "%%").replace('"', '\\"')
    assert f'#SBATCH --output="{workplace}/{escaped}/logs/%j.out"' in answer.out
    assert '#SBATCH --comment="x; touch pwned"' in answer.out


def test_bash_finds_nothing_in_a_script_and_its_options_are_those_of_the_shipped_ones(submit: Submit) -> None:
    script = submit("--dry-run", "--launcher", "torchrun", "--partition", "gpu").out
    answer = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    shipped = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    option = re.compile(r"^#SBATCH (--[\w-]+)", re.MULTILINE)
    assert set(option.findall(shipped)) <= set(option.findall(script))
    assert "export ORTHANT_LAUNCHER=torchrun\n" in script


def test_what_is_left_over_in_the_shell_does_not_reach_the_job(
    submit: Submit, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHANT_CONTAINER", "left-over")
    assert run_words(submit("--dry-run").out, workplace)[-1] == ""


def test_a_job_that_submits_does_not_hand_on_what_it_was_told_of_itself(
    submit: Submit, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"SLURM_MEM_PER_NODE": "2048", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SBATCH_PARTITION": "old"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "HF_HOME": "/cache"}
    for name, value in (told | kept).items():
        monkeypatch.setenv(name, value)
    assert submit("--partition", "gpu").code == 0
    reached = (slurm / "environment0").read_text().splitlines()
    assert {f"{name}={value}" for name, value in kept.items()} <= set(reached)
    assert not [line for line in reached if line.partition("=")[0] in told]


UNCONFIGURED = "scontrol: error: fetch_config: failed\nscontrol: fatal: Could not establish a configuration source\n"


def test_slurm_that_knows_no_cluster_is_told_in_our_words(submit: Submit, slurm: Path) -> None:
    (slurm / "scontrol").write_text(f"#!/bin/bash\necho -n '{UNCONFIGURED}' >&2; exit 1\n")
    refused = submit()
    assert refused.code == 2 and not list(slurm.glob("submitted*"))
    assert refused.err.splitlines() == [
        "Slurm is installed on this machine, and knows no cluster",
        "  where: scontrol --oneliner show partition",
        "  rule: Slurm's commands find slurm.conf: in /etc/slurm, by SLURM_CONF, or by their network's DNS",
        "  cure: submit on a login node, or export SLURM_CONF=/path/to/slurm.conf",
    ]
    shown = submit("--dry-run")
    assert shown.code == 0 and shown.out.startswith("#!/usr/bin/env bash")
    assert "knows no cluster: neither the partition," in shown.err and "fatal" not in shown.err


def test_a_chain_begins_each_job_where_all_before_it_failed(submit: Submit, slurm: Path) -> None:
    answer = submit("--chain", "3")
    assert answer.code == 0, answer.err
    words = [(slurm / f"submitted{number}").read_text().splitlines() for number in range(3)]
    assert [[word for word in one if "dependency" in word] for one in words] == [
        [],
        ["--dependency=afternotok:41"],
        ["--dependency=afternotok:41:42"],
    ]
    assert all(("--kill-on-invalid-dep=yes" in one) == (number > 0) for number, one in enumerate(words))
    assert "export ORTHANT_REQUEUE=0\n" in Path("runs/test/submit/train.sbatch").read_text()
    assert "scancel 41 42 43" in answer.out


def test_a_chain_that_slurm_refuses_half_way_leaves_nothing(
    submit: Submit, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSES_FROM", "2")
    answer = submit("--chain", "3")
    assert answer.code == 1 and "Job violates accounting policy" in answer.err
    assert (slurm / "cancelled").read_text() == "41 42\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("2-12", 216000), ("1-0:30", 88200),
     ("1-02:03:04", 93784)],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert duration(text) == seconds
    assert duration(shown(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "1:2:3:4", "1-", "1d", "infinite"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--time"):
        duration(text)


@pytest.mark.parametrize(
    ("line", "gpus", "kind", "usable"),
    [
        ("n1|(null)|4|idle", 0, None, True),
        ("n1|gpu:2|4|mixed", 2, None, True),
        ("n1|gpu:(null):2(S:0-1)|4|mixed", 2, None, True),
        ("n1|gpu:a100:8(S:0-1)|128+|allocated", 8, "a100", True),
        ("n1|gpu:a100:4(S:0),gpu:a100:4(S:1),shard:8|64|down*", 8, "a100", False),
        ("n1|gpu:2|4|idle*", 2, None, False),
    ],
)
def test_nodes_are_read_as_sinfo_writes_them(line: str, gpus: int, kind: str | None, usable: bool) -> None:
    node = parse_node(line)
    assert (node.gpus, node.gpu_type, node.usable) == (gpus, kind, usable)


def test_plain_options_stay_as_they_are_and_others_are_quoted() -> None:
    assert slurm_word("--signal=B:USR1@300") == "--signal=B:USR1@300"
    assert slurm_word("--comment=it's #1") == '--comment="it\'s #1"'
    assert slurm_word("a b") == '"a b"'
    assert shlex.split(slurm_word('--comment=a "b" \\c')) == ['--comment=a "b" \\c']


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of ours, the Hugging Face model that it came from, sets to learn from, a reward."""
    from checkpoint_tools.convert import convert
    from checkpoint_tools.planning import Form
    from tests.checkpoint_tools.models import saved_model
    from tests.launch.test_alignment import write_sets, write_tokenizer

    folder = tmp_path_factory.mktemp("beginning")
    saved_model("llama3", folder / "hf")
    write_tokenizer(folder / "hf")
    write_sets(folder)
    convert(folder / "hf", folder / "ours", Form("distributed"))
    return folder


def post_training(task: str, folder: Path, init: str, **sections: Any) -> dict[str, Any]:
    from tests.launch.test_alignment import values
    from tests.launch.test_ppo import values as ppo_values

    own = {"run": {"folder": f"runs/{task}"}, "init": {"checkpoint": str(folder / init)}} | sections
    return ppo_values(folder, task, 4, **own) if task == "ppo" else values(folder, task, init, 4, **own)


@pytest.mark.parametrize("task", ["sft", "reward", "dpo", "ppo"])
def test_post_training_is_checked_from_its_beginning_on(
    task: str, submit: Submit, beginning: Path, workplace: Path
) -> None:
    words = ("--task", task, "--dry-run", "--gpu", "h100")
    (workplace / "run.yaml").write_text(yaml.safe_dump(post_training(task, beginning, "ours")))
    answer = submit(*words, nodes=2, gpus=2)
    assert answer.code == 0, answer.err
    assert run_words(answer.out, workplace)[0] == task
    assert ("actor TP1" if task == "ppo" else "fill TP1 x PP1 x DP4") in answer.err
    assert ("predicted by the planner" in answer.err) == (task != "ppo")
    assert f"{workplace}/runs/{task}/logs" in answer.out
    refused = submit(*words, "parallel.tensor_model_parallel_size=3", nodes=2, gpus=2)
    assert refused.code == 2 and "Traceback" not in refused.err
    (workplace / "run.yaml").write_text(yaml.safe_dump(post_training(task, beginning, "hf")))
    unconverted = submit(*words, nodes=2, gpus=2)
    assert unconverted.code == 2 and "orthant convert" in unconverted.err


@pytest.mark.parametrize(
    ("task", "tokens"), [("sft", 4 * 32), ("reward", 2 * 4 * 32), ("dpo", 2 * 4 * 32), ("ppo", 17)]
)
def test_earlier_steps_of_post_training_count_as_it_counts_them(
    task: str, tokens: int, submit: Submit, beginning: Path, workplace: Path
) -> None:
    """Both answers of a pair, and of PPO what answers came to."""
    (workplace / "run.yaml").write_text(yaml.safe_dump(post_training(task, beginning, "ours")))
    words = ("--task", task, "--dry-run", "--gpu", "h100")
    predicted = submit(*words, nodes=2, gpus=2)
    folder = Path("runs") / task
    folder.mkdir(parents=True)
    lines = [{"step": step, "tokens": step * tokens, "step_seconds": 9.0} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = submit(*words, nodes=2, gpus=2)
    assert "by the planner" in predicted.err or task == "ppo"
    assert "a step takes about 9 s (median of 16 earlier steps" in measured.err, measured.err


def test_stations_have_to_fill_the_nodes(submit: Submit, beginning: Path, workplace: Path) -> None:
    stations = {"stations": [["actor", "generation"], ["critic", "reference", "reward"]], "ranks": [2, 1]}
    given = post_training("ppo", beginning, "ours", placement=stations)
    (workplace / "run.yaml").write_text(yaml.safe_dump(given))
    answer = submit("--task", "ppo", "--dry-run", nodes=2, gpus=2)
    assert answer.code == 2 and "adds up to the world: 3 of 4 ranks" in answer.err
