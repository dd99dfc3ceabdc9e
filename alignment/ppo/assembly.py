"""Build what the ranks of a station need: models, optimizers, the plan of the refit. Every function is collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment.ppo.algorithm import algorithm_of
from alignment.ppo.cast import Cast, Kept
from alignment.ppo.config import PpoSection, Role
from alignment.ppo.generation import Generator, PromptSet
from alignment.ppo.judges import FunctionReward, Judge, ModelJudge, RewardModel
from alignment.ppo.learner import Learner
from alignment.ppo.links import Kind, Links, Message
from alignment.ppo.objectives import FitValues
from alignment.ppo.passes import critic_values, last_scores, policy_values, shared
from alignment.ppo.placement import Placement
from alignment.ppo.refit import Part, Refit, parts_here, plan_moves
from alignment.ppo.rows import Rollout
from alignment.ppo.sampling import Sampler
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline
from checkpoint_tools.manifest import ScoreNormalisation
from model.config import ModelConfig
from model.core_config import core_config
from model.decoder import Decoder, Head, build_decoder_chunks
from model.generation.engine import GenerationEngine, host_groups
from model.generation.settings import SamplingSettings
from model.kernels.provider import kernels_here
from parallel.grids import Grids
from parallel.layout import ParallelLayout
from training.config import TrainingSections
from training.state import TrainingState, build_state

FP32_MISMATCH = 1e-3
"""Nats between generation and training that no rounding of fp32 explains."""


@dataclass(frozen=True)
class Ingredients:
    """What a run is made of, the same on every rank.

    Attributes:
        models: architecture of each role that is a model.
        vocab_size: of all of them.
        sections, critic_sections: of the run, with actor's and critic's optimizers.
        load: fills the chunks of a role with the weights that it begins with. Collective over the station.
        reward: a function of answers, or the normalisation of the reward model's scores.
        stop_ids: tokens that end an answer.
        excluded_ids: tokens without probability.
        kept: where `actor` and `critic` keep their state; None: nowhere.
    """

    models: Mapping[Role, ModelConfig]
    vocab_size: int
    ppo: PpoSection
    sections: TrainingSections
    critic_sections: TrainingSections
    prompts: PromptSet
    load: Callable[[Role, list[Decoder]], None]
    reward: Callable[[Rollout], Sequence[float]] | ScoreNormalisation
    stop_ids: frozenset[int]
    excluded_ids: frozenset[int]
    folder: Path
    kept: Callable[[Role], Kept] | None


def station_of(placement: Placement, links: Links, seed: int) -> Station:
    """This rank's station, with the process groups of every layout there. Enter its `grids` before use."""
    number = placement.station_at(links.rank)
    layouts = [placement.layouts[role] for role in placement.stations[number]]
    return Station(placement, number, links, Grids(layouts, seed))


def assemble(made_of: Ingredients, station: Station, timeline: Timeline) -> Cast:
    """The cast of this station, with the weights that the run begins with."""
    roles, ppo = station.roles, made_of.ppo
    actor = _learner(made_of, station, "actor") if "actor" in roles else None
    critic = _learner(made_of, station, "critic") if "critic" in roles else None
    shares = _shares_weights(station, ppo)
    sampling = _own_decoder(made_of, station, "generation", "tokens") if "generation" in roles and not shares else None
    refit = None if shares else _refit(station, actor, sampling)
    sampler = None
    if "generation" in roles:
        decoder = actor.state.chunks[0] if sampling is None and actor is not None else sampling
        assert decoder is not None
        generator = _generator(made_of, station, decoder)
        kept = made_of.folder / "under_way"
        sampler = Sampler(station, generator, made_of.prompts, refit, kept, timeline, stream=ppo.stream)
    fp32 = made_of.sections.training.precision == "fp32"
    limit = ppo.max_generation_mismatch
    return Cast(
        ppo=ppo,
        algorithm=algorithm_of(ppo),
        sections=made_of.sections,
        groups=made_of.prompts.group_count,
        judges=_judges(made_of, station, critic),
        folder=made_of.folder,
        actor=actor,
        critic=critic,
        sampler=sampler,
        refit=refit if "actor" in roles else None,
        actor_kept=made_of.kept("actor") if actor is not None and made_of.kept is not None else None,
        critic_kept=made_of.kept("critic") if critic is not None and made_of.kept is not None else None,
        largest_mismatch=FP32_MISMATCH if limit is None and fp32 else limit,
    )


def _shares_weights(station: Station, ppo: PpoSection) -> bool:
    """Whether generation computes with the actor's own weights: its ranks, its layout, and never behind."""
    placement = station.placement
    together = placement.station_of("actor") == placement.station_of("generation")
    actor, generation = placement.layouts["actor"], placement.layouts["generation"]
    cut_alike = all(getattr(actor, name) == getattr(generation, name) for name in ("tp", "pp", "sequence_parallel"))
    return together and ppo.staleness == 0 and cut_alike and actor.pipeline_layers == generation.pipeline_layers


def _learner(made_of: Ingredients, station: Station, role: Role) -> Learner:
    layout, ppo = station.layout(role), made_of.ppo
    sections = made_of.sections if role == "actor" else made_of.critic_sections
    head: Head = "tokens" if role == "actor" else "score"

    def prepare(chunks: list[Decoder]) -> None:
        made_of.load(role, chunks)
        if role == "critic":
            start_values_at_zero(chunks)

    with station.grids.use(layout):
        state: TrainingState = build_state(
            made_of.models[role],
            layout,
            sections.training,
            sections.optimizer,
            made_of.vocab_size,
            prepare=prepare,
            head=head,
            excluded_tokens=made_of.excluded_ids if role == "actor" else frozenset(),
        )
    objective = algorithm_of(ppo).objective(made_of.vocab_size) if role == "actor" else FitValues(ppo.value_clip_range)
    return Learner(role, state, sections, objective)


@torch.no_grad()
def start_values_at_zero(chunks: Sequence[Decoder]) -> None:
    """A critic begins without an opinion, whatever head its weights came with: a reward model's is on another scale."""
    for chunk in chunks:
        if chunk.post_process:
            chunk.score_head.weight.zero_()


def _own_decoder(made_of: Ingredients, station: Station, role: Role, head: Head) -> Decoder:
    """A model that does not learn."""
    layout, model = station.layout(role), made_of.models[role]
    kernels = kernels_here(model)
    precision = made_of.sections.training.precision
    excluded = made_of.excluded_ids if head == "tokens" else frozenset[int]()
    with station.grids.use(layout):
        core = core_config(model, layout, "bf16" if precision == "fp8" else precision, kernels)
        chunks = build_decoder_chunks(model, core, layout, made_of.vocab_size, kernels, head, excluded)
        if role != "generation":  # gets the actor's before it is used
            made_of.load(role, chunks)
    for parameter in chunks[0].parameters():
        parameter.requires_grad_(False)
        if role == "generation":
            parameter.zero_()
    decoder: Decoder = chunks[0].eval()
    return decoder


def _generator(made_of: Ingredients, station: Station, decoder: Decoder) -> Generator:
    layout, ppo = station.layout("generation"), made_of.ppo
    settings = SamplingSettings(
        max_new_tokens=ppo.max_new_tokens,
        temperature=ppo.temperature,
        stop_ids=made_of.stop_ids,
        excluded_ids=made_of.excluded_ids,
        seed=made_of.sections.training.seed,
    )
    with station.grids.use(layout):
        engine = GenerationEngine(decoder, layout, made_of.sections.training.seq_length, host_groups(layout))
    return Generator(decoder, layout, engine, settings)


def _judges(made_of: Ingredients, station: Station, critic: Learner | None) -> dict[Role, Judge]:
    size, found = made_of.sections.training.micro_batch_size, dict[Role, Judge]()
    if "reference" in station.roles:
        decoder = _own_decoder(made_of, station, "reference", "tokens")
        values = policy_values(made_of.vocab_size, made_of.ppo.temperature)
        found["reference"] = ModelJudge([decoder], station.layout("reference"), size, values)
    if "reward" in station.roles:
        layout = station.layout("reward")
        if isinstance(made_of.reward, ScoreNormalisation):
            scorer = _own_decoder(made_of, station, "reward", "score")
            found["reward"] = RewardModel(ModelJudge([scorer], layout, size, last_scores), made_of.reward)
        else:
            found["reward"] = FunctionReward(layout, made_of.reward)
    if critic is not None:
        found["critic"] = ModelJudge(critic.state.wrapped, critic.state.layout, size, critic_values)
    return found


def _refit(station: Station, actor: Learner | None, decoder: Decoder | None) -> Refit | None:
    """The plan, known to the stations of actor and generation; None elsewhere."""
    placement, rank = station.placement, station.links.rank
    sides: dict[Role, list[Part]] = {}
    chunks: dict[Role, tuple[ParallelLayout, list[Any]]] = {}
    if actor is not None:
        chunks["actor"] = (actor.state.layout, list(actor.state.chunks))
    if decoder is not None:
        chunks["generation"] = (station.layout("generation"), [decoder])
    for role, (layout, held) in chunks.items():
        with station.grids.use(layout):
            sides[role] = shared(parts_here(held, rank))
    if not sides:
        return None
    if len(sides) == 1:
        mine: Role = "actor" if actor is not None else "generation"
        other: Role = "generation" if actor is not None else "actor"
        there = placement.station_of(other)
        station.tell(there, Kind.PLAN, Message({"parts": [list(vars(one).values()) for one in sides[mine]]}))
        told = station.hear(placement.leader(there), Kind.PLAN).notes["parts"]
        sides[other] = [Part(where, name, tuple(at), tuple(size), main) for where, name, at, size, main in told]
    return Refit(plan_moves(sides["actor"], sides["generation"]), station.links)
