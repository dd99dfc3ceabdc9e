"""The decoder: embedding, core's transformer block, output layer; one pipeline stage of it.

Parameter names are those of core's GPTModel, whose checkpoints and converters fit. GPTModel itself is not used: it
knows one position pattern, Llama 3's default frequency factors only, and a loss in which padding of the vocabulary
takes part.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from model.config import ModelConfig
from model.dropout_streams import follow_layers
from model.kernels.choice import KernelChoice
from model.kernels.cross_entropy import vocab_parallel_cross_entropy
from model.kernels.provider import Provider, output_linear
from model.layer_spec import block_spec
from model.rotary import RotaryAngles
from model.score_head import ScoreHead
from parallel.layout import ParallelLayout

Head = Literal["tokens", "score"]

NO_PROBABILITY = -1e4
"""Logit of an excluded token: exp is exactly 0 in fp32 and its loss, which a mask of 0 takes out, is finite."""


class Decoder(LanguageModule):  # type: ignore[misc]
    """One pipeline stage (or virtual chunk of one) of a Llama-family decoder.

    Args:
        model: the architecture.
        core: core's config of it at this layout.
        layout: the parallel grid; core's process groups have to be there.
        vocab_size: the true vocabulary.
        kernels: the library of each operation.
        vp_stage: virtual chunk, None without interleaving.
        head: what the last stage ends in: logits of tokens, or a score of each token (`model.score_head`).
        excluded_tokens: have no probability, in logits and in losses alike, such as one that pads.
    """

    def __init__(
        self,
        model: ModelConfig,
        core: TransformerConfig,
        layout: ParallelLayout,
        vocab_size: int,
        kernels: KernelChoice,
        vp_stage: int | None = None,
        head: Head = "tokens",
        excluded_tokens: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(config=core, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
        self.vocab_size, self.vp_stage, self.head = vocab_size, vp_stage, head
        self.model_type = ModelType.encoder_or_decoder  # core's schedules ask
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights and head == "tokens"
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        rows = model.padded_vocab_size(vocab_size, layout.tp)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=core,
                vocab_size=rows,
                max_sequence_length=model.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        self.decoder = TransformerBlock(
            config=core,
            spec=block_spec(core, Provider(kernels), vp_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if self.post_process and head == "score":
            self.score_head = ScoreHead(core, self.pg_collection.tp)
        elif self.post_process:
            self.output_layer = self._output_layer(core, rows)
        if head == "tokens" and (self.pre_process or self.post_process):
            self.setup_embeddings_and_output_layer()
        elif self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        self._excluded_columns = self._own_columns(excluded_tokens, rows // layout.tp)
        if model.hidden_dropout or model.attention_dropout:
            follow_layers(self.decoder.layers)
        self.angles = RotaryAngles(model, torch.device(torch.cuda.current_device()))

    def _output_layer(self, core: TransformerConfig, rows: int) -> ColumnParallelLinear:
        return output_linear()(
            core.hidden_size,
            rows,
            config=core,
            init_method=core.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=self.pg_collection.tp,
        )

    def _own_columns(self, tokens: frozenset[int], width: int) -> torch.Tensor | None:
        """The columns of this rank's logits that stand for `tokens`; None where there are none."""
        first = self.pg_collection.tp.rank() * width
        columns = sorted(token - first for token in tokens if first <= token < first + width)
        return torch.tensor(columns, device=torch.cuda.current_device()) if columns else None

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None]) -> None:
        """What the stage before sent: [s, b, hidden_size]. Called by core's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        loss_mask: torch.Tensor | None = None,
        last_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stage.

        Args:
            tokens: [b, s] int64; every stage gets them, only the first embeds them. Packed: [1, t].
            position_ids: [b, s] int64; None where they are 0..s-1.
            labels: [b, s] int64, for the last stage.
            packed_seq_params: lengths of the documents in [1, t], which attend only within themselves.
            loss_mask: [b, s], for routers: tokens whose loss counts; only they take part in the losses of routers.
                None: all. The token losses that come back are not masked.
            last_tokens: [n] int64, places in a single row [1, s]: only their logits are wanted, [1, n, width], and no
                gradients.

        Returns:
            Hidden states [s, b, hidden_size] before the last stage; there the loss of each token [b, s] in fp32, or
            without labels the logits of this rank's vocabulary entries [b, s, width]. With a score head the score of
            each token, [b, s] in fp32.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=position_ids)  # [s, b, h]
        angles = self.angles.consecutive(tokens.shape[1]) if position_ids is None else self.angles.at(position_ids)
        output: torch.Tensor = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=packed_seq_params,
            padding_mask=self._not_counted(loss_mask),
        )
        if not self.post_process:
            return output
        if self.head == "score":
            scores: torch.Tensor = self.score_head(output)
            return scores
        logits = self._logits(output, last_tokens)
        if self._excluded_columns is not None:
            logits = logits.index_fill(-1, self._excluded_columns, NO_PROBABILITY)
        if labels is None:
            return logits.transpose(0, 1)
        # Labels are turned, not logits: those would be copied, forward and backward.
        losses = vocab_parallel_cross_entropy(logits, labels.t(), self.vocab_size, self.pg_collection.tp)  # [s, b]
        return losses.t()

    def _logits(self, hidden: torch.Tensor, last_tokens: torch.Tensor | None) -> torch.Tensor:
        """[s or its share, b, h] -> [s, b, width], or [n, b, width] of `last_tokens`."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        cut = self.output_layer.sequence_parallel
        if last_tokens is not None and cut:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        try:
            self.output_layer.sequence_parallel = cut and last_tokens is None
            logits: torch.Tensor = self.output_layer(hidden if last_tokens is None else hidden[last_tokens], weight)[0]
        finally:
            self.output_layer.sequence_parallel = cut
        return logits

    def _not_counted(self, loss_mask: torch.Tensor | None) -> torch.Tensor | None:
        """[b, s of this tensor-parallel rank] bool as core hands it to routers; None where there are none."""
        if loss_mask is None or self.config.num_moe_experts is None:
            return None
        not_counted = loss_mask == 0
        if not self.config.sequence_parallel:
            return not_counted
        group = self.pg_collection.tp
        share: torch.Tensor = not_counted.chunk(group.size(), dim=1)[group.rank()]
        return share

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Core's description of the parameters for distributed checkpoints; the output layer has no extra state."""
        if self.head == "score":  # LanguageModule's own asks for an output layer
            scored: dict[str, Any] = MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
            return scored
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


def build_decoder_chunks(
    model: ModelConfig,
    core: TransformerConfig,
    layout: ParallelLayout,
    vocab_size: int,
    kernels: KernelChoice,
    head: Head = "tokens",
    excluded_tokens: frozenset[int] = frozenset(),
) -> list[Decoder]:
    """The virtual chunks of this rank's stage (one without interleaving), uninitialised."""
    stages = [None] if layout.virtual_pipeline_model_parallel_size is None else list(range(layout.vpp))
    return [Decoder(model, core, layout, vocab_size, kernels, stage, head, excluded_tokens) for stage in stages]
