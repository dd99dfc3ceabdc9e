"""The sections of post-training: `init`, `data` of instruction and preference sets, `reward`, `dpo`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from foundation.section import Section, UserPath

Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Size = Annotated[int, Field(strict=True, ge=1)]


class InitSection(Section):
    """Where the weights come from."""

    checkpoint: UserPath = Field(examples=["runs/demo"])
    """A checkpoint of ours, a run's folder, or a Hugging Face model's folder, which is converted into the run's folder
    first. Architecture, vocabulary and tokenizer are the checkpoint's."""


class ExamplesConfig(Section):
    """What instruction and preference sets have in common."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), folders of them, or a folder written by save_to_disk of
    `datasets`."""

    validation_sources: tuple[str, ...] = ()
    """The same, to evaluate on. Empty: `validation_fraction` of the examples is held out."""

    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the examples held out where `validation_sources` is empty."""

    chat_template: str | None = None
    """Jinja, a file of it, `chatml`, or the name of one of the tokenizer's templates. None: the one that the checkpoint
    was trained with, else the tokenizer's own; rows with messages need one."""

    strict: Flag = False
    """Refuse the set for one bad row, in place of leaving that row out."""


class InstructionDataConfig(ExamplesConfig):
    """Instruction sets: rows {"messages": [...]} or {"prompt": ..., "completion": ...}; the loss is on answers."""

    packing: Flag = True
    """Several examples in one row of training.seq_length tokens, each seeing itself alone. false: one in a row."""


class PreferenceDataConfig(ExamplesConfig):
    """Preference sets: rows {"prompt": ..., "chosen": ..., "rejected": ...}; training.global_batch_size and
    training.micro_batch_size count pairs."""


class RewardSection(Section):
    """The reward model."""

    normalisation_pairs: Size = 4096
    """Pairs at most whose scores give the mean and standard deviation that are stored with the model."""


class DpoSection(Section):
    """Direct preference optimisation (arXiv 2305.18290)."""

    beta: Positive = 0.1
    """How hard the policy is held to the reference: the optimum is reference x exp(reward / beta)."""

    label_smoothing: Annotated[float, Field(strict=True, ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong ("conservative" DPO)."""

    reference: UserPath | None = None
    """A checkpoint of ours whose log-probabilities are the reference's. None: the one that training begins with. They
    are computed once, before the first step, at the run's layout, and kept beside the run: once it has saved, it stays
    with its reference, which need not be there any more."""
