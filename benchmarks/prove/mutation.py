"""`make prove AREA=mutation`: every small mistake in the core pieces, and whether their tests see it; about an hour.

`python -m benchmarks.prove.mutation parallel/layout.py ...` runs some of the modules; the rows of the others stay as
they are in benchmarks/results/mutation.json; `--again` runs what survived, and all of a module that changed since. A
mutant that survives is either listed in benchmarks/mutation/equivalent.json, with the reason why nothing could tell it
from the original, or it is a gap. Exits with 3 where there is a gap.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.mutation.operators import Mutant, mutants
from benchmarks.mutation.runner import outcome, ranks_see, scratch_checkout
from benchmarks.record import RESULTS, ROOT, surroundings, write_result

EQUIVALENT = ROOT / "benchmarks" / "mutation" / "equivalent.json"
PPO = ("tests/alignment/ppo/test_mathematics.py", "tests/alignment/ppo/test_objectives.py")
GRPO = ("tests/alignment/ppo/test_grpo.py",)
ORDER = ("tests/data/test_order.py", "tests/data/test_order_index.py", "tests/data/test_batches.py",
         "tests/data/test_order_properties.py")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A module, and the tests that are to see its mutants.

    Attributes:
        ranks: tests in processes of their own, for what survives the others.
    """

    path: str
    tests: tuple[str, ...]
    ranks: tuple[str, ...] = ()


TARGETS = (
    Target("parallel/layout.py", ("tests/parallel/test_layout.py", "tests/parallel/test_layout_properties.py")),
    Target("parallel/zigzag.py", ("tests/model/test_ring_attention.py",)),
    Target("model/kernels/cross_entropy.py", ("tests/model/test_cross_entropy.py",),
           ("tests/model/test_cross_entropy.py",)),
    Target("training/objective.py", ("tests/training/test_objective.py",)),
    Target("training/schedule.py", ("tests/training/test_schedule.py",)),
    Target("alignment/pairs.py", ("tests/alignment/test_pairs.py",)),
    *(Target(f"alignment/ppo/{name}.py", PPO + GRPO)
      for name in ("advantages", "controller", "entropy", "kl", "losses", "objectives", "rows")),
    Target("alignment/ppo/algorithm.py", GRPO),
    Target("data/shards.py", ("tests/data/test_shards.py",)),
    *(Target(f"data/{name}.py", ORDER) for name in ("batches", "blend", "order", "order_index")),
)  # fmt: skip


def main(paths: Sequence[str]) -> int:
    """Run the targets of `paths`, or all; write benchmarks/results/mutation.json.

    With --again only those mutants that survived the last time, where the module is still the one they were made of.
    """
    _warm_up()
    here = surroundings()  # before a result is written, which makes the tree differ from its commit
    again = "--again" in paths
    wanted = [path for path in paths if path != "--again"]
    chosen = [target for target in TARGETS if not wanted or target.path in wanted]
    written = RESULTS / "mutation.json"
    rows: dict[str, Any] = json.loads(written.read_text())["modules"] if written.is_file() else {}
    for target in chosen:
        before = rows.get(target.path) if again else None
        if before is not None and before["clean"] and _same_source(target.path, before["commit"]):
            rows[target.path] = _again(target, before, here)
        else:
            rows[target.path] = _row(target, here)
        gaps = [one for one in rows[target.path]["survivors"] if one["equivalent"] is None]
        print(f"{target.path}: {rows[target.path]['mutants']} mutants, {len(gaps)} gaps", flush=True)
        write_result("mutation", {"modules": dict(sorted(rows.items()))})
    return 3 if any(one["equivalent"] is None for row in rows.values() for one in row["survivors"]) else 0


def _warm_up() -> None:
    """Import what is slow and not ours, once for all forks."""
    import hypothesis.extra.numpy  # noqa: F401

    from parallel.platform import install

    install()
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel.schedules  # noqa: F401

    gc.collect()
    gc.freeze()  # else every fork's collections walk through all of it


def _row(target: Target, here: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()
    source = (ROOT / target.path).read_text()
    if outcome(target.path, source, target.tests) != "survived":
        raise SystemExit(f"{target.path}: its tests fail without any mutant")
    all_mutants = list(mutants(source))
    said = [(one, outcome(target.path, one.source, target.tests)) for one in all_mutants]
    left = [one for one, what in said if what == "survived"]
    known = _equivalents(target.path)
    lines = source.splitlines()
    if target.ranks:
        left = _without_those_that_ranks_see(target, [one for one in left if _key(one, lines) not in known], left)
    survivors = [
        {"line": one.line, "code": lines[one.line - 1].strip(), "what": one.what,
         "equivalent": known.get(_key(one, lines))}
        for one in left
    ]  # fmt: skip
    for one in survivors:
        if one["equivalent"] is None:
            print(f"  SURVIVES {target.path}:{one['line']}: {one['what']}    in: {one['code']}", flush=True)
    return {
        "commit": here["commit"],
        "clean": here["clean"],
        "mutants": len(said),
        "killed": len(said) - len(left),
        "of_them_hung": sum(what == "hung" for _, what in said),
        "survivors": survivors,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _same_source(path: str, commit: str) -> bool:
    shown = subprocess.run(["git", "show", f"{commit}:{path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    return shown.returncode == 0 and shown.stdout == (ROOT / path).read_text()


def _again(target: Target, row: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """The row with those of its survivors that still survive; a reason alone proves nothing, so all are run."""
    source = (ROOT / target.path).read_text()
    lines, known = source.splitlines(), _equivalents(target.path)
    before = {(one["code"], one["what"]): one for one in row["survivors"]}
    left = []
    for one in mutants(source):
        key = _key(one, lines)
        if key in before and outcome(target.path, one.source, target.tests) == "survived":
            left.append({**before[key], "line": one.line, "equivalent": known.get(key)})
            if key not in known:
                print(f"  SURVIVES {target.path}:{one.line}: {one.what}    in: {key[0]}", flush=True)
    killed = row["mutants"] - len(left)
    return {**row, "survivors": left, "killed": killed, "survivors_run_again_at": here["commit"]}


def _without_those_that_ranks_see(target: Target, asked: list[Mutant], left: list[Mutant]) -> list[Mutant]:
    with scratch_checkout() as folder:
        seen = {id(one) for one in asked if ranks_see(folder, target.path, one, target.ranks) != "survived"}
    return [one for one in left if id(one) not in seen]


def _key(mutant: Mutant, lines: Sequence[str]) -> tuple[str, str]:
    return lines[mutant.line - 1].strip(), mutant.what


def _equivalents(path: str) -> dict[tuple[str, str], str]:
    """Reasons by (code of the line, change)."""
    listed = json.loads(Path(EQUIVALENT).read_text()).get(path, [])
    return {(one["code"], one["what"]): one["reason"] for one in listed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
