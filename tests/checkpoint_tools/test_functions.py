"""What a checkpoint's configuration says beside names and shapes: weights that compute something else are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.architectures.identity import Identity
from checkpoint_tools.dtypes import BF16
from checkpoint_tools.formats.megatron_arguments import arguments_of, identity_from_arguments
from checkpoint_tools.formats.rank_cuts import ONE_RANK
from foundation.errors import RequestError
from model.config import ModelConfig

MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "vocab_size": 131,
    "layernorm_epsilon": 1e-6,
}


def arguments(**more: Any) -> dict[str, Any]:
    """Megatron-LM's, of a model that is converted."""
    identity = Identity.from_model(ModelConfig.model_validate({**MODEL, **more}))
    return arguments_of(identity, ONE_RANK, 256, BF16)


@pytest.mark.parametrize(
    ("name", "usual", "other"),
    [
        ("apply_layernorm_1p", False, True),
        ("rotary_interleaved", False, True),
        ("rotary_percent", 1, 0.5),
        ("rotary_seq_len_interpolation_factor", None, 2),
        ("no_rope_freq", None, 4),
        ("window_attn_skip_freq", None, 2),
        ("softmax_type", "vanilla", "learnable"),
        ("qk_l2_norm", False, True),
        ("moe_router_score_function", "softmax", "sigmoid"),
        ("moe_router_topk_scaling_factor", 1.0, 2.5),
        ("moe_router_group_topk", None, 4),
    ],
)
def test_arguments_that_change_the_function(name: str, usual: Any, other: Any) -> None:
    """They leave no trace in names and shapes: the model would be converted, and compute something else."""
    same = identity_from_arguments({**arguments(), name: usual}, None, Path("ranks"))
    assert same.model == ModelConfig.model_validate(MODEL)
    with pytest.raises(RequestError, match=f"trained with {name} = "):
        identity_from_arguments({**arguments(), name: other}, None, Path("ranks"))


def test_the_epsilon_under_either_name() -> None:
    """Megatron-LM's argument is called norm_epsilon, core's field layernorm_epsilon."""
    given = arguments()
    given["layernorm_epsilon"] = given.pop("norm_epsilon")
    assert identity_from_arguments(given, None, Path("ranks")).model == ModelConfig.model_validate(MODEL)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3"])
def test_what_a_config_leaves_out_is_the_familys_own(family: str) -> None:
    """A config.json may leave out what transformers' class has a default for."""
    import transformers

    theirs = getattr(transformers, f"{family}Config")()
    needed = (
        *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "num_local_experts", "num_experts_per_tok"),
    )
    config = {name: value for name in needed if (value := getattr(theirs, name, None)) is not None}
    model = Identity.from_hugging_face(config, "config.json").model
    assert model is not None
    window = getattr(theirs, "sliding_window", None) if getattr(theirs, "use_sliding_window", True) else None
    assert (model.rotary_base, model.window_size) == (theirs.rope_parameters["rope_theta"], window)
    assert model.share_embeddings_and_output_weights == theirs.tie_word_embeddings
