"""TRL 1.12.0's PPOTrainer (the last release that has one) on the task of `benchmarks.ppo`.

Run by that in a process of its own, because TRL is in no environment of ours: `python -m benchmarks._ppo_trl JOB.json`
with TRL on PYTHONPATH. Batch, mini-batches, epochs, rates, reward and sizes of the models are ours; its policy is
transformers' Llama.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"}

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

PAD, END = 0, 1


class Rewarded(torch.nn.Module):
    """Looks like a reward model to TRL: hidden states that `score` passes on."""

    base_model_prefix = "backbone"

    def __init__(self, prompt_length: int, symbol: int) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.backbone = lambda input_ids=None, **_: self._hidden(input_ids)
        self._prompt_length, self._symbol = prompt_length, symbol

    def _hidden(self, tokens: Any) -> Any:
        answer = tokens[:, self._prompt_length :]
        score = (answer == self._symbol).sum(1) - 0.05 * (answer != PAD).sum(1)
        return SimpleNamespace(hidden_states=[score[:, None, None].float().expand(-1, tokens.shape[1], 1).contiguous()])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU seconds at the end of each iteration."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.process_time())


def main(path: Path) -> None:
    """Learn as the job of that file says; prints when each step ended, and the policy's size, as JSON."""
    job = json.loads(path.read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = _sizes(job)
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    config.num_labels = 1
    critic = LlamaForSequenceClassification(config)
    prompts = Dataset.from_dict({"input_ids": job["prompts"] * 64})
    clock = Clock()
    trainer = PPOTrainer(
        args=_arguments(job, path.parent / "trl"),
        processing_class=_tokenizer(job["vocab_size"]),
        model=policy,
        ref_model=reference,
        reward_model=Rewarded(len(job["prompts"][0]), 2),
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)),
        callbacks=[clock],
    )
    trainer.train()
    print(json.dumps({"ends": clock.ends, "parameters": policy.num_parameters()}))


def _sizes(job: dict[str, Any]) -> LlamaConfig:
    sizes = job["model"]
    return LlamaConfig(
        vocab_size=job["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        max_position_embeddings=sizes["max_position_embeddings"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A word for each token; nothing is ever encoded with it."""
    words = {"[PAD]": PAD, "[EOS]": END} | {f"s{number}": number for number in range(2, vocab_size)}
    library = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=library, pad_token="[PAD]", eos_token="[EOS]", padding_side="left")


def _arguments(job: dict[str, Any], folder: Path) -> PPOConfig:
    return PPOConfig(
        output_dir=str(folder),
        bf16=False,
        fp16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        num_ppo_epochs=2,
        total_episodes=job["batch"] * job["iterations"],
        response_length=job["max_new_tokens"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        vf_coef=1.0,
        lam=0.95,
        gamma=1.0,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        logging_steps=10**6,
        max_grad_norm=1.0,
        local_rollout_forward_batch_size=job["batch"],
        eval_strategy="no",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
