"""slurm/tokenize.sbatch tokenises over an array as one process does, byte for byte, also after a node failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.tokenizer_training import train_tokenizer
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.jobs import Job
from tests.cluster.waiting import wait_until
from tests.data.conftest import some_texts, write_jsonl

SCRIPT = REPOSITORY / "slurm" / "tokenize.sbatch"
SIZE = ("--array=0-2", "--cpus-per-task=2", "--time=60")


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder whose name has a space, with a corpus of two files, its tokenizer, and its tokens by one process."""
    from data.sources import find_source
    from data.tokenize import Tokenization, tokenize

    folder = tmp_path / "a folder"
    (folder / "src").mkdir(parents=True)
    write_jsonl(folder / "src" / "a.jsonl", some_texts(3000))
    write_jsonl(folder / "src" / "b.jsonl", some_texts(500, seed=1))
    tokenizer = train_tokenizer(some_texts(300), "byte-bpe", 300, folder / "tok", lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        job = Tokenization((find_source("src"),), tokenizer, "text", Path("alone"), shard_bytes=int(0.05 * (1 << 20)))
        tokenize(job, lambda _: None)
    return folder


def submit(cluster: Cluster, workplace: Path, *options: str) -> int:
    words = ("src", "--tokenizer", "tok", "--out", "out/tokens", "--shard-mib", "0.05", *options)
    return cluster.sbatch(*SIZE, SCRIPT, *words, cwd=workplace, environment={"ORTHANT_HOME": str(REPOSITORY)})


def said(workplace: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in sorted(workplace.glob("*.out")))


def wait_for_tokens(cluster: Cluster, workplace: Path) -> None:
    tokens = workplace / "out" / "tokens.idx"
    wait_until("the tokens are there", tokens.is_file, otherwise=lambda: said(workplace))
    cluster.wait_idle()


def written(workplace: Path) -> dict[str, bytes]:
    """What the jobs left, by name."""
    return {path.name: path.read_bytes() for path in (workplace / "out").iterdir()}


def by_one_process(workplace: Path) -> dict[str, bytes]:
    """What they should have left."""
    return {f"tokens{ending}": Path(f"{workplace}/alone{ending}").read_bytes() for ending in (".bin", ".idx", ".json")}


def test_an_array_tokenises_as_one_process_does(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace)
    wait_for_tokens(cluster, workplace)
    assert written(workplace) == by_one_process(workplace)
    assert said(workplace).count("follows as job") == 1


def test_a_failed_node_costs_only_its_share(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace)
    wait_until("a task runs", lambda: ", share 0 of 3" in said(workplace), otherwise=lambda: said(workplace))
    (node,) = {line.rpartition(" ")[2] for line in said(workplace).splitlines() if ", share 0 of 3" in line}
    cluster.crash(node)
    cluster.wait_missed(node)
    cluster.boot(node)
    wait_for_tokens(cluster, workplace)
    # What a process was writing that died with its node stays, under a temporary name.
    whole = {name: data for name, data in written(workplace).items() if not name.endswith(".tmp")}
    assert whole == by_one_process(workplace)
    assert said(workplace).count("follows as job") == 1


def test_a_refused_request_ends_the_chain(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace, "--eod-token", "<|nothing|>")
    wait_until("it is refused", lambda: "no such token" in said(workplace), otherwise=lambda: said(workplace))
    wait_until("no job is left", lambda: not cluster.ask("squeue", "--noheader").strip())
    assert not (workplace / "out").exists()


TAKES_LONG = """#!/bin/bash
touch "begun-$SLURM_ARRAY_TASK_ID-${SLURM_RESTART_COUNT:-0}"
[[ $SLURM_ARRAY_TASK_ID == 0 || ${SLURM_RESTART_COUNT:-0} == 1 ]] && exit 0
exec sleep 300
"""


def test_time_that_ends_requeues_the_one_task_of_the_array(cluster: Cluster, tmp_path: Path) -> None:
    python = tmp_path / "interpreter"
    python.write_text(TAKES_LONG)
    python.chmod(0o755)
    given = {"ORTHANT_HOME": str(REPOSITORY), "ORTHANT_PYTHON": str(python), "ORTHANT_CHAIN": "0"}
    options = ("--array=0-1", "--cpus-per-task=1", "--time=60")
    number = cluster.sbatch(*options, SCRIPT, "src", "--tokenizer", "t", "--out", "o", cwd=tmp_path, environment=given)
    wait_until("both tasks run", lambda: len(list(tmp_path.glob("begun-*"))) == 2)

    def task(index: int) -> Job:
        return Job.parse(cluster.ask("scontrol", "--oneliner", "show", "job", f"{number}_{index}"))

    cluster.controller.run("scancel", "--batch", "--signal=USR1", f"{number}_1")
    for index in range(2):
        done = f"task {index} is done"
        wait_until(done, lambda at=index: task(at).state == "COMPLETED", otherwise=lambda: said(tmp_path))
    assert (task(0).restarts, task(1).restarts) == (0, 1)
    assert (tmp_path / "begun-1-1").exists() and not (tmp_path / "begun-0-1").exists()
