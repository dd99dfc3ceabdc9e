"""`orthant evaluate CHECKPOINT`: perplexity on texts, tasks of lm-evaluation-harness."""

from __future__ import annotations

import tempfile
from pathlib import Path

from checkpoint_tools.manifest import read_manifest
from foundation.errors import RequestError
from launch.checkpoints import find_checkpoint
from launch.evaluation_run import EvaluationJob, evaluate_as_rank, evaluate_here, show
from launch.generation_run import layout_for
from launch.local_ranks import run_ranks
from launch.one_rank import one_rank
from launch.world import world_from_environment
from model.fits_layout import check_model_fits_layout
from parallel.layout import ParallelLayout


def evaluate(
    path: Path,
    *,
    texts: list[str],
    text_key: str,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    tp: int,
    pp: int,
    as_json: bool,
) -> None:
    """Print what a checkpoint is worth.

    Raises:
        RequestError: no checkpoint there, or nothing asked.
    """
    names = tuple(name.strip() for given in tasks for name in given.split(",") if name.strip())
    if not texts and not names:
        raise RequestError(
            "nothing to evaluate on",
            rule="a checkpoint is measured on texts (--text) or on tasks (--tasks)",
            cure="--text held_out.jsonl, or --tasks arc_easy,hellaswag",
        )
    checkpoint = find_checkpoint(path)
    model = read_manifest(checkpoint).model
    check_model_fits_layout(model, layout_for(model, tp, pp))
    job = EvaluationJob(
        checkpoint=str(checkpoint),
        texts=tuple(texts),
        text_key=text_key,
        tasks=names,
        include_path=None if include_path is None else str(include_path),
        limit=limit,
        tp=tp,
        pp=pp,
        as_json=as_json,
    )
    world = world_from_environment()
    if world is None and tp * pp == 1:
        with one_rank(ParallelLayout()):
            show(job, evaluate_here(job, ParallelLayout()))
        return
    with tempfile.TemporaryDirectory() as folder:
        described = job.write(Path(folder) / "job.json")
        if world is not None:
            evaluate_as_rank(described, world)
        else:
            run_ranks(tp * pp, "launch.rank", "evaluate", str(described), cure="run the same command again")
