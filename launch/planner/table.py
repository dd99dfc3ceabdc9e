"""Rows of published_training_configs.csv as jobs: blanks filled in by rules, each of which is written down.

Measured columns are never read, nor measurements in a row's note. No rule knows a row or fits a source: what differs
between programs is data/software.json, facts about how they compute.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from foundation.accelerators import Device, nearest_device
from foundation.errors import RequestError
from launch.planner.architecture import Architecture
from launch.planner.job import Arithmetic, Job, Recomputation
from launch.planner.models_by_name import find_model

Row = dict[str, str]

BATCH_TOKENS = 4 * 2**20
"""Tokens of a global batch where a row says that its batch is not in its source."""

USUAL_SEQUENCES = (
    ("llama3", 8192.0),
    ("llama2", 4096.0),
    ("mistral", 4096.0),
    ("mixtral", 4096.0),
    ("qwen", 4096.0),
    ("deepseek", 4096.0),
)
"""(part of a model's name, tokens that it is usually trained with): others with 2048."""

LARGEST = 1e9
LONGEST_PIPELINE = 256
MOST_LAYERS = 4096
MOST_CHUNKS = 1024
"""Of all stages together: the schedule of more is too long to be simulated."""

ZERO_STAGE = re.compile(r"(?:^|zero[-_ ]*)(?:stage[-_ ]*)?([0-3])(?!\d)")
SELECTIVE = re.compile(r"selective|(?<!\S)op(?!\S)")
NONE = re.compile(r"(?:none|no|not|never|false|off|0)\b")
EVERY_LAYER = re.compile(r"every|full|all\b|layer|uniform|block|checkpoint|\b(?:true|yes|on|1)\b")
KNOWN_PRECISION = re.compile(r"(?:bf|fp|float|bfloat|tf)(?:4|8|16|32)|mx|mixed|amp|half")

YEAR_MARKS = (
    (re.compile(r"arxiv[ :]*(\d\d)(\d\d)\.\d{4,5}", re.I), 2000),
    (re.compile(r"(?:nemo|release|/)\s*(2\d)\.(\d\d)\b", re.I), 2000),
    (re.compile(r"\b(20[12]\d)[-_]?(0[1-9]|1[0-2])", re.I), 0),
)


@dataclass(frozen=True)
class Understood:
    """A row as a job, with what was assumed.

    Attributes:
        contradictions: what cannot all hold of what the row says, each predicted as if it could.
        says_recompute: whether the row itself says what is recomputed.
    """

    job: Job
    notes: tuple[str, ...]
    contradictions: tuple[str, ...]
    says_recompute: bool


def understand(row: Row) -> Understood:
    """The job that `row` describes.

    Raises:
        RequestError: no model, GPU, TP or PP that can be made sense of.
    """
    notes: list[str] = []
    numbers = {name: _number(row, name, notes) for name in (
        "params_b", "layers", "hidden", "ffn", "heads", "kv_heads", "seq", "vocab", "num_gpus", "tp", "pp", "vpp", "cp",
        "ep", "dp", "mbs", "gbs",
    )}  # fmt: skip
    for field in ("tp", "pp"):
        if numbers[field] is None:
            raise RequestError(f"{field} is blank", rule="a row has a model, a GPU, tp and pp", cure=f"fill in {field}")
    program = _program(row.get("source", ""))
    model, assumed = find_model(row.get("model", ""), numbers)
    if assumed:
        notes.append("model: " + "; ".join(assumed))
    sizes = _grid(numbers, notes)
    ones = [name for name in ("cp", "ep") if numbers[name] is None and (name == "cp" or model.moe_layers)]
    _cut_layers(model, sizes, notes)
    if numbers["vpp"] is None and sizes["pp"] > 1 and program.get("layers_per_chunk"):
        sizes["vpp"] = max(1, round(model.layers / sizes["pp"] / program["layers_per_chunk"]))
        notes.append(f"{sizes['vpp']} virtual chunks a stage")
    elif numbers["vpp"] is None and sizes["pp"] > 1:
        ones.insert(0, "vpp")
    notes += [f"{name} = 1" for name in ones]
    batch = _batch(row, numbers, sizes, model.name.lower(), notes)
    zero, shard = _zero(row, program, sizes, notes)
    options = _options(row, program, notes)
    fields: dict[str, Any] = {**sizes, **batch, **options}
    expert_tensor = sizes["tp"] if sizes["ep"] == 1 or program["expert_tensor"] == "tensor" else 1
    job = Job(
        architecture=_variant(model, row.get("model", "")),
        device=_device(row, program, notes),
        **fields,
        zero=zero,
        shard=shard,
        expert_tensor=expert_tensor,
        loss=program["loss"],
        only_master_weights=bool(program["only_master_weights"]) and zero == 3,
        adapters_only="lora" in row.get("model", "").lower(),
        tokens_kept=0.9 if "tokendrop" in row.get("model", "").lower() else 1.0,
        year=_year(row.get("source", ""), program),
    )
    return Understood(job, tuple(notes), _contradictions(job, numbers), says_recompute=_says_recompute(row))


def _number(row: Row, field: str, notes: list[str]) -> float | None:
    text = (row.get(field) or "").strip()
    if not text:
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        raise RequestError(f"{field} = {text!r} is not a number", cure="a number, or nothing") from None
    if not 0 <= value < LARGEST:
        raise RequestError(f"{field} = {text} is no size", cure="a number from 1 on, or nothing")
    if field != "params_b" and value != int(value):
        raise RequestError(f"{field} = {text} is not a whole number", cure="a whole number, or nothing")
    if value == 0:
        notes.append(f"{field} = {text} taken as blank")
        return None
    return value


def _grid(numbers: dict[str, float | None], notes: list[str]) -> dict[str, int]:
    sizes = {name: int(numbers[name] or 1) for name in ("tp", "pp", "vpp", "cp", "ep")}
    inner = sizes["tp"] * sizes["pp"] * sizes["cp"]
    dp = numbers["dp"]
    if numbers["num_gpus"] is None:
        notes.append(f"{inner * int(dp or 1)} GPUs from the layout")
    gpus = int(numbers["num_gpus"] or inner * int(dp or 1))
    if dp is None:
        if numbers["num_gpus"] is not None:
            notes.append(f"dp = {max(1, gpus // inner)}")
        dp = max(1, gpus // inner)
    return {**sizes, "dp": int(dp), "num_gpus": gpus}


def _contradictions(job: Job, said: dict[str, float | None]) -> tuple[str, ...]:
    """What no run can do at once."""
    found: list[str] = []
    inner = job.tp * job.pp * job.cp
    if job.num_gpus % inner:
        found.append(f"tp x pp x cp = {inner} does not divide {job.num_gpus} GPUs")
    elif said["dp"] is not None and inner * job.dp != job.num_gpus:
        found.append(f"tp x pp x cp x dp = {inner * job.dp} is not {job.num_gpus} GPUs")
    if job.dp * job.cp % job.shard:
        found.append(f"a shard group of {job.shard} does not divide dp x cp = {job.dp * job.cp}")
    experts = job.architecture.experts
    samples = job.micro_batch_size * job.dp
    if said["gbs"] is not None and job.global_batch_size % samples:
        found.append(f"mbs x dp = {samples} does not divide a global batch of {job.global_batch_size}")
    if job.ep > 1 and (not job.architecture.moe_layers or experts % job.ep):
        found.append(f"ep = {job.ep} does not divide {experts if job.architecture.moe_layers else 0} experts")
    return tuple(found)


def _cut_layers(model: Architecture, sizes: dict[str, int], notes: list[str]) -> None:
    """Every chunk of a stage holds a layer."""
    most, chunks = min(model.layers, LONGEST_PIPELINE), sizes["pp"] * sizes["vpp"]
    if model.layers % chunks:
        notes.append(f"layers spread unevenly, as pp x vpp = {chunks} does not divide {model.layers}")
    if sizes["pp"] > most:
        raise RequestError(f"pp = {sizes['pp']} is more than {most} stages", cure="pp of at most the layers")
    if model.layers > MOST_LAYERS:
        raise RequestError(f"layers = {model.layers} is more than {MOST_LAYERS}", cure="layers of one model")
    if sizes["pp"] * sizes["vpp"] > model.layers:
        sizes["vpp"] = model.layers // sizes["pp"]
        notes.append(f"{sizes['vpp']} virtual chunks a stage, as many as there are layers")
    if sizes["pp"] * sizes["vpp"] > MOST_CHUNKS:
        raise RequestError(
            f"pp = {sizes['pp']} stages of vpp = {sizes['vpp']} chunks are more than {MOST_CHUNKS} chunks",
            cure="a smaller vpp, or nothing",
        )


def _batch(
    row: Row, numbers: dict[str, float | None], sizes: dict[str, int], family: str, notes: list[str]
) -> dict[str, int]:
    seq = numbers["seq"]
    if seq is None:
        seq = next((length for mark, length in USUAL_SEQUENCES if mark in family), 2048.0)
        notes.append(f"sequences of {seq:.0f}")
    micro = numbers["mbs"]
    if micro is None:
        micro = 1.0
        notes.append("micro-batch of 1")
    whole = numbers["gbs"]
    if whole is None:
        count = 1 if sizes["pp"] == 1 else 8 * sizes["pp"]
        whole = micro * sizes["dp"] * count
        notes.append(f"global batch of {whole:g} ({count} micro-batches)")
    elif "gbs not in sheet" in row.get("note", "").lower() and whole * seq > 2 * BATCH_TOKENS:
        whole = max(1.0, BATCH_TOKENS / seq)
        notes.append(f"global batch of {whole:g}: the row's is not from its source, and this one has as many tokens "
                     f"as {BATCH_TOKENS // 2048} sequences of 2048")  # fmt: skip
    return {"seq_length": int(seq), "micro_batch_size": int(micro), "global_batch_size": int(whole)}


def _zero(row: Row, program: dict[str, Any], sizes: dict[str, int], notes: list[str]) -> tuple[int, int]:
    text = (row.get("zero") or "").lower().strip()
    replicas = sizes["dp"] * sizes["cp"]
    group = re.search(r"shard group ([1-9]\d{0,8})\b", text)
    stage = ZERO_STAGE.search(text)
    if "fsdp" in text or (stage is not None and stage.group(1) == "3"):
        return 3, int(group.group(1)) if group else replicas
    if stage is not None or NONE.match(text):
        return int(stage.group(1)) if stage else 0, replicas
    notes.append(f"ZeRO-{program['zero']}" + _not_understood("zero", text))
    zero = int(program["zero"])
    return (1 if zero == 3 and sizes["pp"] > 1 else zero), replicas


def _options(row: Row, program: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    note = row.get("note", "").lower()
    kernel = re.search(r"kernel=([^;]*)", note)
    attention, fused_norms = program["attention"], program["fused_norms"]
    if kernel is not None:
        said = kernel.group(1)
        attention = next((name for mark, name in (
            ("flash_attention2", "flash"), ("flash", "flash1"), ("fused", "fused"), ("torch", "unfused"),
        ) if mark in said), attention)  # fmt: skip
        fused_norms = "rms" in said
    recompute, sequence = _recompute(row, program, notes), program["sequence_parallel"]
    said_sequence = re.search(r"sequence[_ ]parallel(?:ism)?=(\d)", note)
    if said_sequence is not None:
        sequence = said_sequence.group(1) == "1"
    text = (row.get("recompute") or "").lower()
    if "sequence" in text:
        sequence = "no sequence" not in text
    return {
        "attention": attention,
        "fused_norms": fused_norms,
        "fused_elements": program["fused_elements"],
        "recompute": recompute,
        "sequence_parallel": bool(sequence),
        "arithmetic": _arithmetic(row, notes),
        "main_grad_bytes": _main_grad_bytes(row, program),
        "overlap": program["overlap"],
        "gradient_passes": program["gradient_passes"],
    }


def _main_grad_bytes(row: Row, program: dict[str, Any]) -> int:
    if "bf16" in (row.get("precision") or "").lower():
        return int(program.get("main_grad_bytes_bf16", program["main_grad_bytes"]))
    return int(program["main_grad_bytes"])


def _recompute(row: Row, program: dict[str, Any], notes: list[str]) -> Recomputation:
    text = (row.get("recompute") or "").lower().strip()
    if SELECTIVE.search(text):
        return "operators" if program.get("selective") == "operators" else "selective"
    if NONE.match(text):
        return "none"
    if EVERY_LAYER.search(text):
        return "full"
    notes.append(f"recompute {program['recompute']}" + _not_understood("recompute", text))
    return program["recompute"]  # type: ignore[no-any-return]  # of a JSON file


def _says_recompute(row: Row) -> bool:
    text = (row.get("recompute") or "").lower().strip()
    return any(pattern.search(text) for pattern in (SELECTIVE, EVERY_LAYER)) or NONE.match(text) is not None


def _not_understood(field: str, text: str) -> str:
    return f" ({field} = {text[:80]!r} is not understood)" if text else ""


def _arithmetic(row: Row, notes: list[str]) -> Arithmetic:
    text = (row.get("precision") or "").lower()
    if not KNOWN_PRECISION.search(text):
        notes.append("bf16" + _not_understood("precision", text.strip()))
    if "fp4" in text:
        return "fp4"
    if "fp8" in text or "float8" in text or "mx" in text:
        return "fp8"
    return "fp32" if text in ("fp32", "float32") else "bf16"


def _device(row: Row, program: dict[str, Any], notes: list[str]) -> Device:
    device, named = nearest_device(row.get("gpu", ""))
    if not named:
        notes.append(f"{device.name}'s figures: {row['gpu']!r} is no known variant")
    network = program.get("scale_out_gb_per_s")
    return device if network is None else replace(device, scale_out_gb_per_s=float(network))


def _variant(model: Architecture, printed: str) -> Architecture:
    return replace(model, extra_output_layers=0) if "w/o mtp" in printed.lower() else model


@cache
def _programs() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "software.json").read_text())
    return values


def _program(source: str) -> dict[str, Any]:
    known = _programs()
    found: dict[str, Any] = next((entry for entry in known["programs"] if re.search(entry["match"], source, re.I)), {})
    return {**known["default"], **found}


def _year(source: str, program: dict[str, Any]) -> float:
    for pattern, century in YEAR_MARKS:
        found = pattern.search(source)
        if found is not None:
            return century + int(found.group(1)) + (int(found.group(2)) - 1) / 12
    return float(program["year"])
