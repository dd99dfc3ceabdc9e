"""Llama 2, 3 and 3.1: the table that most families share, and their config.json."""

from __future__ import annotations

from checkpoint_tools.architectures.hugging_face_config import config_of, dimensions_of, model_of
from checkpoint_tools.architectures.table import Architecture, Row

EMBEDDING = Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"), split=0)
FINAL_NORM = Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",))
OUTPUT = Row("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"), split=0, only_untied=True)

CORE = "decoder.layers.{layer}."
THEIRS = "model.layers.{layer}."
QKV = tuple(f"{THEIRS}self_attn.{one}_proj" for one in "qkv")

INPUT_NORM = Row(
    f"{CORE}self_attention.linear_qkv.layer_norm_weight", (f"{THEIRS}input_layernorm.weight",), ("hidden",)
)
QKV_WEIGHT = Row(
    f"{CORE}self_attention.linear_qkv.weight",
    tuple(f"{one}.weight" for one in QKV),
    ("qkv", "hidden"),
    join="query_groups",
    split=0,
)
PROJ = Row(
    f"{CORE}self_attention.linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",), ("hidden", "queries"), split=1
)
ATTENTION = (INPUT_NORM, QKV_WEIGHT, PROJ)

FC1 = Row(
    f"{CORE}mlp.linear_fc1.weight",
    (f"{THEIRS}mlp.gate_proj.weight", f"{THEIRS}mlp.up_proj.weight"),
    ("gate_up", "hidden"),
    join="halves",
    split=0,
)
FC2 = Row(f"{CORE}mlp.linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",), ("hidden", "ffn"), split=1)
MLP = (
    Row(f"{CORE}mlp.linear_fc1.layer_norm_weight", (f"{THEIRS}post_attention_layernorm.weight",), ("hidden",)),
    FC1,
    FC2,
)

LLAMA = Architecture(
    name="llama",
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    rows=(EMBEDDING, *ATTENTION, *MLP, FINAL_NORM, OUTPUT),
    dimensions=dimensions_of(model_of()),
    model=model_of(),
    config=config_of("llama", "LlamaForCausalLM"),
)
