"""The router of a mixture of experts: core's choice of experts, with losses that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):  # type: ignore[misc]
    """Chooses experts as core's `TopKRouter` does; scales its two losses for a main loss that is a sum over tokens.

    Gradients are divided by the tokens of the whole batch at the end (`calculate_per_token_loss`), so a loss that is
    to be a mean has to enter as a sum over tokens. Core 0.16.1 multiplies both losses by the tokens of *one rank*
    (router.py:465 and 497), which weakens them by the tensor ranks (under sequence parallelism) times the context
    ranks. (Load balancing with a padding mask escapes it by an accident: its all-reduce writes into the counts that
    moe_utils.py:228 sums up afterwards.) Here both are sums over tokens:

    - load balancing: for each micro-batch, num_experts x sum over experts of (share of choices) x (mean probability),
      over the tokens of all tensor- and context-parallel ranks (arXiv 2101.03961), times those tokens;
    - z-loss: logsumexp(logits) ** 2 of each token (arXiv 2202.08906).

    Divided by the tokens of the batch, the first becomes the mean over micro-batches weighted by their tokens, the
    second the mean over tokens. It depends on the cut into micro-batches, as in core, and on nothing else.

    Tokens are those that count in the main loss: `padding_mask` is True where one does not. The others are routed and
    computed as well; they take part in neither loss.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._sums: dict[str, torch.Tensor] = {}  # of this rank's tokens since `take_sums`

    def _apply_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Attach the gradient of this rank's part of the load-balancing loss to `probs`.

        Args:
            probs: [t, experts], t being this rank's tokens.
            scores_for_aux_loss: [t, experts] fp32, softmax over all experts; 0 for tokens that do not count.
            routing_map: [t, experts] bool, False for tokens that do not count.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        chosen = reduce_from_tensor_model_parallel_region(routing_map.sum(dim=0), self.tp_cp_group)  # [experts]
        share = chosen / chosen.sum().clamp(min=1)  # no token may count
        balance = self.num_experts * (scores_for_aux_loss.sum(dim=0) * share).sum()
        self._add("load balancing", balance)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(probs, coefficient * balance)
        return attached

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the gradient of the z-loss of this rank's tokens to `logits` [t, experts]."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not self.training or not torch.is_grad_enabled():
            return logits
        squares = torch.logsumexp(logits.float(), dim=-1).square()
        if padding_mask is not None:
            squares = squares.masked_fill(padding_mask, 0.0)
        total = squares.sum()
        self._add("z", total)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(logits, coefficient * total)
        return attached

    def _add(self, loss: str, value: torch.Tensor) -> None:
        self._sums[loss] = self._sums.get(loss, torch.zeros_like(value)) + value.detach()

    def take_sums(self) -> torch.Tensor:
        """[load balancing, z-loss] in fp64, summed over this rank's tokens since the last call, without weights."""
        nothing = torch.zeros(())
        taken = [self._sums.pop(loss, nothing).double().cpu() for loss in ("load balancing", "z")]
        return torch.stack(taken)


def take_router_sums(chunks: Iterable[torch.nn.Module]) -> torch.Tensor | None:
    """`Router.take_sums` of all layers of this rank's chunks together; None where no layer has a router."""
    sums = [module.take_sums() for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    return torch.stack(sums).sum(dim=0) if sums else None
