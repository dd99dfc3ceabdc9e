"""Predicted bytes beside those of real CPU ranks: `python -m benchmarks.planner.reality`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from parallel.platform import install

install()

from benchmarks.record import write_result  # noqa: E402  (core comes after the platform)
from tests.launch.planner.memory_cases import of_this_rank, settings  # noqa: E402
from tests.ranks import RankPool  # noqa: E402

BF16, FULL, SELECTIVE = (
    "training.precision=bf16",
    "training.recompute_granularity=full",
    "training.recompute_granularity=selective",
)
MIXTURE = ("model.num_experts=4", "training.micro_batch_size=4")
LAYOUTS = {
    "TP1, fp32": (1, "tp=1", ()),
    "TP1, bf16": (1, "tp=1", (BF16,)),
    "TP1, recomputed": (1, "tp=1", (FULL,)),
    "DP2, ZeRO-0, bf16": (2, "dp=2 zero=0", (BF16,)),
    "DP2, ZeRO-1, bf16": (2, "dp=2", (BF16,)),
    "DP4, ZeRO-2": (4, "dp=4 zero=2", ()),
    "DP4, ZeRO-3": (4, "dp=4 zero=3", ()),
    "DP2, ZeRO-3, bf16": (2, "dp=2 zero=3", (BF16,)),
    "TP2, bf16": (2, "tp=2", (BF16,)),
    "TP4": (4, "tp=4", ()),
    "PP2": (2, "pp=2", ()),
    "PP4": (4, "pp=4", ()),
    "PP2 VPP2, recomputed": (2, "pp=2 vpp=2", (FULL,)),
    "TP2 PP2, selective": (4, "tp=2 pp=2", (SELECTIVE,)),
    "TP2 PP2 DP2, bf16": (8, "tp=2 pp=2 dp=2", (BF16,)),
    "CP2": (2, "cp=2", ()),
    "EP2 DP2, mixture": (2, "ep=2 dp=2", MIXTURE),
    "TP2 EP2 DP2, mixture": (4, "tp=2 ep=2 dp=2", MIXTURE),
    "TP2 PP2 EP2 DP2, mixture": (8, "tp=2 pp=2 ep=2 dp=2", MIXTURE),
}
BOUNDS = {"parameters": 0.03, "weights": 0.03, "gradients": 0.03, "optimizer": 0.03, "activations": 0.15}


def main() -> int:
    """Run every layout, print and write the largest error of any rank; 3 where one is over its bound."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="orthant-reality-") as folder:
        pool = RankPool(Path(folder))
        try:
            for name, (ranks, parallel, more) in LAYOUTS.items():
                compared = pool.run(ranks, of_this_rank, settings(parallel, *more), timeout=120)
                found[name] = {
                    kind: max((rank[kind] for rank in compared), key=lambda pair: abs(pair[0] / pair[1] - 1))
                    for kind in BOUNDS
                }
                shown = "  ".join(f"{kind} {pair[0] / pair[1] - 1:+.1%}" for kind, pair in found[name].items())
                print(f"{name:<28} {shown}", flush=True)
        finally:
            pool.close()
    worst = {kind: max(abs(pairs[kind][0] / pairs[kind][1] - 1) for pairs in found.values()) for kind in BOUNDS}
    write_result(
        "plan_memory",
        {
            "bounds": BOUNDS,
            "worst": worst,
            "layouts": {
                name: {kind: {"planned": pair[0], "held": pair[1]} for kind, pair in pairs.items()}
                for name, pairs in found.items()
            },
        },
    )
    return 0 if all(worst[kind] <= bound for kind, bound in BOUNDS.items()) else 3


if __name__ == "__main__":
    sys.exit(main())
