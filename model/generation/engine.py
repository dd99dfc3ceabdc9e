"""Generation over tensor and pipeline ranks.

A group of prompts is read at once and then continued token by token until all its rows have ended. Its rows stay
together, so what a group becomes is the same, bit for bit, whatever other groups there are. With pipeline stages
several groups are in flight: while the last stage chooses tokens for one, the first already works on the next, and with
as many groups as stages none waits.

One rank of a replica (the first tensor-parallel one of the last stage) draws; the tokens go to all others over a group
on the host, so that ranks cannot disagree about which rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from foundation.errors import RequestError, WorkError
from model.decoder import Decoder
from model.generation.cache import CachedLayers, KeyValueCache, Step
from model.generation.random_streams import uniforms
from model.generation.rows import Rows
from model.generation.sampling import choose
from model.generation.settings import Completion, Prompt, SamplingSettings
from parallel.layout import ParallelLayout

Drawn = tuple[NDArray[np.int64], NDArray[np.float64]]
"""Tokens and their log-probabilities, of the live rows."""

Watch = Callable[[int, int], None]
"""(sample_id, token), called on every rank as tokens become known."""


class GenerationEngine:
    """Continues prompts with one replica of a model. Every method is collective over the replica.

    The decoder's weights may change between calls: nothing of them is kept here, and a cache lives no longer than its
    group.

    Args:
        decoder: this rank's stage; it is put into evaluation for the length of a step and back.
        layout: of `decoder`.
        context_length: tokens of the longest row.
        host_group: a gloo group of the replica's ranks (`host_groups`), first tensor-parallel rank of the first stage
            first; None where the replica is one rank.

    Raises:
        RequestError: a layout that generation does not have.
    """

    def __init__(
        self, decoder: Decoder, layout: ParallelLayout, context_length: int, host_group: dist.ProcessGroup | None = None
    ) -> None:
        refuse_layout(layout)
        if host_group is None and layout.tp * layout.pp > 1:
            raise ValueError("ranks of a replica need a group on the host: see host_groups")
        self.decoder, self.layout, self.context_length = decoder, layout, context_length
        self._cached = CachedLayers(decoder.decoder.layers)
        self._links = _Links(decoder, layout, host_group)
        self._device = torch.device(torch.cuda.current_device())

    def generate(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        group_size: int = 32,
        watch: Watch | None = None,
    ) -> list[Completion]:
        """Continue `prompts`, in groups of `group_size` as they come; completions in the prompts' order."""
        groups = [prompts[first : first + group_size] for first in range(0, len(prompts), group_size)]
        found: list[list[Completion]] = [[] for _ in groups]
        for number, completions in self.stream(groups, settings, watch=watch):
            found[number] = completions
        return [completion for group in found for completion in group]

    def stream(
        self,
        groups: Sequence[Sequence[Prompt]],
        settings: SamplingSettings,
        in_flight: int | None = None,
        watch: Watch | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Continue groups of prompts; yields (index of the group, its completions) as groups end.

        Every rank of the replica gets the same, and has to take all of it.

        Args:
            in_flight: groups that are worked on at a time; None: as many as pipeline stages.

        Raises:
            RequestError: a prompt that is empty, longer than the context, or holds what is no token.
        """
        for prompts in groups:
            self._check(prompts, settings)
        waiting = [_Group(number, prompts, settings, self.context_length) for number, prompts in enumerate(groups)][
            ::-1
        ]
        slots: list[_Group | None] = [None] * (in_flight or self.layout.pp)
        while waiting or any(slots):
            for slot, group in enumerate(list(slots)):
                if group is not None:
                    self._take_tokens(group, settings, watch)
                now = group
                while (now is None or now.rows.ended) and (now is not None or waiting):
                    if now is not None:
                        yield now.number, now.rows.completions()
                    now = waiting.pop() if waiting else None
                slots[slot] = now
                if now is not None:
                    self._run_step(now, settings)
        self._links.finish()

    def _check(self, group: Sequence[Prompt], settings: SamplingSettings) -> None:
        ids = settings.stop_ids | settings.excluded_ids
        strange = sorted(token for token in ids if not 0 <= token < self.decoder.vocab_size)
        if strange or len(settings.excluded_ids) >= self.decoder.vocab_size:
            raise RequestError(
                f"stop or excluded tokens {strange or 'leave nothing to draw'}",
                rule=f"tokens are 0 to {self.decoder.vocab_size - 1}, and one at least can be drawn",
            )
        for prompt in group:
            where = f"prompt of sample {prompt.sample_id}"
            if not prompt.tokens:
                raise RequestError(
                    "a prompt is empty", where=where, rule="the model continues one token or more", cure="a text"
                )
            if len(prompt.tokens) > self.context_length:
                raise RequestError(
                    f"a prompt has {len(prompt.tokens)} tokens",
                    where=where,
                    rule=f"is at most as long as the context, {self.context_length} tokens",
                    cure="a shorter prompt",
                )
            if prompt.sample_id < 0 or not 0 <= min(prompt.tokens) <= max(prompt.tokens) < self.decoder.vocab_size:
                raise RequestError(
                    "a prompt holds what is no token, or has a negative sample id",
                    where=where,
                    rule=f"tokens are 0 to {self.decoder.vocab_size - 1}",
                )

    def _run_step(self, group: _Group, settings: SamplingSettings) -> None:
        """This rank's part of the next step; its tokens are drawn, sent and not yet waited for."""
        kept = group.rows.compact()
        if kept is not None:
            group.cache.keep(torch.tensor(kept, device=self._device))
        step = Step.of(group.rows.lengths(), first=not group.started, device=self._device)
        logits = self._forward(group, step)
        if logits is not None:
            tokens, log_probabilities = choose(logits, settings, self._draws(group.rows, settings))
            group.asked = self._links.send_tokens(tokens, log_probabilities)
        else:
            group.asked = self._links.expect_tokens(len(step.counts))
        group.started = True

    def _draws(self, rows: Rows, settings: SamplingSettings) -> torch.Tensor:
        if settings.temperature == 0:  # nothing is drawn
            return torch.zeros(len(rows.live), dtype=torch.float64)
        samples, tokens = rows.stream_places()
        return torch.from_numpy(uniforms(settings.seed, samples, tokens)).to(self._device)

    @torch.no_grad()
    def _forward(self, group: _Group, step: Step) -> torch.Tensor | None:
        """Logits [rows, vocabulary] after each row's last token, on the rank that draws."""
        decoder, cut = self.decoder, self.layout.tp if self.layout.sequence_parallel else 1
        tokens, positions = group.rows.new_tokens(step.first)
        spare = -len(tokens) % cut  # what pads belongs to no row
        flat = torch.tensor([tokens + [0] * spare], device=self._device)
        places = torch.tensor([positions + [0] * spare], device=self._device)
        if not decoder.pre_process:
            hidden = self._links.receive_hidden((len(tokens) + spare) // cut)
            decoder.set_input_tensor(hidden)
        was_training = decoder.training
        if was_training:
            decoder.eval()
        with self._cached.reading(group.cache, step):
            ends = torch.tensor(step.counts, device=self._device).cumsum(0) - 1
            output: torch.Tensor = decoder(flat, position_ids=places, last_tokens=ends)
        if was_training:
            decoder.train()
        if not decoder.post_process:
            self._links.send_hidden(output)
            return None
        return self._links.whole_vocabulary(output[0], decoder.vocab_size)

    def _take_tokens(self, group: _Group, settings: SamplingSettings, watch: Watch | None) -> None:
        assert group.asked is not None, "a group in a slot has run a step"
        tokens, log_probabilities = group.asked()
        group.asked = None
        for sample_id, token in group.rows.accept(tokens, log_probabilities, settings):
            if watch is not None:
                watch(sample_id, token)


class _Group:
    """A group in flight: its rows, what this rank's layers remember of them, and the tokens that are on their way."""

    def __init__(self, number: int, prompts: Sequence[Prompt], settings: SamplingSettings, context_length: int) -> None:
        self.number = number
        self.rows = Rows(prompts, settings, context_length)
        self.cache = KeyValueCache(len(self.rows.live), context_length)
        self.started = False
        self.asked: Callable[[], Drawn] | None = None


class _Links:
    """Messages between the ranks of a replica."""

    def __init__(self, decoder: Decoder, layout: ParallelLayout, host_group: dist.ProcessGroup | None) -> None:
        self._host = host_group
        self._device = torch.device(torch.cuda.current_device())
        self._hidden_size, self._dtype = decoder.config.hidden_size, decoder.config.params_dtype
        self._tensor, self._pipeline = decoder.pg_collection.tp, decoder.pg_collection.pp
        self._drawer_index = (layout.pp - 1) * layout.tp
        self._sent: list[tuple[Any, torch.Tensor]] = []

    def receive_hidden(self, length: int) -> torch.Tensor:
        """[length, 1, hidden_size] from the stage before."""
        hidden = torch.empty((length, 1, self._hidden_size), dtype=self._dtype, device=self._device)
        dist.recv(hidden, dist.get_global_rank(self._pipeline, self._pipeline.rank() - 1), group=self._pipeline)
        return hidden

    def send_hidden(self, hidden: torch.Tensor) -> None:
        """To the next stage, which takes it when it comes to it."""
        hidden = hidden.contiguous()
        target = dist.get_global_rank(self._pipeline, self._pipeline.rank() + 1)
        self._keep(dist.isend(hidden, target, group=self._pipeline), hidden)

    def whole_vocabulary(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
        """[rows, width of this rank] -> [rows, vocab_size] on the rank that draws, None on others."""
        ranks = self._tensor.size()
        if ranks > 1:
            rows, width = logits.shape
            gathered = logits.new_empty((ranks, rows, width))
            dist.all_gather_into_tensor(gathered.view(-1), logits.contiguous().view(-1), group=self._tensor)
            if self._tensor.rank():
                return None
            logits = gathered.transpose(0, 1).reshape(rows, ranks * width)
        return logits[:, :vocab_size]

    def send_tokens(self, tokens: torch.Tensor, log_probabilities: torch.Tensor) -> Callable[[], Drawn]:
        """Give what was drawn to all ranks of the replica.

        Raises:
            WorkError: a token has no probability that is a number.
        """
        drawn = torch.stack((tokens.double(), log_probabilities.double())).cpu()
        if not drawn[1].isfinite().all():
            raise WorkError(
                "the model's logits are not finite numbers",
                cure="an earlier checkpoint of the run; `orthant ckpt verify` tells whether this one is damaged",
            )
        others = [] if self._host is None else dist.get_process_group_ranks(self._host)
        for rank in others:
            if rank != dist.get_rank():
                self._keep(dist.isend(drawn, rank, group=self._host), drawn)
        return lambda: _as_numbers(drawn)

    def expect_tokens(self, rows: int) -> Callable[[], Drawn]:
        """What waits for the same on the other ranks."""
        assert self._host is not None, "a single rank draws itself"
        drawn = torch.empty((2, rows), dtype=torch.float64)
        coming: Any = dist.irecv(drawn, dist.get_global_rank(self._host, self._drawer_index), group=self._host)

        def arrived() -> Drawn:
            coming.wait()
            return _as_numbers(drawn)

        return arrived

    def finish(self) -> None:
        """Wait for what was sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _keep(self, work: Any, tensor: torch.Tensor) -> None:
        """Hold what is under way; a tensor that is freed before it is sent sends something else."""
        self._sent = [(one, held) for one, held in self._sent if not one.is_completed()]
        self._sent.append((work, tensor))


def _as_numbers(drawn: torch.Tensor) -> Drawn:
    """Tokens (exact in fp64) and log-probabilities."""
    return drawn[0].numpy().astype(np.int64), drawn[1].numpy()


def host_groups(layout: ParallelLayout) -> dist.ProcessGroup | None:
    """This rank's gloo group of its replica's ranks, for `GenerationEngine`. Collective over the whole world."""
    if layout.tp * layout.pp == 1:
        return None
    own = None
    for replica in range(layout.dp):
        members = [rank for rank in range(layout.world_size) if layout.coordinates(rank).dp == replica]
        group = dist.new_group(members, backend="gloo")
        if dist.get_rank() in members:
            own = group
    return own


def refuse_layout(layout: ParallelLayout) -> None:
    """Generation runs over tensor x pipeline x data ranks.

    Raises:
        RequestError: another axis, or weights that are sharded over replicas.
    """
    for field_name, value, asked in (
        ("context_parallel_size", layout.cp, layout.cp > 1),
        ("virtual_pipeline_model_parallel_size", layout.vpp, layout.vpp > 1),
        ("expert_model_parallel_size", layout.ep, layout.ep > 1),
        ("zero_stage", layout.zero_stage, layout.fully_sharded),
    ):
        if asked:
            raise RequestError(
                f"generation does not go with parallel.{field_name} {value}",
                rule="it runs over tensor x pipeline x data ranks, each with its whole weights",
                cure="a layout without it: a checkpoint loads at any layout",
            )
