"""The mean of several checkpoints' weights (arXiv 1803.05407), streamed like any other conversion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import xxhash

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.catalog import Catalog
from checkpoint_tools.copying import check_hash
from checkpoint_tools.dtypes import FP32, FP64, converted
from checkpoint_tools.rows import Block, CatalogRows, Scratch, bytes_of
from foundation.errors import RequestError

COMPUTED_BY = (
    "query_groups",
    "num_attention_heads",
    "head_width",
    "rotary_base",
    "rope_scaling",
    "layernorm_epsilon",
    "window_size",
    "moe_router_topk",
    "moe_router_pre_softmax",
)
"""Of a ModelConfig: what no name or shape of a weight shows, and the weights mean something else with another."""
OF_NO_EFFECT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Of config.json: what weights mean the same with, whatever it is."""


class MeanRows:
    """Rows of the mean over several checkpoints, in the dtype of the first. Sums are fp32, fp64 where weights are.

    The rows of a tensor are asked for in order, once each: every source is held to the hashes that it has.
    """

    def __init__(self, catalogs: Sequence[Catalog], rows: Sequence[CatalogRows]) -> None:
        self._catalogs, self._rows = catalogs, rows
        self._buffer = Scratch()
        self._read: list[xxhash.xxh3_128] = []

    def fill(self, name: str, start: int, block: Block) -> None:
        """Put rows `start` ... of the mean into `block`.

        Raises:
            WorkError: a file ends too early, copies of the tensor differ, or its hash is another one.
        """
        if start == 0:
            self._read = [xxhash.xxh3_128() for _ in self._catalogs]
        target = self._catalogs[0].tensors[name].dtype
        wide = FP64 if target is FP64 else FP32
        total = np.zeros(block.shape, wide.carrier)
        for catalog, rows, read in zip(self._catalogs, self._rows, self._read, strict=True):
            dtype = catalog.tensors[name].dtype
            part = self._buffer.block(block.shape[0], block.shape[1], dtype)
            rows.fill(name, start, part)
            read.update(bytes_of(part))
            if start + block.shape[0] == catalog.tensors[name].rows:
                check_hash(name, read.hexdigest(), catalog.recorded, str(catalog.folder))
            total += converted(part, dtype, wide)
        total /= len(self._rows)
        block[...] = converted(total, wide, target)

    def prefetch(self, name: str, start: int, rows: int) -> None:
        """Rows `start` ... will be asked for soon."""
        for reader in self._rows:
            reader.prefetch(name, start, rows)


@contextmanager
def mean_rows(catalogs: Sequence[Catalog]) -> Iterator[MeanRows]:
    """Readers of all of them."""
    with ExitStack() as stack:
        yield MeanRows(catalogs, [stack.enter_context(CatalogRows(catalog)) for catalog in catalogs])


def check_same_model(catalogs: Sequence[Catalog]) -> None:
    """Refuse checkpoints whose weights do not correspond.

    Raises:
        RequestError: names or shapes differ, or what the model does with its weights.
    """
    first = {name: tensor.shape for name, tensor in catalogs[0].weights.items()}
    for catalog in catalogs[1:]:
        other = {name: tensor.shape for name, tensor in catalog.weights.items()}
        wrong = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if wrong:
            raise RequestError(
                f"{catalog.folder} is another model than {catalogs[0].folder}: {wrong[0]} is "
                f"{other.get(wrong[0], 'not there')} and {first.get(wrong[0], 'not there')}",
                rule="a mean is taken over checkpoints of one model",
                cure="name checkpoints of one run, or of runs of one architecture",
            )
        _refuse_another_computation(catalogs[0], catalog)


def _refuse_another_computation(first: Catalog, catalog: Catalog) -> None:
    one, other = _computation(first.identity, catalog.identity)
    wrong = next((key for key in [*one, *other] if one.get(key) != other.get(key)), None)
    if wrong is not None:
        raise RequestError(
            f"{catalog.folder} is another model than {first.folder}: {wrong} is {other.get(wrong)} and "
            f"{one.get(wrong)}",
            rule="a mean is taken over checkpoints of one configuration",
            cure="name checkpoints of one run, or correct the configuration that is wrong",
        )


def _computation(one: Identity, other: Identity) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both do with their weights, as far as both say it."""
    if one.model is not None and other.model is not None:
        ours, theirs = ({key: getattr(side.model, key) for key in COMPUTED_BY} for side in (one, other))
        return ours, theirs
    ours, theirs = (
        {key: value for key, value in (side.hugging_face or {}).items() if key not in OF_NO_EFFECT}
        for side in (one, other)
    )
    return (ours, theirs) if ours and theirs else ({}, {})
