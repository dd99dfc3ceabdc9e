"""Ranks of nodes that do not know of each other hear of the one that ends before all have joined."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foundation.errors import ConfigError, FaultError, LostRankError, OrthantError, RequestError, WorkError
from launch.config import as_values, load_config
from launch.roll_call import RollCall
from launch.world import World
from tests.ranks.processes import REPOSITORY, free_port
from tests.training.test_killed_rank import CONFIG, write_corpus

PATIENT_SECONDS = 300.0
"""Far more than anything here takes: what waits for the join's timeout is the fault that these tests are about."""


def start(rank: int, port: int, folder: Path, *overrides: str, ranks_of_a_node: int) -> subprocess.Popen[str]:
    """One of two ranks, as the torchrun of a node of its own starts it: sources are looked for in `folder`."""
    announced = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": ranks_of_a_node}
    environment = os.environ | {name: str(value) for name, value in announced.items()}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", str(folder.parent / "config.yaml"), *overrides],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_config(folder: Path) -> Path:
    (folder / "config.yaml").write_text(CONFIG.replace("SOURCE", "corpus.jsonl"))
    return folder / "config.yaml"


def two_nodes(
    folder: Path, has_corpus: tuple[bool, bool], *overrides: str, ranks_of_a_node: int = 1, code: int = 2
) -> list[str]:
    """What two ranks say; both have to end with that exit code, long before the join's timeout."""
    write_config(folder)
    port, ranks = free_port(), []
    for rank, has in enumerate(has_corpus):
        (node := folder / f"node_{rank}").mkdir()
        if has:
            write_corpus(node)
        ranks.append(start(rank, port, node, f"run.folder={folder}/run", *overrides, ranks_of_a_node=ranks_of_a_node))
    try:
        said = [rank.communicate(timeout=PATIENT_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [code, code], said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("without", [0, 1])
@pytest.mark.parametrize("ranks_of_a_node", [1, 2], ids=["the nodes are looked at", "they are not"])
def test_a_file_that_one_node_lacks_is_refused_on_all(tmp_path: Path, without: int, ranks_of_a_node: int) -> None:
    said = two_nodes(tmp_path, (without != 0, without != 1), ranks_of_a_node=ranks_of_a_node)
    assert "\ndata.sources = 'corpus.jsonl' is refused" in f"\n{said[without]}", said
    assert f"rank {without} on {socket.gethostname()}: data.sources = 'corpus.jsonl' is refused" in said[1 - without]
    assert "cure: " in said[1 - without] and "TCPStore" not in "".join(said)  # torch's own words are no help


@pytest.mark.slow
def test_what_rank_0_refuses_as_it_prepares_is_refused_on_all(tmp_path: Path) -> None:
    said = two_nodes(tmp_path, (True, True), "evaluation.batches=100000", "data.validation_fraction=0.000001")
    assert "is refused" in said[0] and "rank 0 on " not in said[0]
    assert f"rank 0 on {socket.gethostname()}: {said[0].splitlines()[-4]}" in said[1]


@pytest.mark.slow
def test_a_job_that_an_earlier_version_left_is_not_read(tmp_path: Path) -> None:
    """A start by hand looks like the one before it; the job of that version has no `beginning`."""
    (tmp_path / "run").mkdir()
    config = load_config(write_config(tmp_path), [f"run.folder={tmp_path}/run", "training.train_steps=4"])
    (tmp_path / "run/job.json").write_text(json.dumps({"start": "", "config": as_values(config), "prepared": {}}))
    two_nodes(tmp_path, (True, True), "training.train_steps=4", code=0)
    assert "beginning" in json.loads((tmp_path / "run/job.json").read_text())


def in_turn(calls: list[RollCall], acts: list[object]) -> list[OrthantError | None]:
    """What leaves the block of each rank, all at once."""
    found: list[OrthantError | None] = [None] * len(calls)

    def one(place: int) -> None:
        act = acts[place]
        try:
            with calls[place] as call:
                if isinstance(act, Exception):
                    raise act
                call.ready(PATIENT_SECONDS)
        except OrthantError as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENT_SECONDS)
    return found


@pytest.mark.usefixtures("meeting_point")
def test_all_that_are_ready_go_on() -> None:
    assert in_turn([RollCall(World(rank, 3, rank)) for rank in range(3)], [None] * 3) == [None] * 3


@pytest.mark.usefixtures("meeting_point")
@pytest.mark.parametrize(
    "error", [ConfigError("a.b", 1, "is 2", "a.b=2"), WorkError("the disk is full"), FaultError("?")]
)
def test_the_others_end_as_the_first_did(error: OrthantError) -> None:
    calls = [RollCall(World(rank, 3, rank), PATIENT_SECONDS) for rank in range(3)]
    found = in_turn(calls, [None, error, None])
    assert found[1] is error
    for other in (found[0], found[2]):
        assert other is not None and other.exit_code == error.exit_code
        assert str(other).startswith(f"rank 1 on {socket.gethostname()}: {error}")


@pytest.mark.usefixtures("meeting_point")
def test_each_rank_that_refuses_says_its_own_words() -> None:
    errors = [RequestError(f"of {rank}") for rank in range(2)]
    assert in_turn([RollCall(World(rank, 2, rank)) for rank in range(2)], list(errors)) == errors


@pytest.mark.usefixtures("meeting_point")
def test_a_rank_that_never_comes_is_waited_for_no_longer_than_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LostRankError, match="1 of 2 ranks came within 0.5 s"), RollCall(World(0, 2, 0), 0.0) as call:
        call.ready(timeout_seconds=0.5)
    with pytest.raises(RequestError, match="no"), RollCall(World(0, 2, 0), patience_seconds=2.5):
        raise RequestError("no")
    assert "rank 0 ends, and says why once all ranks know, or in 2.5 s" in capsys.readouterr().err


@pytest.mark.usefixtures("meeting_point")
def test_an_error_after_all_have_met_is_of_this_rank_alone() -> None:
    with pytest.raises(WorkError, match="later"), RollCall(World(0, 1, 0)) as call:
        call.ready()
        raise WorkError("later")
    call.listen()  # nothing was said of it
