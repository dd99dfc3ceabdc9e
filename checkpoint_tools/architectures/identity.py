"""Whose weights a checkpoint holds: the family, its dimensions, and what config.json said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from checkpoint_tools.architectures.gemma import GEMMA2, GEMMA3
from checkpoint_tools.architectures.llama import LLAMA
from checkpoint_tools.architectures.mistral import MISTRAL
from checkpoint_tools.architectures.mixtral import MIXTRAL
from checkpoint_tools.architectures.qwen2 import QWEN2
from checkpoint_tools.architectures.qwen3 import QWEN3
from checkpoint_tools.architectures.qwen3_moe import QWEN3_MOE
from checkpoint_tools.architectures.table import Architecture, Dimensions, Entry
from foundation.errors import OrthantError, RequestError
from model.config import ModelConfig

ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE, GEMMA2, GEMMA3)
BY_MODEL_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}
MOST_BLOCKS = 1 << 18
"""Layers times experts: several times those of the largest models there are."""


@dataclass(frozen=True)
class Identity:
    """A model without its weights.

    Attributes:
        architecture: its family.
        dimensions: its sizes.
        model: ours; None for families that the decoder cannot run.
        hugging_face: config.json as it came, None where the model never was one of transformers'.
    """

    architecture: Architecture
    dimensions: Dimensions
    model: ModelConfig | None
    hugging_face: Mapping[str, Any] | None = None

    @classmethod
    def from_hugging_face(cls, config: Mapping[str, Any], where: str) -> Identity:
        """From config.json.

        Raises:
            RequestError: a family or a feature that is not converted, or a config that lacks something.
        """
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in BY_MODEL_TYPE:
            raise RequestError(
                f"config.json has model_type = {kind!r}",
                where=where,
                rule=f"is one of {', '.join(BY_MODEL_TYPE)}",
                cure="convert a model of one of these families; a new one is a table in checkpoint_tools/architectures",
            )
        architecture = BY_MODEL_TYPE[kind]
        try:
            dimensions = architecture.dimensions(config)
            model = None if architecture.model is None else architecture.model(config)
        except OrthantError as error:
            raise RequestError(f"{where}: {error}") from error
        except KeyError as error:
            raise RequestError(
                f"config.json lacks {error}", where=where, rule=f"a {kind} has it", cure="complete config.json"
            ) from error
        except (ValidationError, TypeError, ValueError, OverflowError) as error:
            raise RequestError(
                f"config.json describes no {kind}: {error}", where=where, cure="correct config.json"
            ) from error
        return cls(architecture, dimensions, model, dict(config))

    @classmethod
    def from_model(cls, model: ModelConfig) -> Identity:
        """The family whose features `model` has."""
        return cls(family_of(model), Dimensions.of(model), model)

    def config(self, dtype: str) -> dict[str, Any]:
        """config.json for weights of `dtype` (torch's name)."""
        if self.hugging_face is not None:
            config = dict(self.hugging_face)
        elif self.architecture.config is not None and self.model is not None:
            config = self.architecture.config(self.model)
        else:
            raise AssertionError(f"nothing describes a {self.architecture.name}")
        config.pop("torch_dtype", None)
        return config | {"dtype": dtype, "torch_dtype": dtype}

    def entries(self) -> list[Entry]:
        """Every tensor of the model.

        Raises:
            RequestError: a configuration that nothing was ever trained with: their names alone would fill the memory.
        """
        blocks = self.dimensions.num_layers * max(1, self.dimensions.experts)
        if blocks > MOST_BLOCKS:
            raise RequestError(
                f"the configuration has {self.dimensions.num_layers} layers of {self.dimensions.experts} experts",
                rule=f"at most {MOST_BLOCKS} feed-forward blocks in all",
                cure="correct the configuration",
            )
        return list(self.architecture.entries(self.dimensions))


def family_of(model: ModelConfig) -> Architecture:
    """The family that has the features of `model`.

    Raises:
        RequestError: no family that is converted has them together.
    """
    features = (model.num_experts is not None, model.qk_layernorm, model.add_qkv_bias)
    found = {
        (False, False, False): LLAMA if model.window_size is None else MISTRAL,
        (False, False, True): QWEN2,
        (False, True, False): QWEN3,
        (True, False, False): MIXTRAL,
        (True, True, False): QWEN3_MOE,
    }.get(features)
    if found is None or (found is MIXTRAL and model.moe_router_pre_softmax):
        raise RequestError(
            "no family of transformers has this model's features together: "
            f"num_experts={model.num_experts}, qk_layernorm={model.qk_layernorm}, add_qkv_bias={model.add_qkv_bias}, "
            f"moe_router_pre_softmax={model.moe_router_pre_softmax}",
            rule=f"families: {', '.join(BY_MODEL_TYPE)}",
            cure="train a model of one of them, or add a table to checkpoint_tools/architectures",
        )
    return found
