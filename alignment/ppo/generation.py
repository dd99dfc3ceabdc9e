"""Prompts of an iteration, and answers to them from the actor's weights at generation's layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from alignment.ppo.rows import Rollout
from data.order import permutation
from model.decoder import Decoder
from model.generation.engine import GenerationEngine
from model.generation.settings import Prompt, SamplingSettings
from parallel.layout import ParallelLayout

_PROMPTS = 13  # a stream of data.order of its own
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in an order that follows from the seed: answer k of a run is to prompt `number_of(k)`, and so are the
    others of the same k // answers_per_prompt.

    Attributes:
        prompts: at least one.
        batch: answers of one iteration.
        group_size: answers of one group; which they are follows from their numbers alone.
    """

    prompts: Sequence[Tokens]
    batch: int
    group_size: int
    seed: int
    answers_per_prompt: int = 1

    def number_of(self, sample: int) -> int:
        """Number in the set of the prompt that sample `sample` answers."""
        epoch, place = self._place(sample)
        return int(permutation(len(self.prompts), self.seed, _PROMPTS, epoch)[place])

    def groups(self, iteration: int) -> list[list[Prompt]]:
        """The prompts of an iteration."""
        first = iteration * self.batch
        order: dict[int, list[int]] = {}
        rows = []
        for sample in range(first, first + self.batch):
            epoch, place = self._place(sample)
            if epoch not in order:
                order[epoch] = permutation(len(self.prompts), self.seed, _PROMPTS, epoch).tolist()
            rows.append(Prompt(sample, tuple(self.prompts[order[epoch][place]])))
        return [rows[at : at + self.group_size] for at in range(0, self.batch, self.group_size)]

    def _place(self, sample: int) -> tuple[int, int]:
        """(epoch, place in it) of the prompt that `sample` answers."""
        return divmod(sample // self.answers_per_prompt, len(self.prompts))

    @property
    def group_count(self) -> int:
        """Groups of an iteration."""
        return -(-self.batch // self.group_size)


@dataclass(frozen=True)
class Generator:
    """One replica's generation; its layout is in force whenever it is used.

    Attributes:
        decoder: this rank's stage.
        engine: over it. It keeps no keys or values beyond a group, so new weights never meet old ones.
    """

    decoder: Decoder
    layout: ParallelLayout
    engine: GenerationEngine
    settings: SamplingSettings

    def stream(self, groups: Sequence[Sequence[Prompt]], version: int) -> Iterator[tuple[int, Rollout]]:
        """(number of the group, answers) of this replica's share, as groups end. Collective over the replica."""
        replica = self.layout.coordinates(dist.get_rank()).dp
        for place, completions in self.engine.stream(groups[replica :: self.layout.dp], self.settings):
            number = replica + place * self.layout.dp
            yield number, Rollout.of(completions, self.settings.max_new_tokens, version)
