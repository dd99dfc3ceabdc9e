"""slurm/tokenize.sbatch tokenises over an array as one process does, byte for byte, also after a node failed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from data.tokenizer_training import train_tokenizer
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import REPOSITORY
from tests.cluster.waiting import wait_until
from tests.data.conftest import some_texts, write_jsonl

SCRIPT = REPOSITORY / "slurm" / "tokenize.sbatch"
SIZE = ("--array=0-2", "--cpus-per-task=2", "--time=60")
SECONDS = 240


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
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(workplace.glob("*.out")))


def wait_for_tokens(cluster: Cluster, workplace: Path) -> None:
    wait_until("the tokens are there", (workplace / "out" / "tokens.idx").is_file, SECONDS, lambda: said(workplace))
    cluster.wait_idle()
    for ending in (".bin", ".idx", ".json"):
        assert Path(f"{workplace}/out/tokens{ending}").read_bytes() == Path(f"{workplace}/alone{ending}").read_bytes()
    assert sorted(path.name for path in (workplace / "out").iterdir()) == ["tokens.bin", "tokens.idx", "tokens.json"]


def test_shellcheck_finds_nothing() -> None:
    answer = subprocess.run(
        ["shellcheck", "--severity=style", str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


@pytest.mark.timeout(2 * SECONDS)
def test_an_array_tokenises_as_one_process_does(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace)
    wait_for_tokens(cluster, workplace)
    assert said(workplace).count("follows as job") == 1


@pytest.mark.timeout(2 * SECONDS)
def test_a_failed_node_costs_only_its_share(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace)
    wait_until("a task runs", lambda: ", share 0 of 3" in said(workplace), SECONDS, lambda: said(workplace))
    (node,) = {line.rpartition(" ")[2] for line in said(workplace).splitlines() if ", share 0 of 3" in line}
    cluster.crash(node)
    cluster.boot(node)
    wait_for_tokens(cluster, workplace)


@pytest.mark.timeout(SECONDS)
def test_a_refused_request_ends_the_chain(cluster: Cluster, workplace: Path) -> None:
    submit(cluster, workplace, "--eod-token", "<|nothing|>")
    wait_until("it is refused", lambda: "no such token" in said(workplace), SECONDS, lambda: said(workplace))
    wait_until("no job is left", lambda: not cluster.controller.run("squeue", "--noheader").stdout.strip(), 60)
    assert not (workplace / "out").exists()
