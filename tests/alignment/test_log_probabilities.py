"""Log-probabilities of answers: a row's own matter, and transformers' on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.instruction import Example
from tests.alignment.cases import answer_rows, packed_rows
from tests.model.generation.cases import LAYOUTS, built, some_prompts, weights_of
from tests.ranks import RankPool

ROWS = [
    Example(np.array(prompt.tokens, dtype=np.int32), np.arange(len(prompt.tokens)) >= 1 + len(prompt.tokens) // 3)
    for prompt in some_prompts(12, shortest=3, longest=20)
]


def by_transformers() -> np.ndarray:  # type: ignore[type-arg]
    """One forward pass a row, without padding."""
    reference = built("llama")[1]
    found = []
    for row in ROWS:
        tokens = torch.from_numpy(row.tokens.astype(np.int64))
        with torch.no_grad():
            every = torch.log_softmax(reference(input_ids=tokens[None]).logits[0, :-1].double(), -1)
        of_labels = every.gather(-1, tokens[1:, None])[:, 0]
        found.append(float(of_labels[torch.from_numpy(row.answer[1:])].sum()))
    return np.array(found)


@pytest.mark.parametrize("where", ["one", "tp2", "tp2_sp", "pp2", "tp2_pp2", "tp2_sp_pp2"])
def test_equal_transformers_and_do_not_depend_on_padding_batch_or_packing(ranks: RankPool, where: str) -> None:
    model, reference = built("llama")
    weights, grid = weights_of(reference, model), LAYOUTS[where]
    alone, wide, together = (
        ranks.run(grid.world_size, answer_rows, grid, weights, model, ROWS, *sizes)[0]
        for sizes in ((20, 1), (48, 1), (20, 6))
    )
    packed = [
        one for one in ranks.run(grid.world_size, packed_rows, grid, weights, model, ROWS, 160) if one is not None
    ]
    # A sum over up to 13 tokens of 2 to 12 nats in fp32: 1e-6 of its size is what its digits hold.
    for others in (wide, together, packed[0]):
        assert others == pytest.approx(alone, rel=1e-6, abs=1e-6)
    assert alone == pytest.approx(by_transformers(), rel=1e-6, abs=1e-5)
