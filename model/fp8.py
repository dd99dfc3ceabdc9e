"""The `training.fp8` section: how FP8 matrix products are scaled, and what a chip has to have for it. No torch.

Recipes (Micikevicius et al. 2022, arXiv 2209.05433; NVIDIA Transformer Engine's names in megatron-core's config):
current is core's "tensorwise", the others keep their names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from foundation.errors import ConfigError
from foundation.section import Section

Count = Annotated[int, Field(strict=True, ge=0)]
Size = Annotated[int, Field(strict=True, ge=1)]
Flag = Annotated[bool, Field(strict=True)]
Recipe = Literal["current", "delayed", "blockwise", "mxfp8"]

SINCE: dict[Recipe, tuple[int, int]] = {"current": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The first compute capability whose matrix units have what a recipe needs (8.9 Ada, 9.0 Hopper, 10.0 Blackwell)."""
NOT_ON: dict[Recipe, tuple[int, int]] = {"mxfp8": (12, 0)}
"""From here on Transformer Engine 2.11 has no kernels for it (consumer Blackwell)."""
MULTIPLE: dict[Recipe, int] = {"current": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
"""What sides of a product are multiples of: cuBLAS asks for 16; blocks of 128 x 128 or 1 x 32 come out whole."""
OF_DELAYED = ("margin", "amax_history_len", "amax_compute_algo", "wgrad")


class Fp8Config(Section):
    """FP8 under `training.precision fp8`; without it this section is not looked at."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: e4m3 forward and e5m2, of a wider range, for gradients. e4m3: everywhere."""

    recipe: Recipe = "current"
    """current: one scale a tensor, from its own largest value. delayed: from the largest values of steps before.
    blockwise: one scale for 1 x 128 or 128 x 128 values (Hopper and later). mxfp8: for 32 (Blackwell). torch's kernels
    have current alone; the others are Transformer Engine's."""

    margin: Count = 0
    """delayed: the scale is halved so many times."""

    amax_history_len: Size = 1024
    """delayed: steps whose largest values are kept; they are in checkpoints."""

    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """delayed: which of them scales."""

    wgrad: Flag = True
    """delayed: gradients of weights in FP8 too."""

    first_last_layers_bf16: Flag = False
    """The first and the last layers are computed in BF16; not with recipe delayed."""

    num_layers_at_start_in_bf16: Count = 1
    """How many, with first_last_layers_bf16."""

    num_layers_at_end_in_bf16: Count = 1
    """How many, with first_last_layers_bf16."""

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        if self.recipe == "delayed" and self.first_last_layers_bf16:
            raise ConfigError(
                "training.fp8.first_last_layers_bf16",
                True,
                rule="does not go with training.fp8.recipe delayed, whose history is kept for all layers at once",
                cure="training.fp8.recipe=current, or training.fp8.first_last_layers_bf16=false",
            )
        for name in OF_DELAYED:
            if self.recipe != "delayed" and getattr(self, name) != Fp8Config.model_fields[name].default:
                raise ConfigError(
                    f"training.fp8.{name}",
                    getattr(self, name),
                    rule=f"belongs to training.fp8.recipe delayed, and the recipe is {self.recipe}",
                    cure=f"training.fp8.recipe=delayed, or no training.fp8.{name}",
                )
        return self

    def in_bf16(self, layer: int, num_layers: int) -> bool:
        """Whether global layer `layer` (from 0) of `num_layers` is computed in BF16."""
        start, end = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        return self.first_last_layers_bf16 and (layer < start or layer >= num_layers - end)

    def core_fields(self) -> dict[str, Any]:
        """The same in the fields of core's TransformerConfig; core and Transformer Engine do the rest."""
        return {
            "fp8": self.format,
            "fp8_recipe": "tensorwise" if self.recipe == "current" else self.recipe,
            "fp8_margin": self.margin,
            "fp8_amax_history_len": self.amax_history_len,
            "fp8_amax_compute_algo": self.amax_compute_algo,
            "fp8_wgrad": self.wgrad,
            "first_last_layers_bf16": self.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
        }


CURRENT = Fp8Config()
"""The default."""


def check_chip(recipe: Recipe, capability: tuple[int, int]) -> None:
    """Refuse a chip of compute capability `capability` that lacks what `recipe` needs.

    Raises:
        ConfigError: with a recipe that it has, or BF16.
    """
    if SINCE[recipe] <= capability < NOT_ON.get(recipe, (99, 0)):
        return
    works = [name for name in SINCE if SINCE[name] <= capability < NOT_ON.get(name, (99, 0))]
    shown, least = (".".join(map(str, pair)) for pair in (capability, SINCE[recipe]))
    until = f" and below {NOT_ON[recipe][0]}.{NOT_ON[recipe][1]}" if recipe in NOT_ON else ""
    field, value = ("training.fp8.recipe", recipe) if works else ("training.precision", "fp8")
    raise ConfigError(
        field,
        value,
        rule=f"needs a GPU of compute capability {least} or later{until}, and the one here has {shown}",
        cure=f"training.fp8.recipe={works[0]}" if works else "training.precision=bf16",
    )


def check_bf16_layers(fp8: Fp8Config, num_layers: int, stages: int) -> None:
    """Core takes at most one pipeline stage's layers at each end.

    Raises:
        ConfigError: more are asked for, or none is left in FP8.
    """
    if not fp8.first_last_layers_bf16:
        return
    most = num_layers // stages
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(fp8, name) > most:
            raise ConfigError(
                f"training.fp8.{name}",
                getattr(fp8, name),
                rule=f"is at most the layers of one pipeline stage, {most}",
                cure=f"training.fp8.{name}={min(1, most)}",
            )
    if fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 >= num_layers:
        raise ConfigError(
            "training.fp8.first_last_layers_bf16",
            True,
            rule=f"leaves none of the {num_layers} layers in FP8",
            cure="training.precision=bf16, or training.fp8.first_last_layers_bf16=false",
        )
