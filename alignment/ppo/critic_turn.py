"""The critic's turn of an iteration, wherever it is."""

from __future__ import annotations

from alignment.ppo.cast import Cast
from alignment.ppo.learner import Update, mean
from alignment.ppo.rows import Rollout, Tensors
from alignment.ppo.station import Station
from alignment.ppo.timeline import Timeline
from parallel.data_parallel import gather_updated_parameters


def critic_learns(
    station: Station, cast: Cast, timeline: Timeline, rollout: Rollout, given: Tensors, iteration: int
) -> dict[str, float]:
    """All epochs over a batch; the figures. Collective over the station."""
    critic = cast.critic
    assert critic is not None
    updates: list[Update] = []
    with station.grids.use(critic.state.layout), timeline.busy("critic", "learn"):
        for epoch in range(cast.ppo.epochs):
            updates += critic.epoch(rollout, given, cast.ppo.mini_batches, iteration, epoch)
        gather_updated_parameters(critic.state.wrapped, critic.state.layout)
    return {
        "value_loss": mean([one.loss.mean for one in updates]),
        "value_grad_norm": mean([one.gradient_norm for one in updates]),
        "value_clip_fraction": mean([one.loss.further["value_clip_fraction"] for one in updates]),
        "critic_lr": critic.rate(iteration),
    }
