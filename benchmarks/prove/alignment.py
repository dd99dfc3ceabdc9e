"""`make prove AREA=alignment`: reward models and DPO on a task whose optimum is enumerated; minutes.
Exits with 3 where a bound is missed.

Preferences are drawn by a known reward (Bradley-Terry), so both the best accuracy that a judge can have and the policy
that DPO should end at, reference x exp(reward / beta), are known without error.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from parallel.platform import install

install()

import numpy as np  # noqa: E402  (core comes after the platform)

from benchmarks.record import write_result  # noqa: E402
from parallel.layout import ParallelLayout  # noqa: E402
from tests.alignment import task  # noqa: E402
from tests.alignment.cases import learn_preferences, learn_reference, learn_reward  # noqa: E402
from tests.alignment.test_pairs import bayes  # noqa: E402
from tests.ranks import RankPool  # noqa: E402

BETA, PROMPTS, PAIRS, BATCH = 0.3, 4, 131072, 256
REFERENCE_STEPS, REWARD_STEPS, DPO_STEPS, SHORT_STEPS = 150, 600, 500, 20
BOUNDS = {"bayes_accuracy_lost": 0.01, "dpo_gap_share": 0.05, "layouts_apart": 1e-3, "identity": 1e-3, "mass": 1e-6}
"""dpo_gap_share: of the gap J* - J that the reference has. identity: |beta KL(policy || best) - (J* - J)|."""
LAYOUTS = {
    "TP2": ParallelLayout(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelLayout(pipeline_model_parallel_size=2),
}


def main() -> int:
    """Run, print, write the result."""
    pool = RankPool(Path(tempfile.mkdtemp()))
    started = time.perf_counter()
    try:
        figures = measured(pool)
    finally:
        pool.close()
    missed = {name: figures[name] for name, bound in BOUNDS.items() if not figures[name] <= bound}
    figures |= {"bounds": BOUNDS, "missed": sorted(missed), "seconds": round(time.perf_counter() - started, 1)}
    path = write_result("alignment", figures)
    for name, bound in BOUNDS.items():
        print(f"{'MISSED' if name in missed else 'ok':8}{name:24} {figures[name]:.3g}  bound {bound:g}")
    print(path)
    return 3 if missed else 0


def measured(pool: RankPool) -> dict[str, Any]:
    """Every figure, each on one rank unless a layout is named."""
    asked, one = task.prompts(PROMPTS), ParallelLayout()
    weights, log_reference = pool.run(1, learn_reference, one, asked, REFERENCE_STEPS, timeout=600)[0]
    gold = task.rewards(asked)
    pairs = task.preferences(asked, log_reference, PAIRS, seed=3)
    begun = task.standing(log_reference, log_reference, gold, BETA)
    print(f"reference: gap {begun.gap:.4f}", flush=True)

    _, scores = pool.run(1, learn_reward, one, weights, pairs, asked, REWARD_STEPS, BATCH, timeout=900)[0]
    best, reached = bayes(log_reference, gold, gold), bayes(log_reference, gold, scores)
    correlation = float(np.mean([np.corrcoef(row, known)[0, 1] for row, known in zip(scores, gold, strict=True)]))
    print(f"reward model: accuracy {reached:.4f}, Bayes {best:.4f}, correlation {correlation:.3f}", flush=True)

    _, policy = pool.run(1, learn_preferences, one, weights, pairs, asked, BETA, DPO_STEPS, BATCH, timeout=1200)[0]
    ended = task.standing(policy, log_reference, gold, BETA)
    print(f"DPO: {ended}", flush=True)

    apart = 0.0
    short = pairs[:2048]
    learned: tuple[tuple[Callable[..., Any], tuple[float, ...]], ...]
    learned = ((learn_reward, ()), (learn_preferences, (BETA,)))
    of_one = [
        pool.run(1, learn, one, weights, short, asked, *extra, SHORT_STEPS, timeout=600)[0][1]
        for learn, extra in learned
    ]
    for name, grid in LAYOUTS.items():
        for number, lesson in enumerate(learned):
            learn: Callable[..., Any] = lesson[0]
            extra = lesson[1]
            found = pool.run(2, learn, grid, weights, short, asked, *extra, SHORT_STEPS, timeout=600)[0][1]
            apart = max(apart, float(np.abs(found - of_one[number]).max()))
            print(f"{name}: {learn.__name__} apart by {apart:.2e}", flush=True)
    return {
        "prompts": PROMPTS,
        "pairs": PAIRS,
        "batch": BATCH,
        "steps": {"reward": REWARD_STEPS, "dpo": DPO_STEPS, "layouts": SHORT_STEPS},
        "bayes_accuracy": best,
        "reward_accuracy": reached,
        "reward_correlation": correlation,
        "bayes_accuracy_lost": best - reached,
        "reference": asdict(begun),
        "dpo": asdict(ended),
        "dpo_gap_share": ended.gap / begun.gap,
        "layouts_apart": apart,
        "identity": abs(ended.gap - ended.to_best),
        "mass": abs(ended.mass - 1),
    }


if __name__ == "__main__":
    sys.exit(main())
