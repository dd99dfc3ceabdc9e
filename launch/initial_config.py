"""A first configuration for a model and a machine: what it holds, why, and which layout."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.sources import DEMO
from foundation.accelerators import find_device
from foundation.errors import RequestError
from launch.checks import check_sizes, check_surroundings
from launch.config import RunConfig, config_from, load_config
from launch.planner.search import Choice, search
from launch.planner.vocabulary import vocabulary_of
from model.config import ModelConfig
from model.counts import parameter_count
from model.presets import DEMO_VOCABULARIES

WIDTH = 120
ROOM = 0.9
"""Share of a GPU's memory that a first layout is predicted to fill at most: predictions err."""

TOKENS_A_STEP = 4 << 20
"""Of models that people train on clusters: batches of 4 million tokens are common from 7 to 70 billion parameters."""


@dataclass(frozen=True)
class Wanted:
    """What a person says; None is for us to choose.

    Attributes:
        tokenizer: a path, or the number of entries of one to be trained.
        gpus: in all; 0 for CPU.
        gpus_per_node: tensor-parallel ranks stay inside a node.
    """

    preset: str
    data: tuple[str, ...] = ()
    tokenizer: str | None = None
    gpus: int = 0
    gpus_per_node: int = 8
    gpu: str = "h100"
    seq_length: int | None = None
    global_batch_size: int | None = None
    train_steps: int | None = None
    run: Path | None = None


@dataclass(frozen=True)
class Draft:
    """A configuration that every check of sizes has passed.

    Attributes:
        text: the file.
        layout: in words.
        predicted: what the planner says of it; None on a CPU.
        missing: what is not there yet, one message each.
    """

    text: str
    config: RunConfig
    layout: str
    predicted: str | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One setting and why it is what it is; `section` is its place, `value` plain."""

    section: str
    key: str
    value: Any
    why: str


def draft(wanted: Wanted, name: str, command: str) -> Draft:
    """The configuration.

    Args:
        wanted: what is asked for.
        name: of the run, where its folder is not given.
        command: how it was asked for, for the file's head.

    Raises:
        RequestError: no such preset or GPU, or no layout fits.
    """
    sizes = _sizes(wanted)
    folder = str(wanted.run or Path("runs") / name)
    lines = [*_fixed(wanted, folder), *sizes]
    choice = _planned(wanted, lines) if wanted.gpus else None
    lines += _layout_on_cpu(wanted) if choice is None else _layout_of(choice, wanted)
    text = _rendered(lines, _head(wanted, command, choice))
    config = _read_back(text, wanted.gpus or None)
    layout = check_sizes(config, world_size=wanted.gpus or None)
    return Draft(text, config, layout.describe(), _prediction(choice), tuple(_missing(config)))


def _fixed(wanted: Wanted, folder: str) -> list[Line]:
    sources = list(wanted.data) or [usual_source(wanted.preset)]
    return [
        Line("run", "folder", folder, "metrics, checkpoints, logs; the same command goes on with what lies here"),
        Line("model", "preset", wanted.preset, f"{_size(wanted.preset)} parameters; `orthant model` lists the others"),
        Line("data", "sources", sources, ".jsonl, .parquet, .txt, folders of them, or tokenised prefixes"),
        Line("data", "tokenizer", _tokenizer(wanted), _why_tokenizer(wanted)),
    ]


def _tokenizer(wanted: Wanted) -> dict[str, Any]:
    given = wanted.tokenizer
    if given is None and wanted.preset in DEMO_VOCABULARIES:
        given = str(DEMO_VOCABULARIES[wanted.preset])
    if given is not None and given.isdecimal():
        return {"kind": "byte-bpe", "vocab_size": int(given)}
    return {"path": given or "tokenizer"}


def _why_tokenizer(wanted: Wanted) -> str:
    if "kind" in _tokenizer(wanted):
        return "trained on the sources when the run is prepared"
    published = ModelConfig.from_preset(wanted.preset).vocab_size
    told = "" if published is None else f"; the model's has {published:,} entries"
    return f"a folder with tokenizer.json or tokenizer.model{told}"


def _parameters(preset: str) -> int:
    model = ModelConfig.from_preset(preset)
    return parameter_count(model, model.vocab_size or DEMO_VOCABULARIES[preset])


def _size(preset: str) -> str:
    return _count(_parameters(preset))


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def usual_source(preset: str) -> str:
    """What a run reads where nobody says: a demo model the corpus that ships, others a folder that is to be named."""
    return DEMO if preset in DEMO_VOCABULARIES else "corpus"


def _sizes(wanted: Wanted) -> list[Line]:
    """Batch, length, rates: by the size of the model, as such models are trained."""
    count, model = _parameters(wanted.preset), ModelConfig.from_preset(wanted.preset)
    demo = wanted.preset in DEMO_VOCABULARIES
    seq = wanted.seq_length or min(256 if demo else 8192, model.max_position_embeddings)
    batch = wanted.global_batch_size or _batch(seq, wanted.gpus, demo=demo)
    steps = wanted.train_steps or (200 if demo else 100_000)
    lr = 2e-3 if count < 1e8 else 1e-3 if count < 1e9 else 3e-4 if count < 2e10 else 1.5e-4 if count < 2e11 else 8e-5
    interval = max(1, steps // 4) if steps < 4000 else 1000
    lines = [
        Line("training", "train_steps", steps, f"{_count(steps * batch * seq)} tokens in all"),
        Line("training", "global_batch_size", batch, f"sequences a step over all replicas: {batch * seq:,} tokens"),
        Line("training", "seq_length", seq, f"tokens; the model knows {model.max_position_embeddings:,} positions"),
        Line("optimizer", "lr", lr, "the peak; smaller for larger models"),
        Line("schedule", "kind", "cosine", "falls from lr to min_lr over the run"),
        Line("schedule", "warmup_steps", max(1, min(2000, steps // 10)), "rises from 0 to lr first"),
        Line("schedule", "min_lr", float(f"{lr / 10:.3g}"), "a tenth of the peak is usual"),
        Line("evaluation", "interval", interval, "steps; on documents that are held out (data.validation_fraction)"),
        Line("checkpoint", "interval", max(1, interval // 2), "steps; all that a crash can cost"),
        Line("checkpoint", "keep_last", 3, "older ones are removed; keep_every keeps some for good"),
        Line("logging", "log_interval", 10, "steps between lines; metrics.jsonl has every step"),
    ]
    if wanted.gpus:
        lines.insert(3, Line("training", "precision", "bf16", "what GPUs are fast at; weights are kept in fp32 beside"))
    return lines


def _batch(seq: int, gpus: int, *, demo: bool) -> int:
    """Sequences of a step: a power of two near the usual tokens, and a multiple of the GPUs."""
    usual = 16 if demo else max(1, TOKENS_A_STEP // seq)
    return usual if not gpus else math.ceil(usual / gpus) * gpus


def _planned(wanted: Wanted, lines: list[Line]) -> Choice:
    """The planner's fastest layout that leaves some memory free, where one does."""
    device, config = find_device(wanted.gpu), config_from(_nested(lines))
    plan = search(config, device, wanted.gpus, vocabulary_of(config), wanted.gpus_per_node)
    roomy = (choice for choice in plan.choices if choice.memory.gib <= ROOM * device.memory_gib)
    return next(roomy, plan.choices[0])


def _layout_of(choice: Choice, wanted: Wanted) -> list[Line]:
    found = choice.candidate
    node = f"inside a node of {wanted.gpus_per_node}"
    lines = [
        Line("parallel", "tensor_model_parallel_size", found.tp, f"ranks that share each layer, {node}"),
        Line("parallel", "pipeline_model_parallel_size", found.pp, "stages that the layers are cut into"),
    ]
    if found.vpp > 1:
        why = "chunks of layers a stage: less waiting, more messages"
        lines.append(Line("parallel", "virtual_pipeline_model_parallel_size", found.vpp, why))
    if found.pipeline_layers is not None:
        why = "layers of each stage: they do not divide"
        lines.append(Line("parallel", "pipeline_layers", list(found.pipeline_layers), why))
    if found.cp > 1:
        lines.append(Line("parallel", "context_parallel_size", found.cp, "ranks that share each sequence"))
    if found.ep > 1:
        lines.append(Line("parallel", "expert_model_parallel_size", found.ep, "ranks that share the experts"))
    if found.tp > 1:
        lines.append(Line("parallel", "sequence_parallel", True, "norms and residuals are cut too: less memory"))
    if found.zero != 1:
        lines.append(Line("parallel", "zero_stage", found.zero, "replicas share weights and gradients as well"))
    if found.dp > 1:
        lines.append(Line("parallel", "overlap_grad_reduce", True, "gradients travel while the backward pass runs"))
        if found.zero == 1:
            lines.append(Line("parallel", "overlap_param_gather", True, "weights travel while the forward pass runs"))
    lines.append(Line("training", "micro_batch_size", found.micro_batch_size, "sequences a rank computes at once"))
    if found.recompute != "none":
        why = "the backward pass computes again what does not fit in memory"
        lines.append(Line("training", "recompute_granularity", found.recompute, why))
    return lines


def _layout_on_cpu(wanted: Wanted) -> list[Line]:
    lines = [Line("training", "micro_batch_size", 4 if wanted.preset in DEMO_VOCABULARIES else 1, "sequences at once")]
    if wanted.preset in DEMO_VOCABULARIES:
        lines += [
            Line("parallel", "tensor_model_parallel_size", 2, "ranks that share each layer; here to see it work"),
            Line("parallel", "pipeline_model_parallel_size", 2, "stages: 2 x 2 = 4 ranks on this machine"),
            Line("parallel", "sequence_parallel", True, "norms and residuals are cut over the first two as well"),
        ]
    return lines


ORDER = ("run", "model", "parallel", "data", "training", "optimizer", "schedule", "evaluation", "checkpoint", "logging")
SECTIONS = {
    "run": "the run itself",
    "model": "the architecture",
    "parallel": "how the model is spread over ranks; replicas take the ranks that are left",
    "data": "what it learns from",
    "training": "the steps",
    "optimizer": "AdamW",
    "schedule": "the learning rate over the steps",
    "evaluation": "the loss on documents that are held out",
    "checkpoint": "what a run goes on from",
    "logging": "what is told",
}


def _rendered(lines: list[Line], head: list[str]) -> str:
    parts = [f"# {line}" for line in head]
    for section in ORDER:
        inside = [line for line in lines if line.section == section]
        if not inside:
            continue
        parts += ["", f"{section}: # {SECTIONS[section]}"]
        for line in inside:
            setting = f"  {line.key}: {_written(line.value)}"
            whole = f"{setting} # {line.why}"
            parts += [whole] if len(whole) <= WIDTH else [f"  # {line.why}", setting]
    return "\n".join(parts) + "\n"


def _written(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _nested(lines: list[Line]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for line in lines:
        values.setdefault(line.section, {})[line.key] = line.value
    return values


def _head(wanted: Wanted, command: str, choice: Choice | None) -> list[str]:
    head = [f"Made by: {command}"]
    if choice is None:
        head.append(f"{wanted.preset} on this machine's CPU.")
    else:
        head.append(f"{wanted.preset} on {wanted.gpus} x {wanted.gpu}, {wanted.gpus_per_node} a node.")
        head.append(f"{_prediction(choice)}")
        head.append("The planner's error on measured runs: docs/planner_error.md.")
    return [*head, "Every field and what it means: `orthant config schema`; all filled in: `orthant config show`."]


def _prediction(choice: Choice | None) -> str | None:
    if choice is None:
        return None
    return (
        f"Predicted: {choice.time.total:.2f} s a step, {choice.tokens_per_second:,.0f} tokens/s/GPU, "
        f"MFU {choice.mfu:.0%}, {choice.memory.gib:.0f} GiB on the fullest stage."
    )


def _read_back(text: str, world_size: int | None) -> RunConfig:
    """The configuration as a run would read the file."""
    with tempfile.TemporaryDirectory(prefix="orthant-init-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(text, encoding="utf-8")
        config = load_config(file)
    check_sizes(config, world_size=world_size)
    return config


def _missing(config: RunConfig) -> Iterator[str]:
    """What a run would miss here. That the file is right elsewhere is no reason to refuse it."""
    try:
        check_surroundings(config)
    except RequestError as error:
        yield f"{error.what}: {error.rule}"
