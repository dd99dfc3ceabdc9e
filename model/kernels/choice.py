"""Which library computes which operation: chosen once, frozen, printable. Imports no torch.

Per operation the order is Transformer Engine, NVIDIA apex, torch: the first that is here and has the operation. On a
CPU everything is torch's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from foundation.errors import ConfigError
from foundation.libraries import apex_parts, transformer_engine_version

if TYPE_CHECKING:
    from model.config import ModelConfig

Library = Literal["transformer_engine", "apex", "torch"]

LEAST_TRANSFORMER_ENGINE = (2, 9)
"""megatron-core 0.16.1 was made for 2.9 and later ones below 2.12."""

APEX_HAS = {"norm": "fused norms", "adam": "FusedAdam", "l2norm": "FusedAdam",
            "weight_gradient": "weight-gradient accumulation"}  # fmt: skip
"""The part of apex that an operation is in; its other operations are not megatron-core's to use."""

ONLY_TORCH = ("cross_entropy",)
"""Transformer Engine's cross-entropy gives entries that only pad the vocabulary a probability, so that the loss would
depend on the layout."""


@dataclass(frozen=True)
class Available:
    """What this process could use.

    Attributes:
        on_gpu: whether an NVIDIA GPU is here.
        transformer_engine: its version, None where it is not installed.
        apex: parts of NVIDIA's apex that are built (`foundation.libraries.APEX_PARTS`).
    """

    on_gpu: bool
    transformer_engine: str | None = None
    apex: frozenset[str] = frozenset()

    @classmethod
    def here(cls, *, on_gpu: bool) -> Available:
        """Of this machine; nothing is imported."""
        return cls(on_gpu, transformer_engine_version(), apex_parts())

    def lacking(self, operation: str, library: Library) -> str | None:
        """What `library` would need for `operation` and is not here; None where it can compute it."""
        if library == "torch":
            return None
        if operation in ONLY_TORCH:
            return f"a {operation} that leaves out what pads the vocabulary, which only torch has here"
        lacking = self._lacking_apex(operation) if library == "apex" else self._lacking_transformer_engine()
        if lacking is None and not self.on_gpu:
            return "an NVIDIA GPU, and this machine has none"
        return lacking

    def _lacking_apex(self, operation: str) -> str | None:
        part = APEX_HAS.get(operation)
        if part is None:
            return f"a {operation} in apex, which has none that megatron-core's layers can use"
        return None if part in self.apex else f"NVIDIA's apex built with {part}, which is not installed"

    def _lacking_transformer_engine(self) -> str | None:
        if self.transformer_engine is None:
            return "the package transformer_engine, which is not installed"
        if self.transformer_engine != "unknown" and _release(self.transformer_engine) < LEAST_TRANSFORMER_ENGINE:
            least = ".".join(map(str, LEAST_TRANSFORMER_ENGINE))
            return f"transformer_engine {least} or later, and {self.transformer_engine} is installed"
        return None


@dataclass(frozen=True)
class KernelChoice:
    """The library of each operation.

    Attributes:
        linear: matrix products of the layers. norm: RMSNorm; with both from Transformer Engine they are one module.
        attention, rope, swiglu, cross_entropy: what their names say.
        adam, l2norm: the optimizer's update and the norm of gradients.
        weight_gradient: who adds a weight's gradient into the fp32 sum inside its matrix product; None: nobody, the
            product is written out and added after.
    """

    linear: Library = "torch"
    norm: Library = "torch"
    attention: Library = "torch"
    rope: Library = "torch"
    swiglu: Library = "torch"
    cross_entropy: Library = "torch"
    adam: Library = "torch"
    l2norm: Library = "torch"
    weight_gradient: Library | None = None

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether its linear layers are the model's: they alone compute in all of its FP8 recipes."""
        return self.linear == "transformer_engine"

    def describe(self) -> str:
        """One line: `transformer_engine: linear, norm; torch: cross_entropy ...`."""
        by_library: dict[str, list[str]] = {}
        for field in fields(self):
            by_library.setdefault(getattr(self, field.name) or "none", []).append(field.name)
        return "; ".join(f"{library}: {', '.join(names)}" for library, names in by_library.items())


OPERATIONS = tuple(field.name for field in fields(KernelChoice))
TORCH = KernelChoice()
"""What every CPU run computes with."""


def choose_kernels(model: ModelConfig, here: Available) -> KernelChoice:
    """Resolve `model.kernels` and `model.kernel_overrides`.

    Raises:
        ConfigError: a library is asked for by name and cannot compute the operation here.
    """
    if model.kernels == "transformer_engine" and (lacking := here.lacking("linear", "transformer_engine")):
        raise ConfigError("model.kernels", "transformer_engine", rule=f"needs {lacking}", cure="model.kernels=auto")
    chosen: dict[str, Any] = {name: _first(name, model.kernels, here) for name in OPERATIONS}
    for name in OPERATIONS:
        asked = getattr(model.kernel_overrides, name)
        if asked is None:
            continue
        if lacking := here.lacking(name, asked):
            raise ConfigError(
                f"model.kernel_overrides.{name}",
                asked,
                rule=f"needs {lacking}",
                cure=f"model.kernel_overrides.{name}={chosen[name] or 'torch'}",
            )
        chosen[name] = asked
    return _with_possible_accumulation(KernelChoice(**chosen), model, here)


def where_sharded(choice: KernelChoice, model: ModelConfig) -> KernelChoice:
    """`choice` for weights that are cut over replicas (ZeRO-2 and 3): torch's AdamW, gradients outside of products.

    Transformer Engine's Adam gives a cut weight moments of its whole shape (fused_adam.py:376), and core's layers write
    BF16 products into Megatron-FSDP's fp32 gradients, which torch refuses (tensor_parallel/layers.py:566).

    Raises:
        ConfigError: another one is asked for by name.
    """
    for name, fits in (("adam", "torch"), ("weight_gradient", None)):
        asked = getattr(model.kernel_overrides, name)
        if asked not in (None, fits):
            raise ConfigError(
                f"model.kernel_overrides.{name}",
                asked,
                rule="does not know weights that are cut over replicas, as parallel.zero_stage 2 and 3 cut them",
                cure=f"leave model.kernel_overrides.{name} out, or parallel.zero_stage=1",
            )
    return replace(choice, adam="torch", weight_gradient=None)


def _first(operation: str, default: str, here: Available) -> Library | None:
    if operation == "weight_gradient" and not here.on_gpu:
        return None  # a CPU gains nothing, and unfused gradients are what everything else is held against
    order: tuple[Library, ...] = ("torch",) if default == "torch" else ("transformer_engine", "apex", "torch")
    return next(library for library in order if here.lacking(operation, library) is None)


def _with_possible_accumulation(choice: KernelChoice, model: ModelConfig, here: Available) -> KernelChoice:
    """Transformer Engine adds up gradients inside its own linear layers alone, and they do in theirs."""
    asked = model.kernel_overrides.weight_gradient
    if choice.weight_gradient == "transformer_engine" and not choice.uses_transformer_engine:
        if asked is not None:
            raise ConfigError(
                "model.kernel_overrides.weight_gradient",
                asked,
                rule="belongs to Transformer Engine's linear layers, and the model's are torch's",
                cure="model.kernel_overrides.weight_gradient=torch",
            )
        own: Library = "torch" if here.lacking("weight_gradient", "apex") else "apex"
        return replace(choice, weight_gradient=own)
    return choice


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)
