"""Cleaning killed at random moments and on a full disk: `python -m benchmarks.prove.data_clean`, or AREA=data.

- kill -9 of all of a cleaning's processes, workers included, at 20 random moments; the rerun's files equal, byte for
  byte, those of a cleaning that nobody disturbed.
- the same 10 times at a random moment after the rules are through, where duplicates are found and results written.
- kill -9 of the first process only: its workers end by themselves, and a rerun that begins at once gives the same
  bytes.
- a disk that is full at every of several sizes: one message, exit code 1, nothing under a final name that is not whole,
  and a rerun on a larger disk that goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.near_duplicates import write_corpus
from benchmarks.record import ROOT, write_result

KILLS = 20
LATE_KILLS = 10
DOCUMENTS = 5000
OPTIONS = ("--dedup", "--rules", "gopher", "--shard-mib", "0.5", "--workers", "2")
DISKS_MIB = (1, 4, 8, 9, 10, 12, 14, 16, 24)


def prove() -> dict[str, Any]:
    """All of it; `failures` says what did not hold."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus", DOCUMENTS, 200)
        source = folder / "corpus" / "corpus.jsonl"
        with open(source, "a", encoding="utf-8") as handle:
            handle.write("{a bad line\n")
        reference, seconds, late_seconds = undisturbed(source, folder / "reference")
        killed = folder / "killed"
        kills = kill_often(KILLS, source, killed, "plan.json", seconds, reference, failures)
        late_kills = kill_often(LATE_KILLS, source, killed, "buckets", late_seconds, reference, failures)
        orphans = leave_workers(source, folder / "killed", seconds, reference, failures)
        disks = full_disks(source, folder, reference, failures)
    return {
        "documents": DOCUMENTS,
        "files": len(reference),
        "undisturbed_seconds": round(seconds, 2),
        "kills": kills,
        "late_kills": late_kills,
        "orphans": orphans,
        "full_disks": disks,
        "failures": failures,
    }


def command(source: Path, out: Path) -> list[str]:
    """As a person types it."""
    return [sys.executable, "-m", "launch", "data", "clean", str(source), "--out", str(out), *OPTIONS]


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    """Begin a cleaning, in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(source, out),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(source: Path, out: Path) -> tuple[int, str]:
    """A cleaning to its end: exit code and messages."""
    process = start(source, out)
    said = process.communicate()[1]
    return process.returncode, said


def hashes(out: Path) -> dict[str, str]:
    """sha256 of every file of a result."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def undisturbed(source: Path, out: Path) -> tuple[dict[str, str], float, float]:
    """The hashes of a cleaning that nobody disturbs; its seconds from the plan on, and from stage buckets on."""
    process = start(source, out)
    wait_for(process, out, "plan.json")
    begun = time.perf_counter()
    wait_for(process, out, "buckets")
    late = time.perf_counter()
    said = process.communicate()[1]
    ended = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"the undisturbed cleaning ended with {process.returncode}:\n{said}")
    return hashes(out), ended - begun, ended - late


def wait_for(process: subprocess.Popen[str], out: Path, name: str) -> None:
    """Until something is there in a cleaning's work folder."""
    while process.poll() is None and not (out / ".work" / name).exists():
        time.sleep(0.005)


def kill_often(
    times: int,
    source: Path,
    out: Path,
    begin: str,
    seconds: float,
    reference: dict[str, str],
    failures: list[str],
) -> list[dict[str, Any]]:
    """Kill so many cleanings within `seconds` after `begin` is there; those that had finished come on top."""
    kills: list[dict[str, Any]] = []
    chance = random.Random(1)
    while sum(not kill["had_finished"] for kill in kills) < times and len(kills) < 2 * times:
        kills.append(kill_once(source, out, begin, chance.uniform(0, seconds), reference, failures))
    killed = sum(not kill["had_finished"] for kill in kills)
    if killed < times:
        failures.append(f"{killed} of {times} cleanings were killed after {begin}: the others had finished")
    return kills


def kill_once(
    source: Path, out: Path, begin: str, after: float, reference: dict[str, str], failures: list[str]
) -> dict[str, Any]:
    """Kill everything so many seconds after `begin` is there; look at what lies there; run again."""
    process = start(source, out)
    wait_for(process, out, begin)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after)
    finished = process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = stages_done(out)
    wrong = not_whole(out, reference)
    code, said = run(source, out)
    if wrong:
        failures.append(f"kill after {after:.2f} s left under a final name, not whole: {wrong}")
    if code or hashes(out) != reference:
        failures.append(f"kill after {after:.2f} s: the rerun ended with {code} or other bytes: {said[-300:]}")
    shutil.rmtree(out)
    print(f"kill after {after:.2f} s, units done {done}: {'had finished' if finished else 'killed'}", flush=True)
    return {"after_seconds": round(after, 2), "had_finished": finished, "units_done": done}


def stages_done(out: Path) -> dict[str, int]:
    """Markers of each stage."""
    found: dict[str, int] = {}
    for path in (out / ".work").glob("*/*.done.json"):
        found[path.parent.name] = found.get(path.parent.name, 0) + 1
    return dict(sorted(found.items()))


def not_whole(out: Path, reference: dict[str, str]) -> list[str]:
    """Files under a final name with other bytes than in the reference."""
    found = {name: value for name, value in hashes(out).items() if not name.startswith(".work") and ".tmp" not in name}
    return [name for name, value in found.items() if reference.get(name) != value]


def leave_workers(
    source: Path, out: Path, seconds: float, reference: dict[str, str], failures: list[str]
) -> dict[str, Any]:
    """Kill the first process only and begin again at once, while its workers may still write."""
    rounds, left = 5, 0
    for number in range(rounds):
        process = start(source, out)
        wait_for(process, out, "plan.json")
        time.sleep(random.Random(100 + number).uniform(0.1, 0.9) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        code, said = run(source, out)
        deadline = time.monotonic() + 10
        while group_lives(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        left += group_lives(process.pid)
        if code or hashes(out) != reference:
            failures.append(f"orphans {number}: the rerun ended with {code} or other bytes: {said[-300:]}")
        shutil.rmtree(out)
    if left:
        failures.append(f"workers of {left} killed cleanings lived on for 10 s")
    return {"rounds": rounds, "workers_that_lived_on": left}


def group_lives(group: int) -> bool:
    """Whether a process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def full_disks(source: Path, folder: Path, reference: dict[str, str], failures: list[str]) -> list[dict[str, Any]]:
    """Clean onto small disks; then make the disk larger and go on."""
    if os.geteuid() != 0:
        print("full disks: left out, mounting a tmpfs needs root")
        return []
    rows = []
    for size in DISKS_MIB:
        with small_disk(folder / "disk", size) as disk:
            code, said = run(source, disk / "out")
            wrong = not_whole(disk / "out", reference)
            row = {
                "mib": size,
                "exit_code": code,
                "units_done": stages_done(disk / "out"),
                "said": said.replace(str(disk), "DISK")[-160:],
            }
            if code == 0:
                if hashes(disk / "out") != reference:
                    failures.append(f"{size} MiB: done, with other bytes")
            elif code != 1 or "No space left on device" not in said or "Traceback" in said:
                failures.append(f"{size} MiB: exit code {code}, not one clear message: {said[-400:]}")
            if wrong:
                failures.append(f"{size} MiB: under a final name, not whole: {wrong}")
            subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
            code, said = run(source, disk / "out")
            if code or hashes(disk / "out") != reference:
                failures.append(f"{size} MiB: on a larger disk it ended with {code} or other bytes: {said[-300:]}")
            rows.append(row)
            print(f"disk of {size} MiB: exit code {row['exit_code']}, units done {row['units_done']}")
    if all(row["exit_code"] == 0 for row in rows):
        failures.append("no disk was small enough to be full")
    return rows


@contextlib.contextmanager
def small_disk(at: Path, mib: int) -> Iterator[Path]:
    """A tmpfs."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def main(_: Sequence[str] = ()) -> int:
    """This half alone."""
    result = prove()
    print(json.dumps(result["failures"], indent=1))
    print(write_result("data_clean", result))
    return 3 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
