"""The sections of a run: `training`, `optimizer`, `schedule`, `evaluation`, `checkpoint`, `guards`, `logging`; those of
`training.survival` and `training.profiling` join them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from foundation.errors import ConfigError
from foundation.section import Section
from model.fp8 import Fp8Config
from training.profiling.config import ProfileConfig, check_profile
from training.survival.config import PreflightConfig, StragglerConfig, WatchdogConfig

Size = Annotated[int, Field(strict=True, ge=1)]
Count = Annotated[int, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]


class TrainingConfig(Section):
    """How long, how much at once, in which precision."""

    train_steps: Size = Field(examples=[1000])
    """Optimizer steps of the whole run."""

    global_batch_size: Size = Field(examples=[64])
    """Sequences in one optimizer step, over all replicas and micro-batches."""

    micro_batch_size: Size = 1
    """Sequences in one forward pass of one replica."""

    seq_length: Size = Field(examples=[4096])
    """Tokens in one sequence."""

    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Arithmetic of forward and backward. bf16 and fp8 keep fp32 master weights; fp8 needs a GPU that has it, or
    model.kernels torch, which tries it out on a CPU."""

    fp8: Fp8Config = Fp8Config()
    """How FP8 products are scaled, and which layers stay in BF16."""

    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, the inside of attention, or whole layers
    (arXiv 2205.05198)."""

    recompute_num_layers: Size = 1
    """With recompute_granularity full: layers between two inputs that are kept."""

    seed: Count = 1234
    """Seed of initial weights and of data order; the same at every layout."""


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101) with clipping of the global gradient norm."""

    lr: Positive = Field(examples=[3e-4])
    """Peak learning rate."""

    weight_decay: NotNegative = 0.1
    """Decoupled weight decay on matrices; norms and biases get none."""

    adam_beta1: Decay = 0.9
    """Decay of the mean of gradients."""

    adam_beta2: Decay = 0.95
    """Decay of the mean of squared gradients."""

    adam_eps: Positive = 1e-8
    """Added to the square root of the mean of squared gradients."""

    clip_grad: NotNegative = 1.0
    """Largest L2 norm of all gradients together; 0 turns clipping off."""


class ScheduleConfig(Section):
    """The learning rate over steps: linear warmup to the peak, then a decay to min_lr."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """cosine and linear fall over decay_steps; wsd (warmup, stable, decay) stays at the peak and falls over the last
    wsd_decay_steps; constant stays."""

    warmup_steps: Count = 0
    """Steps over which the rate climbs from 0 to the peak."""

    decay_steps: Size | None = None
    """Step at which min_lr is reached, warmup included. None: training.train_steps."""

    min_lr: NotNegative = 0.0
    """Learning rate at the end of the decay and after it."""

    wsd_decay_steps: Size | None = None
    """wsd: steps of the final fall. None: a tenth of decay_steps."""


class EvaluationConfig(Section):
    """Loss on data held out."""

    interval: Size | None = None
    """Steps between two evaluations. None: no evaluation."""

    batches: Size = 8
    """Global batches per evaluation."""


class CheckpointConfig(Section):
    """When the whole state is written, and which of those checkpoints stay."""

    interval: Size | None = None
    """Steps between two checkpoints. None: only at the end of the run and on a signal to stop."""

    keep_last: Size = 3
    """Newest checkpoints that stay; older ones are deleted."""

    keep_every: Size | None = None
    """Checkpoints of steps divisible by this stay for good. None: none."""

    asynchronous: Flag = False
    """Write in a fork while training goes on; the pause is that of copying the state, not of writing it. The last
    checkpoint of a run, and the one on a signal to stop, are waited for."""

    resume: Flag = True
    """Continue from the run folder's newest good checkpoint. False: a run folder that holds checkpoints is refused."""


class GuardConfig(Section):
    """What happens when a step goes wrong."""

    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient norm that is not finite: end the run, leave the step's update out, or return to the newest
    checkpoint and read the same data again (a step that goes wrong again after its rollback is left out). Where there
    is no checkpoint yet the step alone is done again: its update has not been applied."""

    on_spike: Literal["warn", "stop", "skip", "rollback"] = "warn"
    """A loss above spike_factor x the median of recent ones: the same choices, or only a warning."""

    spike_factor: Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)] = 1.5
    """A spike is a loss above this many times the median loss of the last spike_window good steps."""

    spike_window: Annotated[int, Field(strict=True, ge=2)] = 64
    """Good steps whose median loss a step is compared with; no step is a spike before there are so many."""

    max_rollbacks: Count = 3
    """Rollbacks after which the run ends."""

    max_skips: Count = 10
    """Skipped steps in a row after which the run ends."""


class LoggingConfig(Section):
    """Where figures go beside RUN/metrics.jsonl, which is always written."""

    tensorboard: Flag = False
    """Write TensorBoard event files under RUN/tensorboard."""

    wandb: Flag = False
    """Log to Weights & Biases; offline under RUN/wandb unless a key is in the environment."""

    wandb_project: Annotated[str, Field(min_length=1)] = "orthant"
    """Project that Weights & Biases files the run under."""

    log_interval: Size = 1
    """Steps between two lines on the terminal."""


class TrainingSections(Section):
    """The sections that a training run reads beside model, data and parallel; `launch` adds those."""

    training: TrainingConfig
    """Steps, batch, sequence, precision, seed."""

    optimizer: OptimizerConfig
    """AdamW and clipping."""

    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over steps."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Loss on held-out data."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is written and what stays."""

    guards: GuardConfig = GuardConfig()
    """Answers to losses that are not finite and to spikes."""

    logging: LoggingConfig = LoggingConfig()
    """TensorBoard, Weights & Biases, lines on the terminal."""

    watchdog: WatchdogConfig = WatchdogConfig()
    """What ends a run that hangs."""

    preflight: PreflightConfig = PreflightConfig()
    """The look at the nodes before the first step."""

    stragglers: StragglerConfig = StragglerConfig()
    """The comparison of ranks."""

    profile: ProfileConfig = ProfileConfig()
    """Where the time of chosen steps goes."""

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        _global_batch_holds_whole_micro_batches(self)
        _decay_ends_with_training(self)
        _warmup_ends_before_decay(self)
        _min_lr_not_above_peak(self)
        _wsd_decay_fits_after_warmup(self)
        _wsd_decay_only_with_wsd(self)
        _keep_every_meets_the_interval(self)
        _rollback_needs_checkpoints(self)
        check_profile(self.profile, self.training.train_steps)
        return self


def decay_steps(sections: TrainingSections) -> int:
    """The step at which the learning rate reaches its minimum, resolved."""
    given = sections.schedule.decay_steps
    return sections.training.train_steps if given is None else given


def wsd_decay_steps(sections: TrainingSections) -> int:
    """Steps of the final fall of a wsd schedule, resolved: a tenth of decay_steps where not given, 1 at least."""
    given = sections.schedule.wsd_decay_steps
    return max(1, decay_steps(sections) // 10) if given is None else given


def _global_batch_holds_whole_micro_batches(sections: TrainingSections) -> None:
    whole, micro = sections.training.global_batch_size, sections.training.micro_batch_size
    if whole % micro:
        raise ConfigError(
            "training.global_batch_size",
            whole,
            rule=f"is a multiple of training.micro_batch_size {micro}",
            cure=f"training.global_batch_size={-(-whole // micro) * micro}",
        )


def _decay_ends_with_training(sections: TrainingSections) -> None:
    given, steps = sections.schedule.decay_steps, sections.training.train_steps
    if given is not None and given > steps and sections.schedule.kind == "wsd":
        raise ConfigError(
            "schedule.decay_steps",
            given,
            rule=f"is at most training.train_steps {steps} with schedule.kind wsd, or its final fall is cut off",
            cure=f"schedule.decay_steps={steps}",
        )


def _warmup_ends_before_decay(sections: TrainingSections) -> None:
    warmup, end, given = sections.schedule.warmup_steps, decay_steps(sections), sections.schedule.decay_steps
    if warmup >= end:
        name = "training.train_steps" if given is None else "schedule.decay_steps"
        raise ConfigError(
            "schedule.warmup_steps",
            warmup,
            rule=f"is below {name} {end}, or the learning rate never leaves its warmup",
            cure=f"schedule.warmup_steps={end // 10}",
        )
    if warmup >= sections.training.train_steps:
        raise ConfigError(
            "schedule.warmup_steps",
            warmup,
            rule=f"is below training.train_steps {sections.training.train_steps}, or the peak is never reached",
            cure=f"schedule.warmup_steps={sections.training.train_steps // 10}",
        )


def _min_lr_not_above_peak(sections: TrainingSections) -> None:
    low, peak = sections.schedule.min_lr, sections.optimizer.lr
    if low > peak:
        raise ConfigError(
            "schedule.min_lr",
            low,
            rule=f"is at most optimizer.lr {peak}",
            cure=f"schedule.min_lr={peak / 10:g}",
        )


def _wsd_decay_fits_after_warmup(sections: TrainingSections) -> None:
    if sections.schedule.kind != "wsd":
        return
    fall, warmup, end = wsd_decay_steps(sections), sections.schedule.warmup_steps, decay_steps(sections)
    if warmup + fall > end:
        raise ConfigError(
            "schedule.wsd_decay_steps",
            fall,
            rule=f"fits between warmup and the end: {warmup} + {fall} is above {end}",
            cure=f"schedule.wsd_decay_steps={end - warmup}",
        )


def _wsd_decay_only_with_wsd(sections: TrainingSections) -> None:
    given, kind = sections.schedule.wsd_decay_steps, sections.schedule.kind
    if given is not None and kind != "wsd":
        raise ConfigError(
            "schedule.wsd_decay_steps",
            given,
            rule=f"belongs to schedule.kind wsd, and schedule.kind is {kind}",
            cure="schedule.wsd_decay_steps=null, or schedule.kind=wsd",
        )


def _keep_every_meets_the_interval(sections: TrainingSections) -> None:
    every, interval = sections.checkpoint.keep_every, sections.checkpoint.interval
    if every is None:
        return
    if interval is None:
        raise ConfigError(
            "checkpoint.keep_every",
            every,
            rule="keeps some of the checkpoints that checkpoint.interval writes, and that is not set",
            cure=f"checkpoint.interval={every}, or checkpoint.keep_every=null",
        )
    if every % interval:
        raise ConfigError(
            "checkpoint.keep_every",
            every,
            rule=f"is a multiple of checkpoint.interval {interval}, or most of the steps it names have no checkpoint",
            cure=f"checkpoint.keep_every={-(-every // interval) * interval}",
        )


def _rollback_needs_checkpoints(sections: TrainingSections) -> None:
    for field, action in (("guards.on_nan", sections.guards.on_nan), ("guards.on_spike", sections.guards.on_spike)):
        if action == "rollback" and sections.checkpoint.interval is None:
            tenth = max(1, sections.training.train_steps // 10)
            raise ConfigError(
                field,
                action,
                rule="returns to the newest checkpoint, and checkpoint.interval is not set, so there is none",
                cure=f"checkpoint.interval={tenth}, or {field}=skip",
            )
