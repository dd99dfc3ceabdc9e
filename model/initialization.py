"""Initial weights that do not depend on the layout.

Core draws from per-rank streams, so equal seeds give different functions at TP1 and TP2. Here every row of every
tensor of the whole model has a random stream of its own, keyed by (seed, tensor name, row): a rank draws just the rows
it holds and gets the same numbers at every layout, on CPU and GPU.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch

from model.config import ModelConfig
from model.global_tensors import GlobalSlice, global_slices
from model.score_head import NAME as SCORE_HEAD

RESIDUAL_OUTPUTS = (".linear_proj.weight", ".linear_fc2.weight")
VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def initialize(chunks: list[Any], model: ModelConfig, vocab_size: int, seed: int) -> None:
    """Fill every parameter of `chunks`: norms 1, biases 0, matrices normal.

    The standard deviation is `init_method_std`; matrices that write into the residual stream get it divided by
    sqrt(2 num_layers) (Radford et al. 2019), as core does. Vocabulary rows that are padding are 0.
    """
    for part in global_slices(chunks):
        if len(part.shape) == 1:
            part.tensor.fill_(0.0 if part.name.endswith(".bias") else 1.0)
        else:
            _fill_normal(part, _standard_deviation(part.name, model), _drawn_rows(part, vocab_size), seed)


@torch.no_grad()
def disturb_vectors(chunks: list[Any], seed: int, scale: float = 0.1) -> None:
    """Add normal noise to norms and biases, the same at every layout.

    For comparisons: weights that all are 1 or 0 hide that two of them were swapped, split or left out.
    """
    for part in global_slices(chunks):
        if len(part.shape) == 1:
            noise = _draw_row(_stream_key(part.name, seed), 0, part.shape[0])[part.index]
            part.tensor.add_(torch.from_numpy(noise.copy()).mul_(scale).to(part.tensor.device))


def _standard_deviation(name: str, model: ModelConfig) -> float:
    if name == SCORE_HEAD:
        return 1 / math.sqrt(model.hidden_size + 1)  # scores of about 1 (Stiennon et al. 2020)
    scale = math.sqrt(2 * model.num_layers) if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return model.init_method_std / scale


def _drawn_rows(part: GlobalSlice, vocab_size: int) -> int:
    """Rows of the whole tensor that are drawn; the rest stays 0."""
    return vocab_size if part.name in VOCABULARY_TENSORS else part.shape[0]


def _fill_normal(part: GlobalSlice, std: float, drawn_rows: int, seed: int) -> None:
    rows, columns = part.index
    values = np.zeros(part.tensor.shape, dtype=np.float32)
    key = _stream_key(part.name, seed)
    for local, row in enumerate(range(rows.start, min(rows.stop, drawn_rows))):
        values[local] = _draw_row(key, row, part.shape[1])[columns]
    part.tensor.copy_(torch.from_numpy(values).mul_(std))


def _stream_key(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")


def _draw_row(key: int, row: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[width] standard normal: counter-based (Salmon et al. 2011), the row in the counter's highest word."""
    stream = np.random.Philox(key=key, counter=row << 192)
    return np.random.Generator(stream).standard_normal(width, dtype=np.float32)
