"""A number for every token: the head of reward models and critics."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule

NAME = "score_head.weight"


class ScoreHead(MegatronModule):  # type: ignore[misc]
    """hidden -> score, in fp32, without a bias: a preference says nothing about a constant.

    Every tensor-parallel rank holds the whole weight. Under sequence parallelism each computes the scores of its share
    of the sequence, and core adds up the weight's gradients.
    """

    def __init__(self, config: Any, tensor_group: Any) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(
            torch.empty((1, config.hidden_size), dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self._group = tensor_group

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[s or its share, b, hidden_size] -> [b, s] fp32."""
        scores = (hidden.float() * self.weight[0].float()).sum(dim=-1)
        if self.config.sequence_parallel:
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self._group)
        return scores.t().contiguous()
