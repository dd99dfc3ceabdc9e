"""How long planning and rehearsing take: `python -m benchmarks.planner.timing`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_result

PRESETS = ("llama3_8b", "llama3_70b", "llama3_1_405b", "mixtral_8x7b")
SIZES = (8, 64, 512, 4096, 16384)
LIMITS = {"plan": 10.0, "rehearse": 120.0, "rehearse_gib": 8.0}


def main() -> int:
    """Plan every preset at every size, rehearse the largest; 3 where a limit is passed."""
    plans = [_plan(preset, size) for preset in PRESETS for size in SIZES]
    started = time.monotonic()
    rehearsed = _orthant("rehearse", _preset("llama3_1_405b"), "--world-size", "16384", "--json")
    seconds = time.monotonic() - started
    # The two processes run side by side; each child's own peak is the largest that the kernel saw.
    gib = 2 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    stages = json.loads(rehearsed.stdout)["stages"]
    print(f"rehearse 405B at 16,384 ranks: {len(stages)} stages in {seconds:.0f} s, at most {gib:.1f} GiB")
    result = {
        "limits": LIMITS,
        "plan": plans,
        "rehearse": {
            "seconds": round(seconds, 1),
            "most_gib": round(gib, 2),
            "stages": len(stages),
            "worst_error": {
                kind: max(abs(stage["planned"][kind] / stage[kind] - 1) for stage in stages)
                for kind in ("weights", "gradients", "optimizer", "activations")
            },
        },
    }
    write_result("plan_timing", result)
    slow = max(one["seconds"] for one in plans) > LIMITS["plan"]
    return 3 if slow or seconds > LIMITS["rehearse"] or gib > LIMITS["rehearse_gib"] else 0


def _plan(preset: str, gpus: int) -> dict[str, Any]:
    batch = [f"training.global_batch_size={max(1024, gpus)}"]
    started = time.monotonic()
    done = _orthant("plan", _preset(preset), "--gpus", str(gpus), "--gpu", "h100", "--json", *batch)
    found: dict[str, Any] = {"preset": preset, "gpus": gpus, "seconds": round(time.monotonic() - started, 2)}
    if done.returncode == 0:
        first = json.loads(done.stdout)["layouts"][0]
        found |= {"layout": first["layout"], "tokens_per_s_per_gpu": first["tokens_per_s_per_gpu"], "mfu": first["mfu"]}
    else:
        found |= {"refused": done.stderr.splitlines()[0]}
    print(f"{preset:<14} {gpus:>6} {found['seconds']:>6.2f} s  {found.get('layout', found.get('refused'))}", flush=True)
    return found


def _preset(name: str) -> str:
    return str(Path("configs") / "presets" / f"{name}.yaml")


def _orthant(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
