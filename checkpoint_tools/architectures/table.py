"""What a family's table is made of, and how its rows expand to the tensors of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.config import ModelConfig

Join = Literal["copy", "query_groups", "halves"]
"""How source tensors make one of core's.

copy: it is the one.
query_groups: rows by query group: its queries, its key, its value (core's linear_qkv).
halves: one over the other (gate over up, core's linear_fc1).
"""

LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shapes are written in.

    Attributes:
        ffn: inner width of the feed-forward block, of an expert's in a mixture.
        experts: 0 without a mixture.
        tied: one matrix for the embedding and the output layer.
    """

    num_layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head: int
    vocab: int
    experts: int
    tied: bool

    @classmethod
    def of(cls, model: ModelConfig) -> Dimensions:
        """Those of a config whose vocabulary is known."""
        if model.vocab_size is None:
            raise AssertionError("the vocabulary of a checkpoint's model is known")
        return cls(
            num_layers=model.num_layers,
            hidden=model.hidden_size,
            ffn=model.block_width,
            heads=model.num_attention_heads,
            groups=model.query_groups,
            head=model.head_width,
            vocab=model.vocab_size,
            experts=model.num_experts or 0,
            tied=model.share_embeddings_and_output_weights,
        )

    def size(self, symbol: str) -> int:
        """The extent that a table calls `symbol`."""
        sizes = {
            "vocab": self.vocab,
            "hidden": self.hidden,
            "ffn": self.ffn,
            "gate_up": 2 * self.ffn,
            "queries": self.heads * self.head,
            "keys": self.groups * self.head,
            "qkv": (self.heads + 2 * self.groups) * self.head,
            "head": self.head,
            "experts": self.experts,
        }
        return sizes[symbol]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        core: the tensor's canonical name, with {layer} and {expert}.
        sources: names in a Hugging Face file, in the order that `join` takes them.
        shape: core's, in the symbols of `Dimensions`.
        join: how the sources make it.
        split: the axis that tensor-parallel ranks share; None: each holds all of it.
        only_untied: there only where the output layer has a matrix of its own.
    """

    core: str
    sources: tuple[str, ...]
    shape: tuple[str, ...]
    join: Join = "copy"
    split: int | None = None
    only_untied: bool = False


@dataclass(frozen=True)
class Entry:
    """A row for one layer and one expert: one tensor of the model."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    row: Row
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        name: ours.
        model_type: in config.json.
        causal_lm: transformers' class.
        rows: its table.
        dimensions: from config.json.
        model: from config.json; None for families whose weights are converted but which the decoder cannot run.
        config: config.json of a model, the inverse of `model`.
        dropped: names of tensors that hold no weights (regular expressions).
        tied_by_default: what config.json means where it does not say.
    """

    name: str
    model_type: str
    causal_lm: str
    rows: tuple[Row, ...]
    dimensions: Callable[[Mapping[str, Any]], Dimensions]
    model: Callable[[Mapping[str, Any]], ModelConfig] | None
    config: Callable[[ModelConfig], dict[str, Any]] | None
    dropped: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    def entries(self, dimensions: Dimensions) -> Iterator[Entry]:
        """Every tensor of a model of these dimensions, in the model's order."""
        per_layer = [row for row in self.rows if LAYER in row.core]
        first = next(index for index, row in enumerate(self.rows) if LAYER in row.core)
        for row in self.rows[:first]:
            yield from _expanded(row, dimensions, None)
        for layer in range(dimensions.num_layers):
            for row in per_layer:
                yield from _expanded(row, dimensions, layer)
        for row in self.rows[first:]:
            if row not in per_layer:
                yield from _expanded(row, dimensions, None)


def _expanded(row: Row, dimensions: Dimensions, layer: int | None) -> Iterator[Entry]:
    if row.only_untied and dimensions.tied:
        return
    shape = tuple(dimensions.size(symbol) for symbol in row.shape)
    for expert in range(dimensions.experts) if EXPERT in row.core else [None]:
        yield Entry(
            name=_filled(row.core, layer, expert),
            sources=tuple(_filled(source, layer, expert) for source in row.sources),
            shape=shape,
            row=row,
            layer=layer,
            expert=expert,
        )


def _filled(template: str, layer: int | None, expert: int | None) -> str:
    return template.replace(LAYER, str(layer)).replace(EXPERT, str(expert))


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive rows of a source tensor that are consecutive rows of core's.

    Attributes:
        source: which of the sources.
        source_row: first row there.
        row: first row in core's tensor.
        rows: how many.
    """

    source: int
    source_row: int
    row: int
    rows: int


def row_runs(join: Join, rows: int, dimensions: Dimensions) -> list[RowRun]:
    """How the `rows` rows of core's tensor are made of rows of its sources."""
    if join == "copy":
        return [RowRun(0, 0, 0, rows)]
    if join == "halves":
        return [RowRun(0, 0, 0, rows // 2), RowRun(1, 0, rows // 2, rows // 2)]
    head, groups = dimensions.head, dimensions.groups
    share = dimensions.heads // groups * head
    runs: list[RowRun] = []
    for group in range(groups):
        start = group * (share + 2 * head)
        runs.append(RowRun(0, group * share, start, share))
        runs.append(RowRun(1, group * head, start + share, head))
        runs.append(RowRun(2, group * head, start + share + head, head))
    return runs


def source_shapes(entry: Entry, dimensions: Dimensions) -> list[tuple[int, ...]]:
    """The shape of each source of `entry`."""
    counts = [0] * len(entry.sources)
    for run in row_runs(entry.row.join, entry.shape[0], dimensions):
        counts[run.source] += run.rows
    return [(count, *entry.shape[1:]) for count in counts]
