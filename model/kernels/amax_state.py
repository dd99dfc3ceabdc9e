"""What Transformer Engine's layers keep between steps under delayed scaling, as data: scales and histories of amax.

A layer gives it as bytes, a pickle (`get_extra_state` of transformer_engine/pytorch/module/base.py), and reads it back
by unpickling. A pickle is a program, so bytes of a checkpoint never get there: they are read here by a reader that
makes tensors and plain values alone, and a layer is handed bytes that were made anew from those.

Core stores the bytes of a layer once, under the layer's global number, whatever the layout (transformer/utils.py:75);
amax is reduced over all ranks that share a layer, so that they all have the same.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

SUFFIX = "_extra_state"
TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
EXTRA = "extra_fp8_variables"
RECIPES = {
    *(("transformer_engine.common.recipe", name) for name in (
        *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling", "Format"),
        *("_FormatHelper", "_OverrideLinearPrecision", "MMParams", "QParams"))),
    ("megatron.core.extensions.transformer_engine", "TEDelayedScaling"),
}  # fmt: skip
"""Classes that describe a recipe. A run's own config says which recipe it has, so that these are passed over."""


def is_extra_state(name: str) -> bool:
    """Whether an entry of a checkpoint is such a state (or the empty one of a layer that has none).

    That of a norm by itself is called `layer_norm__extra_state`, as its weight is `layer_norm_weight`
    (`model.layer_spec`).
    """
    last = name.partition("/shard_")[0].rpartition(".")[2]
    return last.startswith(SUFFIX) or last.endswith(SUFFIX)


class _PassedOver:
    """In the place of whatever describes a recipe."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


class _Reader(pickle.Unpickler):
    """Every name comes as a new object: what a pickle sets on one reaches nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in RECIPES:
            return type(name, (_PassedOver,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return partial(torch._utils._rebuild_tensor_v2)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return partial(_storage)
        if (module, name) == ("collections", "OrderedDict"):
            return partial(dict)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_state(given: Any) -> dict[str, Any] | None:
    """Scales, histories and plain values of a layer's bytes; None where it has none.

    Args:
        given: what a checkpoint holds for it: None, or uint8 [bytes].

    Raises:
        pickle.UnpicklingError: it holds more than data, or is damaged.
    """
    if given is None or (torch.is_tensor(given) and given.numel() == 0):
        return None
    if not torch.is_tensor(given) or given.dtype != torch.uint8:
        raise pickle.UnpicklingError("it is no row of bytes")
    try:
        loaded = _Reader(io.BytesIO(given.cpu().numpy().tobytes())).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if loaded is None:
        return None
    if not isinstance(loaded, dict):
        raise pickle.UnpicklingError("it is no table of values")
    state: dict[str, Any] = {name: loaded[name] for name in TENSORS if torch.is_tensor(loaded.get(name))}
    extra = loaded.get(EXTRA)
    state[EXTRA] = {key: value for key, value in extra.items() if _is_plain(value)} if isinstance(extra, dict) else {}
    return state


def written_state(state: Mapping[str, Any] | None, recipe: Any = None) -> torch.Tensor:
    """The bytes that a layer takes, of what `read_state` gave; `recipe` is the one of this run."""
    values = None if state is None else {**state, "recipe": recipe}
    return torch.frombuffer(bytearray(pickle.dumps(values)), dtype=torch.uint8)


def made_anew(given: Any, core: Any) -> torch.Tensor:
    """What a layer of this run is handed in the place of a checkpoint's `given`.

    Bytes of a recipe that keeps no history say nothing that the run's config does not; nor do those of another length
    of history, which begins anew then.

    Args:
        core: the run's TransformerConfig.
    """
    state = read_state(given)
    delayed = getattr(core, "fp8", None) is not None and core.fp8_recipe == "delayed"
    if state is None or not delayed or any(name not in state for name in TENSORS):
        return written_state(None)
    if state["amax_history_fwd"].shape[0] != core.fp8_amax_history_len:
        return written_state(None)
    from megatron.core.fp8_utils import get_fp8_recipe

    return written_state(state, get_fp8_recipe(core))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, bool | int | float | str)
