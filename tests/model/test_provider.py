"""Which kernels are chosen, and what the model is built from then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from foundation.errors import ConfigError
from model.config import ModelConfig
from model.kernels.activation import EngineSwiGLU
from model.kernels.attention import TorchAttention
from model.kernels.choice import OPERATIONS, TORCH, Available, KernelChoice, choose_kernels, where_sharded
from model.kernels.norm import RMSNorm
from model.kernels.provider import Provider

CPU = Available(on_gpu=False)
BARE = Available(on_gpu=True)
APEX = Available(on_gpu=True, apex=frozenset(("FusedAdam", "weight-gradient accumulation", "fused norms")))
ENGINE = Available(on_gpu=True, transformer_engine="2.11.0")
EVERYTHING = replace(APEX, transformer_engine="2.11.0+abc")


SIZES = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1}
MODEL = ModelConfig.model_validate(SIZES)


def chosen(here: Available, kernels: str = "auto", **overrides: str) -> KernelChoice:
    return choose_kernels(ModelConfig.model_validate(SIZES | {"kernels": kernels, "kernel_overrides": overrides}), here)


def refusal(here: Available, kernels: str = "auto", **overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        chosen(here, kernels, **overrides)
    return caught.value


def by_library(choice: KernelChoice, library: str | None) -> set[str]:
    return {name for name in OPERATIONS if getattr(choice, name) == library}


def test_a_cpu_computes_everything_with_torch() -> None:
    for here in (CPU, replace(EVERYTHING, on_gpu=False)):
        assert chosen(here) == TORCH
        assert chosen(here, "torch") == TORCH
    assert TORCH.weight_gradient is None


def test_on_a_gpu_the_first_library_that_has_an_operation_computes_it() -> None:
    assert by_library(chosen(BARE), "torch") == set(OPERATIONS)
    assert by_library(chosen(APEX), "apex") == {"norm", "adam", "l2norm", "weight_gradient"}
    for here in (ENGINE, EVERYTHING):
        assert by_library(chosen(here), "transformer_engine") == set(OPERATIONS) - {"cross_entropy"}
    assert chosen(EVERYTHING, "torch") == replace(TORCH, weight_gradient="torch")


def test_apex_without_some_parts_gives_the_others() -> None:
    here = Available(on_gpu=True, apex=frozenset(("FusedAdam",)))
    assert by_library(chosen(here), "apex") == {"adam", "l2norm"}


def test_single_operations_can_be_overridden() -> None:
    choice = chosen(EVERYTHING, attention="torch", norm="apex", adam="torch")
    assert (choice.attention, choice.norm, choice.adam, choice.linear) == ("torch", "apex", "torch",
                                                                           "transformer_engine")  # fmt: skip
    assert chosen(CPU, weight_gradient="torch").weight_gradient == "torch"


def test_gradients_are_added_up_by_the_library_of_the_layers() -> None:
    assert chosen(ENGINE, linear="torch").weight_gradient == "torch"
    assert chosen(EVERYTHING, linear="torch").weight_gradient == "apex"
    wrong = refusal(ENGINE, linear="torch", weight_gradient="transformer_engine")
    assert wrong.field == "model.kernel_overrides.weight_gradient" and wrong.cure


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (BARE, "not installed"),
        (replace(ENGINE, on_gpu=False), "this machine has none"),
        (replace(ENGINE, transformer_engine="2.8.1"), "2.9 or later, and 2.8.1 is installed"),
    ],
)
def test_transformer_engine_that_cannot_be_had_is_refused(here: Available, says: str) -> None:
    wrong = refusal(here, "transformer_engine")
    assert wrong.field == "model.kernels" and says in str(wrong) and "model.kernels=auto" in str(wrong)
    assert chosen(here).linear == "torch"
    assert says in str(refusal(here, attention="transformer_engine"))


def test_apex_by_name_needs_its_part() -> None:
    wrong = refusal(ENGINE, adam="apex")
    assert "FusedAdam" in str(wrong) and "model.kernel_overrides.adam=transformer_engine" in str(wrong)


def test_versions_of_other_shapes() -> None:
    for version in ("2.10.0.dev0+5fdd7bb", "2.9rc1", "unknown", "3.0"):
        assert chosen(replace(ENGINE, transformer_engine=version)).linear == "transformer_engine", version


def test_cut_weights_are_updated_by_torch() -> None:
    whole = chosen(ENGINE)
    assert whole.adam == whole.weight_gradient == "transformer_engine"
    assert where_sharded(whole, MODEL) == replace(whole, adam="torch", weight_gradient=None)
    for name in ("adam", "weight_gradient"):
        asked = ModelConfig.model_validate(SIZES | {"kernel_overrides": {name: "transformer_engine"}})
        with pytest.raises(ConfigError) as caught:
            where_sharded(whole, asked)
        assert caught.value.field == f"model.kernel_overrides.{name}" and "zero_stage=1" in str(caught.value.cure)


def test_a_choice_is_one_line() -> None:
    assert TORCH.describe() == f"torch: {', '.join(OPERATIONS[:-1])}; none: weight_gradient"
    assert chosen(ENGINE).describe().startswith("transformer_engine: linear, norm")


def test_the_torch_provider_builds_ours() -> None:
    provider: Any = Provider(TORCH)
    assert provider.core_attention() is TorchAttention
    assert provider.layer_norm(rms_norm=True) is RMSNorm
    assert provider.layer_norm(rms_norm=True, for_qk=True) is RMSNorm
    assert not provider.fuse_layernorm_and_linear() and provider.column_parallel_layer_norm_linear() is None


class Engine:
    """In the place of core's TESpecProvider."""

    column_parallel_linear = staticmethod(lambda: "column")
    row_parallel_linear = staticmethod(lambda: "row")
    column_parallel_layer_norm_linear = staticmethod(lambda: "norm and column")
    core_attention = staticmethod(lambda: "attention")
    layer_norm = staticmethod(lambda rms_norm, for_qk: "norm")


def provider_of(choice: KernelChoice) -> Any:
    provider: Any = Provider.__new__(Provider)
    provider._kernels, provider._engine, provider._fp8 = choice, Engine(), False
    return provider


def test_transformer_engine_fuses_norm_and_product_where_both_are_its_own() -> None:
    whole = provider_of(chosen(ENGINE))
    assert whole.fuse_layernorm_and_linear() and whole.column_parallel_layer_norm_linear() == "norm and column"
    assert (whole.core_attention(), whole.row_parallel_linear()) == ("attention", "row")
    assert whole.activation_func() is EngineSwiGLU
    mixed = provider_of(chosen(ENGINE, norm="torch", attention="torch"))
    assert not mixed.fuse_layernorm_and_linear() and mixed.column_parallel_layer_norm_linear() is None
    assert (mixed.column_parallel_linear(), mixed.core_attention()) == ("column", TorchAttention)
