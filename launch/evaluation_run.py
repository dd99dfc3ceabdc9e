"""Evaluations of a checkpoint: what every rank does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.manifest import read_manifest
from foundation.errors import RequestError
from foundation.files import write_text
from launch.bars import progress_bar
from launch.finite import finite
from launch.generation_run import layout_for, load_engine, tokenizer_of
from launch.terminal import say
from launch.world import World
from parallel.layout import ParallelLayout


@dataclass(frozen=True)
class EvaluationJob:
    """What is asked of a checkpoint, as plain values that ranks read from a file.

    Attributes:
        texts: sources whose perplexity is asked for.
        tasks: of lm-evaluation-harness.
        include_path: a folder with more tasks of that kind.
        limit: documents of each task at most.
    """

    checkpoint: str
    texts: tuple[str, ...] = ()
    text_key: str = "text"
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    tp: int = 1
    pp: int = 1
    as_json: bool = False

    def write(self, path: Path) -> Path:
        """Write the job for `read`."""
        write_text(path, json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> EvaluationJob:
        """The job that `write` wrote."""
        values = json.loads(path.read_text())
        return cls(**values | {"texts": tuple(values["texts"]), "tasks": tuple(values["tasks"])})


def evaluate_as_rank(job_path: Path, world: World) -> None:
    """One rank's part: join, load, evaluate; rank 0 prints."""
    from parallel.platform import install

    install()
    import torch.distributed as dist

    from parallel.groups import ProcessGroups, start_distributed

    job = EvaluationJob.read(job_path)
    layout = layout_for(read_manifest(Path(job.checkpoint)).model, job.tp, job.pp, world.world_size)
    if layout.dp > 1:
        raise RequestError("an evaluation runs on one replica", cure=f"start {job.tp * job.pp} ranks")
    start_distributed(world.rank, world.world_size, world.local_rank, timeout_seconds=1800)
    with ProcessGroups(layout, seed=0):
        found = evaluate_here(job, layout)
    if world.rank == 0:
        show(job, found)
    dist.barrier()
    dist.destroy_process_group()


def evaluate_here(job: EvaluationJob, layout: ParallelLayout) -> dict[str, Any]:
    """Evaluate with process groups that are there. Collective.

    Raises:
        RequestError: a checkpoint without a tokenizer, or the harness is not installed.
    """
    import torch.distributed as dist

    from alignment.evaluation import TokenScorer, perplexity
    from data.documents import Reading, read_documents
    from data.sources import find_source

    checkpoint = Path(job.checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    if tokenizer is None:
        raise RequestError("the checkpoint has no tokenizer, so there is no text to evaluate on", where=job.checkpoint)
    engine = load_engine(checkpoint, read_manifest(checkpoint), layout)
    found: dict[str, Any] = {"checkpoint": job.checkpoint}
    if job.texts:
        documents = []
        for name in job.texts:
            for document in read_documents(Reading(find_source(name, field="--text")), job.text_key):
                tokens = tokenizer.encode([document.text])[0].tolist()
                documents.append((tokens, len(document.text.encode())))
        if not any(tokens for tokens, _ in documents):
            raise RequestError(
                "there is no text to evaluate on",
                where=", ".join(job.texts),
                rule=f"of {len(documents)} documents at least one has a token",
                cure="--text with a file that holds text",
            )
        with progress_bar("evaluate", "pieces", shown=dist.get_rank() == 0) as progress:
            scorer = TokenScorer(engine.decoder, engine.context_length, progress)
            found |= asdict(perplexity(scorer, documents, tokenizer.eod_id))
    if job.tasks:
        found["tasks"] = _harness(job, engine, tokenizer)
    return found


def _harness(job: EvaluationJob, engine: Any, tokenizer: Any) -> dict[str, Any]:
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            "--tasks needs lm-evaluation-harness, which is not installed", cure="pip install 'orthant[eval]'"
        ) from error
    from alignment.harness import HarnessModel

    manager = TaskManager(include_path=job.include_path)
    missing = sorted(set(job.tasks) - set(manager.all_tasks))
    if missing:
        raise RequestError(
            f"lm-evaluation-harness has no task {', '.join(missing)}", cure="lm-eval ls tasks; --include-path FOLDER"
        )
    answer = simple_evaluate(
        model=HarnessModel(engine, tokenizer), tasks=list(job.tasks), task_manager=manager, limit=job.limit
    )
    # The harness answers the first process of a node alone.
    results: dict[str, Any] = {} if answer is None else answer["results"]
    return results


def show(job: EvaluationJob, found: dict[str, Any]) -> None:
    """Print the figures: one JSON object, or lines."""
    if job.as_json:
        print(json.dumps(finite(found), default=str, allow_nan=False))
        return
    if "perplexity" in found:
        print(
            f"perplexity {found['perplexity']:.4f}  ({found['nats_per_token']:.4f} nats a token, "
            f"{found['bits_per_byte']:.4f} bits a byte, {found['tokens']:,} tokens in {found['documents']:,} documents)"
        )
    for name, values in found.get("tasks", {}).items():
        shown = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float))
        print(f"{name}: {shown}")
    say(f"of {job.checkpoint}")
