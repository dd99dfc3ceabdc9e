"""`make prove AREA=null_gpu`: real commands and every case of benchmarks.gpu on cards that compute nothing.

Needs an environment of scripts/null_gpu.sh, named by ORTHANT_NULL_GPU. Kernels compute nothing: what is proved is the
host's side alone (docs/gpu.md). Of every command its exit code and what it launched is kept, of every case torch's peak
memory beside the planner's and what one step launches. Exits with 3 where one fails, or launched nothing on a card.

`--part commands` or `--part cases`, `--only TEXT`, `--list`; `--minutes` and `--missing` cut the campaign up. Rows that
are not asked for stay as they are; each names its commit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu import Case, cases
from benchmarks.prove._null_gpu_commands import Command, commands, wanted, write_data
from benchmarks.record import RESULTS, ROOT, surroundings, write_result

ENVIRONMENT = "ORTHANT_NULL_GPU"
LOG = "ORTHANT_NULL_GPU_LOG"
RESULT = RESULTS / "null_gpu.json"
SECONDS = 600
NOTE = "kernels compute nothing: host side only"
COUNTED = {"kernel": "kernels", "product": "products", "cudnn": "cudnn", "graph": "graphs", "collective": "collectives"}
VERSIONS = """import json, torch, triton, transformer_engine, importlib.metadata as m
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
    "transformer_engine": transformer_engine.__version__, "megatron_core": m.version("megatron-core"),
    "transformers": m.version("transformers"), "card": torch.cuda.get_device_name()}))"""

Row = dict[str, Any]


def main() -> int:
    """Run what is asked for and write benchmarks/results/null_gpu.json."""
    options = _options()
    before: Row = json.loads(RESULT.read_text()) if RESULT.exists() and options.missing else {}
    names = _asked("commands", [one.name for one in commands()], options, before)
    chosen = wanted(names, commands())
    names = _asked("cases", [one.name for one in cases()], options, before)
    measured = [one for one in cases() if one.name in names]
    if options.list:
        print("\n".join([*(one.name for one in chosen), *(one.name for one in measured)]))
        return 0
    folder = named_environment()
    if folder is None:
        return 2
    until = time.monotonic() + 60 * options.minutes
    found: dict[str, dict[str, Row]] = {"commands": {}, "cases": {}}
    with tempfile.TemporaryDirectory() as scratch:
        here = Environment(folder, Path(scratch))
        write_data(Path(scratch))
        versions = here.versions()
        for command in chosen:
            if time.monotonic() < until:
                _keep(found, "commands", command.name, run_command(command, here), versions)
        for case in measured:
            if time.monotonic() < until:
                _keep(found, "cases", case.name, run_case(case, here), versions)
    failures = [name for rows in found.values() for name, row in rows.items() if "failure" in row]
    print(f"{len(failures)} of {sum(map(len, found.values()))} failed{': ' if failures else ''}{', '.join(failures)}")
    return 3 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=("commands", "cases"))
    parser.add_argument("--only", default="", metavar="TEXT", help="names that hold it")
    parser.add_argument("--missing", action="store_true", help="what has no row yet, or one that failed")
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing begins after so many")
    parser.add_argument("--list", action="store_true", help="print the names")
    return parser.parse_args()


def _asked(part: str, names: list[str], options: argparse.Namespace, before: Row) -> set[str]:
    done = {name for name, row in before.get(part, {}).items() if "failure" not in row}
    here = options.part in (None, part)
    return {name for name in names if here and options.only in name and name not in done}


class Environment:
    """Where commands run: an environment of scripts/null_gpu.sh, and a folder that is deleted in the end."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self.scratch = folder, scratch

    def run(self, words: list[str], cards: int, more: Mapping[str, str], seconds: float = SECONDS) -> tuple[int, str]:
        """Exit code, and everything said; code 124 where it took longer than `seconds`. Its processes are gone then.

        `more` are environment variables. What `words` write lies in the folder that is deleted.
        """
        told = {"ORTHANT_NULL_GPU_DEVICES": str(cards), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        script = [str(ROOT / "scripts/null_gpu.sh"), "run", str(self.folder), *words]
        with subprocess.Popen(
            script, cwd=self.scratch, env={**os.environ, **told, **more}, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                said, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                said, _ = process.communicate()
                return 124, said
        return process.returncode, said

    def last_lines(self, said: str) -> str:
        """The end of what a command said, without this machine's paths."""
        text = "\n".join([line for line in said.splitlines() if line.strip()][-6:])
        for path, name in {self.scratch: "runs", self.folder: "environment", ROOT: "."}.items():
            text = text.replace(str(path), name)
        return text[-900:]

    def versions(self) -> Row:
        """Of the libraries in it."""
        found: Row = json.loads(self.run(["python", "-c", VERSIONS], 1, {})[1].strip().splitlines()[-1])
        return found


def named_environment() -> Path | None:
    """What ORTHANT_NULL_GPU names; None, and said how one is made, where it names none."""
    folder = os.environ.get(ENVIRONMENT)
    if folder and (Path(folder) / "null_gpu.txt").exists():
        return Path(folder).resolve()
    print(f"{ENVIRONMENT} names no environment of a null GPU; scripts/null_gpu.sh install FOLDER makes one, then\n"
          f"  {ENVIRONMENT}=FOLDER make prove AREA=null_gpu", file=sys.stderr)  # fmt: skip
    return None


def run_command(command: Command, here: Environment) -> Row:
    """A command's row."""
    log = here.scratch / "logs" / command.name.replace(" ", "_")
    log.parent.mkdir(exist_ok=True)
    words = command.text.replace("{runs}", str(here.scratch)).split()
    kept = {"ORTHANT_NULL_GPU_CACHE": "1"} if command.keeps_memory else {}
    code, said = here.run(["python", "-m", "launch", *words], command.cards, {LOG: str(log), **kept})
    shown = command.text.replace(str(ROOT) + "/", "").replace("{runs}", "runs")
    row: Row = {"command": f"orthant {shown}", "cards": command.cards, "exit_code": code, "launched": launches(log)}
    if code:
        row["failure"] = here.last_lines(said)
    elif command.launches and not row["launched"].get("kernels"):
        row["failure"] = "nothing was launched on a card"
    return row


def run_case(case: Case, here: Environment) -> Row:
    """A row of a case of benchmarks.gpu."""
    log = here.scratch / case.name
    words = ["python", "-m", "benchmarks._null_gpu_case", json.dumps(asdict(case)), str(log)]
    code, said = here.run(words, 1, {"ORTHANT_NULL_GPU_CACHE": "1"})
    if code:
        return {"exit_code": code, "failure": here.last_lines(said)}
    found: Row = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{")))
    return {"exit_code": code, **found}


def launches(log: Path) -> dict[str, int]:
    """What a log tells was launched, by kind, over all processes that wrote one beside it."""
    found: Counter[str] = Counter()
    for path in log.parent.glob(f"{log.name}.*"):
        with open(path, errors="replace") as lines:
            found.update(line.split(" ", 1)[0].strip() for line in lines)
    return {name: found[word] for word, name in COUNTED.items() if found[word]}


def _keep(found: dict[str, dict[str, Row]], part: str, name: str, row: Row, versions: Row) -> None:
    """Add a row and write what there is: rows of names that are still asked for anywhere, in their order."""
    where = surroundings()
    found[part][name] = row | {"commit": where["commit"] + ("" if where["clean"] else " with changes")}
    before: Row = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    names = {"commands": [one.name for one in commands()], "cases": [one.name for one in cases()]}
    rows = {part: before.get(part, {}) | found[part] for part in names}
    kept = {part: {one: rows[part][one] for one in names[part] if one in rows[part]} for part in names}
    failures = [one for part in kept.values() for one, row in part.items() if "failure" in row]
    missing = [one for part, every in names.items() for one in every if one not in kept[part]]
    write_result("null_gpu", {"note": NOTE, "environment": versions, "failures": failures, "missing": missing, **kept})
    print(_line(name, row), flush=True)


def _line(name: str, row: Row) -> str:
    if "failure" in row:
        return f"FAILED  {name}: exit code {row['exit_code']}: {row['failure'].splitlines()[-1]}"
    counts: dict[str, int] = row.get("launched") or row.get("launched_in_a_step") or {}
    parts = [f"{count} {what}" for what, count in counts.items()]
    for what, gib in row.get("memory", {}).items():
        parts.append(f"{what} {gib:.1f}")
    return f"ran  {name}: {', '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
