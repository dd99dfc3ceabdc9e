"""What `orthant plan CONFIG.yaml` prints and writes."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

from foundation.accelerators import GIB, Device, find_device
from foundation.errors import RequestError
from foundation.files import refuse_unwritable, write_text
from launch.checks import check_sizes
from launch.config import load_config
from launch.planner.memory import StageMemory
from launch.planner.search import Choice, Plan, grouped, search
from launch.planner.vocabulary import vocabulary_of
from launch.terminal import say

MEMORY_PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "working",
    "fragmentation",
    "framework",
)


def plan_layouts(
    path: Path,
    overrides: list[str],
    *,
    gpus: int,
    gpu: str,
    per_node: int | None,
    top: int,
    explain: bool,
    out: Path | None,
    refused: Path | None,
    as_json: bool,
) -> None:
    """Search, print, and write what was asked for.

    Raises:
        RequestError: the configuration, the device or a file to be written is wrong, or no layout works.
    """
    for option, file in (("--out", out), ("--refused", refused)):
        if file is not None:
            refuse_unwritable(file, option)
    if out is not None and refused is not None and out.absolute() == refused.absolute():
        raise RequestError(
            f"--out and --refused are both {out}", rule="one would replace the other", cure="a file for each"
        )
    config, device = load_config(path, overrides), find_device(gpu)
    vocab_size = vocabulary_of(config)
    plan = search(config, device, gpus, vocab_size, per_node)
    shown = _accepted(plan.choices, path, overrides, gpus, top)
    if out is not None:
        write_text(out, "".join(f"{setting}\n" for setting in shown[0].candidate.overrides()))
    if refused is not None:
        write_text(refused, _refusal_table(plan))
    if as_json:
        print(json.dumps({**_as_values(plan, shown, device, gpus), "gpus_per_node": per_node}, indent=2))
        return
    machine = f"{gpus} x {device.name}" + ("" if per_node is None else f", {per_node} a node,")
    _print_choices(plan, shown, machine)
    if explain:
        _print_explanation(shown[0])
    chosen = shown[0].candidate.overrides()
    tried = {_named(setting) for setting in chosen}
    replaced = [setting for setting in overrides if _named(setting) in tried and setting not in chosen]
    if replaced:
        say(f"\nnot as asked: {', '.join(replaced)}; these are settings that plan tries all values of")
    kept = [setting for setting in overrides if _named(setting) not in tried]
    print(f"\northant train {shlex.join([str(path), *kept, *chosen])}")


def _named(setting: str) -> str:
    """What an override sets."""
    return setting.partition("=")[0].strip()


def _accepted(choices: tuple[Choice, ...], path: Path, overrides: list[str], gpus: int, top: int) -> list[Choice]:
    """The first `top`, each of which `orthant train` takes as it is."""
    for choice in choices[:top]:
        check_sizes(load_config(path, [*overrides, *choice.candidate.overrides()]), world_size=gpus)
    return list(choices[:top])


def _print_choices(plan: Plan, shown: list[Choice], machine: str) -> None:
    print(f"{len(plan.choices)} layouts of {machine} fit, {len(plan.refusals)} do not\n")
    print("     tokens/s/GPU    MFU   step s   GiB  layout")
    for place, choice in enumerate(shown, start=1):
        print(
            f"{place:>3}  {choice.tokens_per_second:>12,.0f}  {choice.mfu:>5.1%}  {choice.time.total:>7.2f}  "
            f"{choice.memory.gib:>4.0f}  {choice.candidate.describe()}"
        )
    if plan.refusals:
        print("\nrefused:")
    for _, count, example in grouped(plan.refusals):
        print(f"{count:>6}  e.g. {example.candidate.describe()}: {example.reason}")


def _print_explanation(choice: Choice) -> None:
    total = choice.time.total
    print(f"\nwhere {total:.2f} s go ({choice.candidate.describe()}):")
    for name, seconds in time_parts(choice).items():
        print(f"  {name:<36} {seconds:>8.3f} s  {seconds / total:>6.1%}")
    print(f"\nwhere {choice.memory.gib:.1f} GiB go, by stage:")
    print("  stage  " + "  ".join(f"{name:>13}" for name in (*MEMORY_PARTS, "all")))
    for stage in choice.stages():
        sizes = [getattr(stage, name) / GIB for name in MEMORY_PARTS]
        print(f"  {stage.stage:>5}  " + "  ".join(f"{size:>13.2f}" for size in (*sizes, stage.gib)))


def time_parts(choice: Choice) -> dict[str, float]:
    """Seconds of a step by cause; they add up to the step."""
    time, layers = choice.time, choice.time.layers
    # The fullest stage's micro-batches: its layers by their parts, what it has beyond an average stage as one.
    average = layers.total * time.micro_batches
    parts = {
        "matrix products": layers.matrices * time.micro_batches,
        "attention": layers.attention * time.micro_batches,
        "norms, activations, casts": layers.memory * time.micro_batches,
        "tensor-parallel communication": layers.tensor_parallel * time.micro_batches,
        "context-parallel communication": layers.context_parallel * time.micro_batches,
        "expert-parallel communication": layers.expert_parallel * time.micro_batches,
        "kernel launches": layers.launches * time.micro_batches,
        "recomputation": layers.recomputation * time.micro_batches,
        "logits, loss, uneven stages": max(0.0, time.computing - average),
        "pipeline bubble": time.bubble,
        "pipeline transfers": time.transfers,
        "data-parallel communication": time.data_parallel,
        "optimizer": time.optimizer,
        "each step": time.fixed,
    }
    parts["jitter of many ranks"] = time.total - sum(parts.values())
    return parts


def _as_values(plan: Plan, shown: list[Choice], device: Device, gpus: int) -> dict[str, Any]:
    return {
        "gpus": gpus,
        "gpu": device.name,
        "fitting": len(plan.choices),
        "layouts": [_choice_values(choice) for choice in shown],
        "refused": [
            {"count": count, "reason": example.reason, "example": example.candidate.describe()}
            for _, count, example in grouped(plan.refusals)
        ],
    }


def _choice_values(choice: Choice) -> dict[str, Any]:
    return {
        "layout": choice.candidate.describe(),
        "step_time_s": choice.time.total,
        "tokens_per_s_per_gpu": choice.tokens_per_second,
        "mfu": choice.mfu,
        "memory_gib": choice.memory.gib,
        "fullest_stage": choice.memory.stage,
        "overrides": choice.candidate.overrides(),
        "seconds": time_parts(choice),
        "stages_gib": [_stage_values(stage) for stage in choice.stages()],
    }


def _stage_values(stage: StageMemory) -> dict[str, float]:
    return {"stage": stage.stage, **{name: getattr(stage, name) / GIB for name in MEMORY_PARTS}, "total": stage.gib}


def _refusal_table(plan: Plan) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layout", "reason"))
    writer.writerows((one.candidate.describe(), one.reason) for one in plan.refusals)
    return text.getvalue()
