"""The sections of PPO: `ppo`, `critic`, `reward`, `reference`, `generation`, `placement`."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from alignment.config import ExamplesConfig, Flag, Positive, Size
from foundation.errors import ConfigError
from foundation.section import Section, UserPath
from parallel.config import ParallelConfig
from training.config import NotNegative, OptimizerConfig

Role = Literal["actor", "generation", "critic", "reference", "reward"]
ROLES: tuple[Role, ...] = get_args(Role)
AlgorithmName = Literal["ppo", "grpo"]
LossOver = Literal["tokens", "answers"]
ROLES_OF: dict[AlgorithmName, tuple[Role, ...]] = {
    "ppo": ROLES,
    "grpo": ("actor", "generation", "reference", "reward"),
}
"""The roles of each algorithm."""
FOREIGN: dict[AlgorithmName, tuple[str, ...]] = {
    "ppo": ("divide_by_deviation", "kl_clamp"),
    "grpo": ("gamma", "gae_lambda", "value_clip_range", "kl_target", "kl_horizon", "whiten_advantages"),
}
"""Settings of the section `ppo` that an algorithm has no use for."""
Share = Annotated[float, Field(strict=True, ge=0, le=1)]


class PromptDataConfig(ExamplesConfig):
    """Prompts: rows {"prompt": text} or {"messages": [...]}, which end before an assistant's turn."""

    @model_validator(mode="after")
    def _nothing_is_held_out(self) -> Self:
        if self.validation_sources or self.validation_fraction:
            field = "validation_sources" if self.validation_sources else "validation_fraction"
            raise ConfigError(
                f"data.{field}",
                getattr(self, field),
                rule="is for losses on held-out examples, and PPO is judged by its rewards",
                cure="data.validation_sources=[] data.validation_fraction=0",
            )
        return self


class PpoSection(Section):
    """The algorithm: PPO (arXiv 1707.06347, with the KL penalty in the reward of arXiv 1909.08593) or GRPO
    (arXiv 2402.03300).

    training.train_steps counts iterations, training.global_batch_size the answers of one.
    """

    algorithm: AlgorithmName = "ppo"
    """ppo: a critic estimates what an answer is worth. grpo: there is none; an answer is worth what its score is above
    those of the other answers to its prompt, and the distance from the reference is in the loss."""

    max_new_tokens: Size = Field(examples=[256])
    """Tokens of an answer at most, its end included. Prompts get what training.seq_length leaves."""

    group_size: Size = 32
    """Answers that are generated, judged and passed on together, whosever they are."""

    answers_per_prompt: Size = 1
    """Answers to each prompt of an iteration: GRPO's group, 2 or more there."""

    divide_by_deviation: Flag = True
    """GRPO: advantages are divided by the standard deviation of the prompt's scores. false: they are not, and no
    prompt weighs more because its scores are near each other (Dr. GRPO, arXiv 2503.20783)."""

    epochs: Size = 2
    """Passes over the answers of an iteration."""

    mini_batches: Size = 4
    """Optimizer steps in one pass."""

    temperature: Positive = 1.0
    """Of sampling, and of every log-probability. Answers are drawn from the whole distribution: top_k and top_p would
    make them another one's than the one that learns."""

    gamma: Share = 1.0
    """PPO: discount of later rewards."""

    gae_lambda: Share = 0.95
    """PPO: of generalised advantage estimation (arXiv 1506.02438)."""

    clip_range: Positive = 0.2
    """How far the ratio of probabilities may leave 1 before a token stops pulling."""

    clip_range_high: Positive | None = None
    """How far it may do so upwards (DAPO, arXiv 2503.14476, takes 0.28 beside 0.2). None: as far as downwards."""

    loss_over: LossOver = "tokens"
    """What the policy's loss is a mean over: the tokens of a mini-batch, or its answers, each the mean of its own
    tokens, so that one of a long answer weighs less (as GRPO was published)."""

    value_clip_range: Positive | None = 0.2
    """PPO: how far a value may leave the old one likewise. None: not held."""

    kl_coefficient: NotNegative = 0.05
    """PPO: reward lost for one nat of KL from the reference; the best policy is reference x exp(reward /
    kl_coefficient). GRPO: what k3, an estimate of the KL of a token, weighs in the loss."""

    kl_clamp: Positive | None = None
    """GRPO: what k3 of a token is held to in the loss, as verl and OpenRLHF do with 10; a token beyond it is not drawn
    back to the reference any more. None: as it comes, as published and in TRL."""

    kl_target: Positive | None = None
    """PPO: nats that an answer should be from the reference: the coefficient then adapts. None: it stays."""

    kl_horizon: Size = 10_000
    """PPO: answers over which an error of 100 % would change the coefficient by as much."""

    entropy_coefficient: NotNegative = 0.0
    """Weight of the policy's entropy in its loss."""

    stop_kl: Positive | None = None
    """Nats a token by which a mini-batch may find the policy away from where the iteration began; beyond that the
    actor learns no more from these answers. None: no such limit."""

    whiten_advantages: Flag = True
    """PPO: give advantages mean 0 and deviation 1 over the tokens of the whole batch."""

    missing_end_penalty: NotNegative = 0.0
    """Taken from the score of an answer that no stop token ended."""

    score_clip: Positive | None = None
    """Scores are held within +- this. None: as they come."""

    staleness: Literal[0, 1] = 0
    """Updates that the weights which sample may be behind those that learn. 1: the next answers are generated while
    this iteration learns, with the decoupled loss (arXiv 2110.00641)."""

    behaviour_weight_cap: Annotated[float, Field(strict=True, ge=1, allow_inf_nan=False)] = 5.0
    """Largest weight of a token that older weights sampled; 1 or more, the weight of one that has not changed."""

    max_generation_mismatch: Positive | None = None
    """Nats by which a token's log-probability may differ between generation and training at staleness 0. None: 0.001 in
    fp32, no limit in bf16 and fp8, whose kernels round more than that."""

    padding_token: str | None = None
    """A token that has no probability, in sampling and in log-probabilities alike. None: every token can be drawn;
    rows are filled up beyond their lengths with what nothing reads."""

    stop_tokens: tuple[str, ...] = ()
    """Tokens that end an answer beside the end of a document and the chat template's end of a turn."""

    stream: Flag = True
    """Pass groups on as they end where roles are apart, and let actor and critic learn at once. false: one thing after
    another, for comparison; the results are the same."""

    timeout_seconds: Positive = 1800.0
    """How long a rank waits for another before it ends the run: longer than any role takes for an iteration."""

    samples_shown: Annotated[int, Field(strict=True, ge=0)] = 4
    """Answers of each iteration that go into RUN/samples.jsonl."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """Those that the algorithm has."""
        return ROLES_OF[self.algorithm]

    @model_validator(mode="after")
    def _settings_are_the_algorithms(self) -> Self:
        for name in FOREIGN[self.algorithm]:
            value, usual = getattr(self, name), type(self).model_fields[name].default
            if value != usual:
                other = "grpo" if self.algorithm == "ppo" else "ppo"
                raise ConfigError(
                    f"ppo.{name}",
                    value,
                    rule=f"is a setting of ppo.algorithm {other}, and has no use with {self.algorithm}",
                    cure=f"ppo.{name}={json.dumps(usual)}",
                )
        if self.algorithm == "grpo" and self.answers_per_prompt < 2:
            raise ConfigError(
                "ppo.answers_per_prompt",
                self.answers_per_prompt,
                rule="is 2 or more with ppo.algorithm grpo: an answer is compared with the others to its prompt",
                cure="ppo.answers_per_prompt=8",
            )
        return self

    @model_validator(mode="after")
    def _a_coefficient_that_adapts_is_not_0(self) -> Self:
        if self.kl_target is not None and self.kl_coefficient == 0:
            raise ConfigError(
                "ppo.kl_coefficient",
                self.kl_coefficient,
                rule="is above 0 with ppo.kl_target: it is multiplied up or down, and 0 stays 0",
                cure="ppo.kl_coefficient=0.05, or ppo.kl_target=null",
            )
        return self


class CriticSection(Section):
    """What estimates the reward that is still to come."""

    checkpoint: UserPath | None = None
    """Weights it begins with, such as the reward model's; its head begins at 0. None: init.checkpoint."""

    optimizer: OptimizerConfig | None = None
    """None: the actor's."""

    parallel: ParallelConfig | None = None
    """Its layout. None: the actor's."""


class RewardSourceSection(Section):
    """What scores an answer: a reward model, or a function. Exactly one."""

    checkpoint: UserPath | None = None
    """A run of `orthant reward`; its scores are normalised by what it stored."""

    function: str | None = None
    """FILE.py:NAME: called with a list of `alignment.ppo.reward_function.Answer`, returns a list of numbers."""

    parallel: ParallelConfig | None = None
    """The reward model's layout. None: the actor's."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.checkpoint is None) == (self.function is None):
            raise ConfigError(
                "reward.checkpoint",
                None if self.checkpoint is None else str(self.checkpoint),
                rule="or reward.function is given, and not both: one thing scores",
                cure="reward.checkpoint=RUN of `orthant reward`, or reward.function=FILE.py:NAME",
            )
        if self.function is not None and not all(self.function.rpartition(":")[::2]):
            raise ConfigError(
                "reward.function", self.function, rule="is FILE.py:NAME", cure="reward.function=rewards.py:score"
            )
        return self


class ReferenceSection(Section):
    """What the policy is held to."""

    checkpoint: UserPath | None = None
    """None: init.checkpoint."""

    parallel: ParallelConfig | None = None
    """Its layout. None: the actor's."""


class GenerationSection(Section):
    """Where answers are sampled."""

    parallel: ParallelConfig | None = None
    """Layout of the actor's weights there. None: the actor's own, and at staleness 0 on its ranks its own weights."""


class PlacementSection(Section):
    """Which ranks do what. Stations are apart: each is a world of its own, and they exchange rows."""

    stations: tuple[tuple[Role, ...], ...] | None = None
    """Roles of each station. Those that share one take turns. None: one station has all."""

    ranks: tuple[Size, ...] | None = None
    """Ranks of each station, in order. None: of a single station, all."""

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        stations, ranks = self.stations, self.ranks
        if stations is not None and not (stations and "actor" in stations[0]):
            raise ConfigError(
                "placement.stations",
                [list(station) for station in stations],
                rule="begins with the actor's station: rank 0 holds the thread of the run",
                cure="the station with actor first",
            )
        count = 1 if stations is None else len(stations)
        if (1 if ranks is None else len(ranks)) != count:
            raise ConfigError(
                "placement.ranks",
                None if ranks is None else list(ranks),
                rule=f"says how many ranks each station has, and there {'is one' if count == 1 else f'are {count}'}",
                cure=f"placement.ranks={'null' if count == 1 else [1] * count}",
            )
        return self

    def of(self, roles: tuple[Role, ...]) -> tuple[tuple[Role, ...], ...]:
        """The stations of a run that has `roles`.

        Raises:
            ConfigError: they are others.
        """
        if self.stations is None:
            return (roles,)
        if sorted(role for station in self.stations for role in station) != sorted(roles) or not all(self.stations):
            judges = [role for role in roles if role not in ("actor", "generation")]
            raise ConfigError(
                "placement.stations",
                [list(station) for station in self.stations],
                rule=f"names each of {', '.join(roles)} once, and no station is empty",
                cure=f"placement.stations=[[actor, generation], [{', '.join(judges)}]]",
            )
        return self.stations
