"""AdamW behind the contract of apex's and Transformer Engine's FusedAdam, on torch's fused kernel.

Core's distributed optimizer and its resharding checkpoints want `step` in the parameter group, never in a
parameter's state (torch's own AdamW keeps it there and so cannot be resharded). Used where neither Transformer Engine
nor apex is installed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) with decoupled weight decay (Loshchilov & Hutter 2019) when `adam_w_mode`.

    State of a parameter: `exp_avg` and `exp_avg_sq`, of its shape and dtype. State of a group: `step`, an int.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._update = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    def initialize_state(self, parameter: torch.Tensor) -> None:
        """Give `parameter` zero moments."""
        self.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is refused: a step never evaluates the model again."""
        if closure is not None:
            raise TypeError("FusedAdam.step takes no closure")
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
                for parameters in self._with_gradients_by_dtype(group["params"]):
                    self._update_alike(parameters, group)

    def _with_gradients_by_dtype(self, parameters: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        alike: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is not None and parameter.numel():
                alike[parameter.dtype].append(parameter)
        return list(alike.values())

    def _update_alike(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "exp_avg" not in self.state[parameter]:
                self.initialize_state(parameter)
        states = [self.state[parameter] for parameter in parameters]
        step = torch.tensor(float(group["step"]), device=parameters[0].device)
        beta1, beta2 = group["betas"]
        self._update(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(parameters),
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
