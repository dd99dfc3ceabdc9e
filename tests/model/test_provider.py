"""Which kernels are chosen."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from typing import Any

import pytest

from foundation.errors import ConfigError
from model.kernels.attention import TorchAttention
from model.kernels.norm import RMSNorm
from model.kernels.provider import choose_kernels, kernel_provider, transformer_engine_is_here


@pytest.fixture
def with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where the package can be found; it is never imported."""
    find = importlib.util.find_spec

    def found(name: str, *args: Any) -> Any:
        return importlib.machinery.ModuleSpec(name, None) if name == "transformer_engine" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", found)


@pytest.fixture
def without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "transformer_engine" else find(name, *args)
    )


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "chosen"),
    [
        ("auto", True, "transformer_engine"),
        ("auto", False, "torch"),
        ("torch", True, "torch"),
        ("torch", False, "torch"),
        ("transformer_engine", True, "transformer_engine"),
    ],
)
@pytest.mark.usefixtures("with_transformer_engine")
def test_choice_where_transformer_engine_is(wanted: str, on_gpu: bool, chosen: str) -> None:
    assert transformer_engine_is_here()
    assert choose_kernels(wanted, on_gpu=on_gpu) == chosen


@pytest.mark.usefixtures("with_transformer_engine")
def test_transformer_engine_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU") as caught:
        choose_kernels("transformer_engine", on_gpu=False)
    assert "model.kernels=torch" in str(caught.value)


@pytest.mark.usefixtures("without_transformer_engine")
def test_choice_where_it_is_not() -> None:
    assert choose_kernels("auto", on_gpu=True) == "torch"
    with pytest.raises(ConfigError, match="needs the package transformer-engine"):
        choose_kernels("transformer_engine", on_gpu=True)


def test_the_torch_provider_builds_ours() -> None:
    provider: Any = kernel_provider("torch")
    assert provider.core_attention() is TorchAttention
    assert provider.layer_norm(rms_norm=True) is RMSNorm
    assert provider.layer_norm(rms_norm=True, for_qk=True) is RMSNorm
    assert not provider.fuse_layernorm_and_linear()
