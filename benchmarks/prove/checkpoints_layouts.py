"""Training state written at TP2 x PP2 x DP2 with ZeRO-1, read at other layouts and at others again.

Weights, master weights and both moments have to be the same bits after each change, and the losses that follow those of
the run that never changed within 1e-6. Part of `make prove AREA=checkpoints`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write_result
from parallel.layout import ParallelLayout
from parallel.platform import install

install()

from tests.ranks import RankPool  # noqa: E402  (core comes after the platform)
from tests.training.test_checkpoint import begin_from, compare_tensors, load_and_save, run_at  # noqa: E402
from tests.training.trainer_cases import Run, Seen, write_corpus  # noqa: E402

SAVED_AT = ParallelLayout(
    tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=2, sequence_parallel=True
)
READ_AT = {
    "one rank": ParallelLayout(),
    "TP4": ParallelLayout(tensor_model_parallel_size=4),
    "PP4": ParallelLayout(pipeline_model_parallel_size=4),
    "CP2": ParallelLayout(context_parallel_size=2),
    "DP4": ParallelLayout(data_parallel_size=4, overlap_grad_reduce=True, bucket_size=3000),
    "DP2 ZeRO-3": ParallelLayout(data_parallel_size=2, zero_stage=3),
    "DP2 FSDP2": ParallelLayout(data_parallel_size=2, zero_stage=3, zero_implementation="fsdp2"),
    "PP2 interleaved": ParallelLayout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied and biased": {"share_embeddings_and_output_weights": True, "add_qkv_bias": True},
    "QK-norm": {"qk_layernorm": True},
}
STEPS = 8
BOUND = 1e-6


def main() -> int:
    """Every model through every pair of successive layouts; 3 where something differs."""
    folder = Path(tempfile.mkdtemp(prefix="layouts-"))
    (folder / "corpus").mkdir()
    corpus = write_corpus(folder / "corpus")
    pool = RankPool(Path(tempfile.mkdtemp()))
    rows = []
    try:
        for model, changes in MODELS.items():
            source = Run(folder / model, corpus, SAVED_AT, STEPS, model=changes, checkpoint={"interval": 3})
            whole = run_at(pool, source)
            for number, first in enumerate(READ_AT):
                second = list(READ_AT)[(number + 3) % len(READ_AT)]
                rows.append(_through(pool, source, whole, model, first, second))
                print(rows[-1], flush=True)
    finally:
        pool.close()
    good = all(not row["different"] and row["worst_loss"] <= BOUND for row in rows)
    print(write_result("checkpoints_layouts", {"saved_at": SAVED_AT.describe(), "bound": BOUND, "rows": rows}))
    return 0 if good else 3


def _through(pool: RankPool, source: Run, whole: Seen, model: str, first: str, second: str) -> dict[str, Any]:
    """Read at `first`, train three steps, read at `second`, train on."""
    one = READ_AT[first]
    there = source.but(folder=begin_from(source, 3, source.folder / f"saved {first}"), layout=one)
    pool.run(one.world_size, load_and_save, there)
    written = source.folder / "checkpoints/step_00000003"
    different, moments = pool.run(1, compare_tensors, written, there.folder / "checkpoints/step_00000004")[0]
    trained = source.but(folder=begin_from(source, 3, source.folder / f"trained {first}"), layout=one, steps=6)
    losses = run_at(pool, trained).losses

    two = READ_AT[second]
    again = trained.but(folder=begin_from(trained, 6, trained.folder / second), layout=two, steps=STEPS)
    copied = trained.but(folder=begin_from(trained, 6, trained.folder / f"saved {second}"), layout=two)
    pool.run(two.world_size, load_and_save, copied)
    more, _ = pool.run(
        1, compare_tensors, trained.folder / "checkpoints/step_00000006", copied.folder / "checkpoints/step_00000007"
    )[0]
    losses |= run_at(pool, again).losses
    worst = max(abs(loss / whole.losses[step] - 1) for step, loss in losses.items())
    return {
        "model": model,
        "first": first,
        "second": second,
        "moments": moments,
        "different": different + more,
        "steps": sorted(losses),
        "worst_loss": worst,
    }


if __name__ == "__main__":
    sys.exit(main())
