"""Tokenising killed at random moments and on a full disk: `python -m benchmarks.prove.data_tokenize`, or AREA=data.

- kill -9 of all processes of a tokenisation at 20 random moments of its work (after imports and the choice of an
  encoder), with one process and with two workers in turn; the rerun's .bin, .idx and .json equal, byte for byte, those
  of one that nobody disturbed.
- kill -9 of the first process only; a rerun that begins at once gives the same bytes.
- a disk that is full at every of several sizes: one message, exit code 1, nothing under a final name that is not whole,
  and the same command on a larger disk goes on with the shards that were finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.prove.data_clean import small_disk
from benchmarks.record import ROOT, write_result
from data.sources import DEMO

KILLS = 20
COPIES = 6
"""Of the demo corpus, 3 MB each, with a number in front of every document."""
DISKS_MIB = (1, 3, 6, 9, 12, 16)


def prove() -> dict[str, Any]:
    """All of it; `failures` says what did not hold."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder / "corpus.jsonl")
        train = ("tokenizer", DEMO, "--out", str(folder / "tokenizer"), "--vocab-size", "4096")
        subprocess.run(orthant(*train), cwd=ROOT, env=environment(), check=True, capture_output=True)
        seconds = {}
        for workers in (1, 2):
            process = start(source, folder / f"reference{workers}", workers)
            begun = wait_for_work(process, folder / f"reference{workers}")
            said = process.communicate()[1]
            seconds[workers] = time.perf_counter() - begun
            if process.returncode:
                raise SystemExit(f"the undisturbed tokenisation ended with {process.returncode}:\n{said}")
        reference = hashes(folder / "reference1")
        if hashes(folder / "reference2") != reference:
            failures.append("two workers wrote other bytes than one process")
        kills = kill_often(source, folder / "killed", seconds, reference, failures)
        orphans = leave_workers(source, folder / "killed", seconds[2], reference, failures)
        disks = full_disks(source, folder, reference, failures)
        size = source.stat().st_size
    return {
        "source_bytes": size,
        "undisturbed_seconds_of_work": {str(workers): round(value, 2) for workers, value in seconds.items()},
        "kills": kills,
        "reruns_after_the_first_process_alone_was_killed": orphans,
        "full_disks": disks,
        "failures": failures,
    }


def write_source(path: Path) -> Path:
    """Real prose, and a bad line."""
    from data.documents import Reading, read_documents
    from data.sources import find_source

    texts = [document.text for document in read_documents(Reading(find_source(DEMO)), "text")]
    with open(path, "w", encoding="utf-8") as handle:
        for copy in range(COPIES):
            for number, text in enumerate(texts):
                handle.write(json.dumps({"text": f"{copy} {number} {text}"}) + "\n")
        handle.write("{a bad line\n")
    return path


def orthant(*words: str) -> list[str]:
    """As a person types it."""
    return [sys.executable, "-m", "launch", "data", *words]


def environment() -> dict[str, str]:
    """Of a command: this checkout, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    """Begin a tokenisation, in a process group of its own."""
    words = ["tokenize", str(source), "--tokenizer", str(source.parent / "tokenizer"), "--out", str(out / "tokens")]
    return subprocess.Popen(
        orthant(*words, "--workers", str(workers), "--shard-mib", "1"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(source: Path, out: Path, workers: int) -> tuple[int, str]:
    """A tokenisation to its end: exit code and messages."""
    process = start(source, out, workers)
    said = process.communicate()[1]
    return process.returncode, said


def wait_for_work(process: subprocess.Popen[str], out: Path) -> float:
    """Until the first shard is begun. Returns the time."""
    while not list(out.glob(".tokens.parts/*/*.lock")) and process.poll() is None:
        time.sleep(0.005)
    return time.perf_counter()


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file under a final name."""
    files = sorted(path for path in out.glob("*") if path.is_file() and not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards_done(out: Path) -> int:
    """Shards that a rerun finds finished."""
    return len(list(out.glob(".tokens.parts/*/*.train.idx")))


def not_whole(out: Path, reference: dict[str, str]) -> list[str]:
    """Files under a final name with other bytes than in the reference."""
    return [name for name, value in hashes(out).items() if reference.get(name) != value]


def kill_often(
    source: Path, out: Path, seconds: dict[int, float], reference: dict[str, str], failures: list[str]
) -> list[dict[str, Any]]:
    """Kill KILLS tokenisations; those that had finished come on top."""
    kills: list[dict[str, Any]] = []
    while sum(not kill["had_finished"] for kill in kills) < KILLS and len(kills) < 2 * KILLS:
        kills.append(kill_once(source, out, seconds, len(kills), reference, failures))
    killed = sum(not kill["had_finished"] for kill in kills)
    if killed < KILLS:
        failures.append(f"{killed} of {KILLS} tokenisations were killed: the others had finished")
    return kills


def kill_once(
    source: Path,
    out: Path,
    seconds: dict[int, float],
    number: int,
    reference: dict[str, str],
    failures: list[str],
) -> dict[str, Any]:
    """Kill everything at a random moment; look at what lies there; run again."""
    workers = 1 + number % 2
    after = random.Random(number).uniform(0.0, 1.0) * seconds[workers]
    process = start(source, out, workers)
    wait_for_work(process, out)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
    finished = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done, wrong = shards_done(out), not_whole(out, reference)
    code, said = run(source, out, workers)
    if wrong:
        failures.append(f"kill {number} after {after:.2f} s left under a final name, not whole: {wrong}")
    if code or hashes(out) != reference or left_over(out):
        failures.append(f"kill {number} after {after:.2f} s: the rerun ended with {code} or other files: {said[-300:]}")
    shutil.rmtree(out)
    print(f"kill {number + 1} after {after:.2f} s, {done} shards done: {'finished before' if finished else 'killed'}")
    return {"after_seconds": round(after, 2), "workers": workers, "had_finished": finished, "shards_done": done}


def left_over(out: Path) -> list[str]:
    """What is there beside the final files."""
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


def leave_workers(source: Path, out: Path, seconds: float, reference: dict[str, str], failures: list[str]) -> int:
    """Kill the first process only and begin again at once, while its workers may still write. Returns the rounds."""
    rounds = 3
    for number in range(rounds):
        process = start(source, out, 2)
        wait_for_work(process, out)
        time.sleep(random.Random(100 + number).uniform(0.3, 0.9) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        code, said = run(source, out, 2)
        if code or hashes(out) != reference:
            failures.append(f"orphans {number}: the rerun ended with {code} or other bytes: {said[-300:]}")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(out)
    return rounds


def full_disks(source: Path, folder: Path, reference: dict[str, str], failures: list[str]) -> list[dict[str, Any]]:
    """Tokenise onto small disks; then make the disk larger and go on."""
    if os.geteuid() != 0:
        print("full disks: left out, mounting a tmpfs needs root")
        return []
    rows = []
    for size in DISKS_MIB:
        with small_disk(folder / "disk", size) as disk:
            code, said = run(source, disk / "out", 1)
            done, wrong = shards_done(disk / "out"), not_whole(disk / "out", reference)
            if code == 0 and hashes(disk / "out") != reference:
                failures.append(f"{size} MiB: done, with other bytes")
            if code and (code != 1 or "No space left on device" not in said or "Traceback" in said):
                failures.append(f"{size} MiB: exit code {code}, not one clear message: {said[-400:]}")
            if wrong:
                failures.append(f"{size} MiB: under a final name, not whole: {wrong}")
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            again, told = run(source, disk / "out", 1)
            if again or hashes(disk / "out") != reference or left_over(disk / "out"):
                failures.append(f"{size} MiB: on a larger disk it ended with {again} or other files: {told[-300:]}")
            found = re.search(r"(\d+) of \d+ shards are there already", told)
            if code and done and (found is None or int(found.group(1)) != done):
                failures.append(f"{size} MiB: of {done} finished shards the rerun used {found and found.group(1)}")
            rows.append({"mib": size, "exit_code": code, "shards_done": done, "said": said.splitlines()[-3:]})
            print(f"disk of {size} MiB: exit code {code}, {done} shards done")
    if all(row["exit_code"] == 0 for row in rows):
        failures.append("no disk was small enough to be full")
    return rows


def main() -> int:
    """This half alone. Exits with 3 where something did not hold."""
    result = prove()
    for failure in result["failures"]:
        print(f"FAILED  {failure}")
    print(f"{len(result['failures'])} failures: {write_result('data_tokenize', result)}")
    return 3 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
