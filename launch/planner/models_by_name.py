"""Which model a table's row is about, from its name and whatever sizes it states."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from foundation.errors import RequestError
from launch.planner.architecture import Architecture, LatentAttention

SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bmt])\b")
GATED = ("llama", "mistral", "mixtral", "qwen", "gemma", "deepseek", "olmo", "yi-", "kimi", "phi", "smollm", "falcon3")
LONGEST_NUMBER = 8
"""Characters of a size in a name: more are no size."""

HUB_OWNER = re.compile(r"^[\w.-]+/(?=[\w.-]+$)")
VARIANT = re.compile(r"\b(?:sft|lora|pretrain|pre-training|instruct|base|bf16|fp8|chat|hf|it|v0\.\d)\b")
"""Of a name: what leaves the architecture as it is."""

VOCABULARIES = {"llama3": 128256, "llama2": 32000, "llama": 32000, "qwen": 151936, "mistral": 32768, "gemma": 256000}
SHAPES = (
    (0.1, 12),
    (0.4, 24),
    (1.5, 24),
    (3, 30),
    (7, 32),
    (13, 40),
    (30, 52),
    (65, 80),
    (175, 96),
    (540, 110),
    (1000, 128),
)
"""(billions of parameters, layers) of published decoders: others lie between."""


def find_model(name: str, stated: dict[str, float | None]) -> tuple[Architecture, list[str]]:
    """The architecture of a row and what had to be assumed for it.

    Args:
        name: as the row prints it.
        stated: layers, hidden, ffn, heads, kv_heads, vocab and params_b, None where blank.

    Raises:
        RequestError: the name is not known, and neither sizes nor a number of parameters are there.
    """
    known = known_models().get(_catalogue_name(name))
    layers, hidden = stated.get("layers"), stated.get("hidden")
    notes: list[str] = []
    if known is not None and layers in (None, known.layers) and hidden in (None, known.hidden_size):
        blank = [field for field in ("layers", "hidden", "heads", "vocab") if stated.get(field) is None]
        if blank:
            notes.append(f"{', '.join(blank)} of {known.name}")
        return _with_stated(known, stated), notes
    if layers is not None and hidden is not None:
        return _from_sizes(name, int(layers), int(hidden), stated, notes), notes
    billions = stated.get("params_b") or _billions(name)
    if billions is None:
        raise RequestError(
            f"no model is known as {name!r}",
            rule="a row names a known model, or gives layers and hidden, or params_b",
            cure="fill in params_b, or an entry in launch/planner/data/architectures.json",
        )
    return _from_parameters(name, billions, stated, notes), notes


@cache
def known_models() -> dict[str, Architecture]:
    """Every model of data/architectures.json, by its name there."""
    given = json.loads((Path(__file__).parent / "data" / "architectures.json").read_text())["models"]
    return {name: _architecture(name, values) for name, values in given.items()}


def _architecture(name: str, values: dict[str, Any]) -> Architecture:
    fields = dict(values)
    layers, experts = fields["layers"], fields.get("experts")
    fields.setdefault("attention_layers", layers)
    fields.setdefault("head_width", fields["hidden_size"] // fields["heads"])
    fields.setdefault("dense_layers", 0 if experts else layers)
    if fields.get("latent"):
        fields["latent"] = LatentAttention(**fields["latent"])
    return Architecture(name=name, **fields)


def _catalogue_name(printed: str) -> str:
    """`LLAMA3.1_405B SFT` -> llama3-405b; `DeepSeekV3 (w/o MTP)` -> deepseek-v3."""
    text = re.sub(r"\(.*?\)", "", printed.lower()).strip()
    text = HUB_OWNER.sub("", text)
    text = VARIANT.sub("", text).strip(" _-")
    text = re.sub(r"[\s_]+", "-", text)
    text = re.sub(r"^(meta-|nvidia-|openai-|moonshot-)", "", text)
    text = re.sub(r"llama-?(\d)(?:\.\d)?-", r"llama\1-", text)
    text = re.sub(r"^deepseek-?v(\d)", r"deepseek-v\1", text)
    text = re.sub(r"^gpt-oss-?", "gpt-oss-", text)
    text = re.sub(r"^nemotron-?4-(\d+)b", r"nemotron-\1b", text)
    text = re.sub(r"^nemotron-?h-?", "nemotron-h-", text)
    text = re.sub(r"-a\d+b$", "", text)
    text = re.sub(r"^(qwen\d(?:\.\d)?)-?(\d)", r"\1-\2", text)
    text = re.sub(r"^grok-?1.*", "grok-1", text)
    text = re.sub(r"^bloom(?!z?-(?!17\db)\d).*", "bloom-176b", text)
    text = re.sub(r"^olmo-?2-(?:\d{4}-)?", "olmo2-", text)
    text = re.sub(r"^(llama4-(?:scout|maverick))-17b-\d+e$", r"\1", text)
    text = re.sub(r"-w-o-mtp$|-dropless$|-tokendrop$", "", text)
    if text in known_models():
        return text
    spelled = {name.replace("-", ""): name for name in known_models()}
    return spelled.get(text.replace("-", ""), text)


def _with_stated(known: Architecture, stated: dict[str, float | None]) -> Architecture:
    changes: dict[str, Any] = {}
    if stated.get("vocab"):
        changes["vocab_size"] = int(stated["vocab"] or 0)
    if stated.get("ffn") and not known.moe_layers:
        changes["ffn_hidden_size"] = int(stated["ffn"] or 0)
    if stated.get("heads") and known.latent is None and stated["heads"] != known.heads:
        heads = int(stated["heads"] or 0)
        changes |= {"heads": heads, "head_width": known.hidden_size // heads, "query_groups": heads}
    if stated.get("kv_heads"):
        changes["query_groups"] = int(stated["kv_heads"] or 0)
    return replace(known, **changes) if changes else known


def _family(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-").replace("llama-3", "llama3").replace("llama-2", "llama2")


def _from_sizes(name: str, layers: int, hidden: int, stated: dict[str, float | None], notes: list[str]) -> Architecture:
    family = _family(name)
    gated = any(part in family for part in GATED)
    heads = int(stated.get("heads") or 0)
    if not heads:
        heads = max(1, hidden // 128)
        notes.append(f"{heads} heads of 128 channels")
    ffn = int(stated.get("ffn") or 0)
    if not ffn:
        ffn = -(-8 * hidden // 3 // 256) * 256 if gated else 4 * hidden
        notes.append(f"ffn {ffn}")
    vocab = int(stated.get("vocab") or 0)
    if not vocab:
        vocab = next((size for part, size in VOCABULARIES.items() if part in family), 51200)
        notes.append(f"vocabulary of {vocab}")
    tied = not gated
    return Architecture(
        name=name, hidden_size=hidden, vocab_size=vocab, layers=layers, attention_layers=layers, heads=heads,
        query_groups=int(stated.get("kv_heads") or heads), head_width=max(1, hidden // heads), dense_layers=layers,
        ffn_hidden_size=ffn, gated=gated, tied=tied,
    )  # fmt: skip


def _from_parameters(name: str, billions: float, stated: dict[str, float | None], notes: list[str]) -> Architecture:
    """A decoder of the usual proportions with that many parameters: 12 x layers x hidden^2 without embeddings."""
    layers = int(stated.get("layers") or _usual_layers(billions))
    hidden = max(128, round(math.sqrt(billions * 1e9 / (12 * layers)) / 128) * 128)
    notes.append(f"{layers} layers of {hidden} from {billions:g}B parameters")
    return _from_sizes(name, layers, hidden, {**stated, "heads": stated.get("heads")}, notes)


def _usual_layers(billions: float) -> int:
    below = max((shape for shape in SHAPES if shape[0] <= billions), default=SHAPES[0])
    above = min((shape for shape in SHAPES if shape[0] >= billions), default=SHAPES[-1])
    if above[0] == below[0]:
        return below[1]
    part = (math.log(billions) - math.log(below[0])) / (math.log(above[0]) - math.log(below[0]))
    return round(below[1] + part * (above[1] - below[1]))


def _billions(name: str) -> float | None:
    found = SIZE.search(name.lower().replace("_", " ").replace("-", " "))
    if found is None or len(found.group(1)) > LONGEST_NUMBER:
        return None
    return float(found.group(1)) * {"m": 1e-3, "b": 1.0, "t": 1e3}[found.group(2)]
