"""Every setting of a sweep and of a training run, typed, bounded and documented once.

The YAML, `--set a.b=c` and `best_config.yaml` use these names. `TrialConfig` is one point of the
search space, with everything needed to repeat its training; `SweepConfig` is a whole sweep.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from higgs_tune.config_data import DataSettings
from higgs_tune.config_scheduler import SchedulerSettings
from higgs_tune.config_space import (
    ALL_LINEAR,
    ALPHA_POWERS,
    ALPHA_RANK,
    AlphaRule,
    BaselineSettings,
    CountOrAuto,
    CrossAttention,
    PositiveFloat,
    PositiveRank,
    Settings,
    Share,
    SpaceSettings,
    TargetPath,
    highest,
)
from higgs_tune.errors import did_you_mean
from higgs_tune.local_path import LocalPath


class BaseSettings(Settings):
    """The frozen base model."""

    path: str = "embedded"  # "embedded", a local folder, or a Hub id
    # Hub commit; required for a Hub id, because checkpoints are rewritten in place
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", …
    # for whole models, as in generation; training, which uses torch's SDPA, refuses the others
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    # torch.compile the training forward: faster steps, but each kind of pack compiles first
    compile: bool = False
    # for a checkpoint without a text head: refuse it, or start the head from the token embedding
    text_head: Literal["checkpoint", "from_embedding"] = "checkpoint"


class TrainSettings(Settings):
    """What every trial of a sweep has in common."""

    num_steps: int = Field(default=150, ge=1)  # optimizer steps of a full-budget trial
    report_every_steps: int = Field(default=25, ge=1)  # validate and report every so many steps
    # where the cosine ends, as a share of the peak
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)  # AdamW, decoupled
    clip_norm: float = Field(default=0.1, gt=0)  # gradient norm limit of one adapter
    # rows in one forward of one adapter; longer steps accumulate
    token_budget: int = Field(default=4096, ge=64)


class TuneSettings(Settings):
    """How the search is run."""

    # search trials, including the baselines
    num_trials: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)  # sampler, adapters, data order
    scheduler: SchedulerSettings = SchedulerSettings()
    num_workers: int = Field(default=1, ge=1)  # processes, each with its own base; one per GPU
    # trials that train together around one base; "auto": as many as the worker's device holds
    slots_per_worker: CountOrAuto = 4
    # share of report_every_steps, at least one step unless 0, that a trial trains on while the decision
    # about its report is pending; with several workers it trains until the decision comes
    ahead_fraction: float = Field(default=0.05, ge=0, le=1)
    # default: as many as let all workers run at once; 1 while no node with the workers' GPUs is up
    cpus_per_worker: int | None = Field(default=None, ge=1)
    gpus_per_worker: int = Field(default=0, ge=0, le=1)  # a pack trains on one
    # restarts of one trial from its checkpoint after its worker died
    max_failures: int = Field(default=2, ge=0)
    storage: str | None = None  # Optuna URL; default: the journal file in the results folder
    time_limit_s: float | None = Field(default=None, gt=0)  # no new trial of the search after this


class ObjectiveSettings(Settings):
    """val/text/nll is minimised subject to the audio constraint."""

    # val/audio/nll_per_code may rise by this share of its initial value
    audio_tolerance: float = Field(default=0.05, ge=0)


class ConfirmSettings(Settings):
    """The best few configurations are trained again with fresh seeds, beside the baseline (trial 0)."""

    num_configs: int = Field(default=2, ge=0)  # 0 skips the stage
    num_seeds: int = Field(default=2, ge=1)


class SweepConfig(Settings):
    """A whole sweep."""

    name: str = Field(default="sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    results_dir: LocalPath = "results"
    base: BaseSettings = BaseSettings()
    data: DataSettings = DataSettings()
    target_sets: dict[str, tuple[TargetPath, ...]] = {
        "all_linear": ALL_LINEAR,
        "attention": ("attention",),
    }
    space: SpaceSettings = SpaceSettings()
    baseline: BaselineSettings = BaselineSettings()
    train: TrainSettings = TrainSettings()
    tune: TuneSettings = TuneSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    confirm: ConfirmSettings = ConfirmSettings()

    @property
    def results_root(self) -> Path:
        """The folder that holds the results folders of sweeps."""
        return Path(self.results_dir).expanduser()

    @property
    def cross_attention_modes(self) -> set[CrossAttention]:
        """What the trials' cross_attention may be, the baselines' included."""
        modes: set[CrossAttention] = {"off", *self.space.cross_attention}
        if self.baseline.with_audio_self:
            modes.add("audio_self")
        return modes

    @property
    def num_baselines(self) -> int:
        """How many of the first trials are configurations set by hand."""
        return 1 + self.baseline.with_audio_self

    @property
    def past_warmup(self) -> int:
        """The first step beyond the longest warm-up at which trials report."""
        interval = self.train.report_every_steps
        num_warmup = int(highest(self.space.warmup_fraction) * self.train.num_steps)
        return (num_warmup // interval + 1) * interval

    @model_validator(mode="after")
    def _consistent(self) -> "SweepConfig":
        named = [("space.target_set", name) for name in self.space.target_set]
        for where, name in [*named, ("baseline.target_set", self.baseline.target_set)]:
            if name not in self.target_sets:
                near = did_you_mean(name, self.target_sets)
                shipped = name in SweepConfig.model_fields["target_sets"].default
                replaced = (
                    ". A target_sets section replaces the shipped sets: list "
                    f"{name} in it, too, or name another set"
                )
                raise ValueError(
                    f"{where}: unknown target set {name!r}{near}; target_sets defines "
                    f"{sorted(self.target_sets)}{replaced if shipped else ''}"
                )
        for name, paths in self.target_sets.items():
            if not paths:
                raise ValueError(f"target_sets.{name}: empty; list at least one path")
            if "audio_attention" in paths:
                raise ValueError(
                    f"target_sets.{name}: audio_attention is trained whenever cross_attention is on "
                    "and does not exist otherwise; remove it here and list cross_attention values instead"
                )
        if self.train.report_every_steps > self.train.num_steps:
            raise ValueError("train.report_every_steps must not exceed train.num_steps")
        if self.base.device.startswith("cuda") and not self.tune.gpus_per_worker:
            raise ValueError(
                f"base.device is {self.base.device} and tune.gpus_per_worker 0: all workers would share "
                "one GPU. Set tune.gpus_per_worker to 1, or base.device to cpu"
            )
        kind, _, index = self.base.device.partition(":")
        if kind == "cuda" and index.isdecimal() and int(index):
            raise ValueError(
                f"base.device is {self.base.device}, and each worker of a sweep sees one GPU, as cuda:0. Set "
                f"base.device to auto, and choose the GPU with CUDA_VISIBLE_DEVICES={index}"
            )
        train = self.train
        self.tune.scheduler.refuse_impossible(
            self.tune.num_trials - self.num_baselines,
            train.num_steps,
            train.report_every_steps,
            self.past_warmup,
        )
        return self


class RunSettings(Settings):
    """How `higgs-tune train` runs. Only the first two change the weights after a given step."""

    # folder of an adapter, this tool's or PEFT's, whose weights training starts from
    start_from: LocalPath | None = None
    # times batch_clips times the number of processes: clips of one optimizer step
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    # checkpoint every so many steps, as well as at each validation
    save_every_steps: int | None = Field(default=None, ge=1)
    keep_checkpoints: int = Field(default=0, ge=0)  # so many of the newest stay in checkpoints/
    # best_adapter: val/audio/nll_per_code may rise by this share of its initial value
    audio_tolerance: float = Field(default=0.05, ge=0)
    # end after so many validations without a better val/text/nll
    early_stop_patience: int | None = Field(default=None, ge=1)
    early_stop_min_delta: float = Field(default=0.0, ge=0)  # nats by which it must improve
    # validation clips to transcribe at each validation
    num_samples: int = Field(default=4, ge=0)
    max_sample_tokens: int = Field(default=128, ge=1)  # longest text of a sample
    tensorboard: bool = True  # also write the metrics for TensorBoard


class RateChange(Settings):
    """The rates that a trial of a population trains with from a step on."""

    step: int = Field(ge=1)  # optimizer steps done before the change
    learning_rate: PositiveFloat
    new_module_lr_factor: PositiveFloat
    text_loss_weight: float = Field(ge=0)
    audio_loss_weight: float = Field(ge=0)
    copied_from: str  # the trial whose weights it took over at that step


RATES = ("learning_rate", "new_module_lr_factor", "text_loss_weight", "audio_loss_weight")


class TrialConfig(Settings):
    """One point of the search space, complete: with its base and dataset, it can be trained again."""

    rank: PositiveRank
    alpha: PositiveFloat  # at rank 16
    alpha_rule: AlphaRule = "fixed"  # how it changes at other ranks
    # audio_attention present iff cross_attention is on
    targets: tuple[TargetPath, ...] = Field(min_length=1)
    target_set: str = "custom"  # the name the targets came from, for tables
    cross_attention: CrossAttention = "off"
    learning_rate: PositiveFloat
    # cross-attention modules train at learning_rate times this
    new_module_lr_factor: PositiveFloat = 0.1
    dropout: Share = 0.0  # share of the inputs of each lora_A that a training step drops
    text_loss_weight: float = Field(default=1.0, ge=0)
    audio_loss_weight: float = Field(default=1.0, ge=0)
    batch_clips: int = Field(default=8, ge=1)
    num_steps: int = Field(ge=1)
    report_every_steps: int = Field(ge=1)
    warmup_fraction: Share = 0.1
    min_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=0.1, gt=0)
    token_budget: int = Field(default=4096, ge=64)
    seed: int = Field(default=0, ge=0)  # adapter initialisation and data order
    # changes to the rates above, by step, in a population's trial
    schedule: tuple[RateChange, ...] = ()

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha: LoRA's scale is this divided by rank.

        Source: Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, for
        a scale that falls with the root of rank.
        """
        return self.alpha * (self.rank / ALPHA_RANK) ** ALPHA_POWERS[self.alpha_rule]

    def rates_at(self, step: int) -> dict[str, float]:
        """The `RATES` of the optimizer step that follows `step` steps."""
        past = [change for change in self.schedule if change.step <= step]
        source = past[-1] if past else self
        return {name: getattr(source, name) for name in RATES}

    @model_validator(mode="after")
    def _consistent(self) -> "TrialConfig":
        targeted = "audio_attention" in self.targets
        if set(self.targets) == {"audio_attention"}:
            raise ValueError("targets: audio_attention alone has no LoRA; add a path of the base")
        if targeted and self.cross_attention == "off":
            raise ValueError("targets: audio_attention does not exist with cross_attention off")
        if not targeted and self.cross_attention != "off":
            raise ValueError(
                f"targets: cross_attention {self.cross_attention} adds modules that start as the identity; "
                "without audio_attention among the targets they would stay so"
            )
        for rates in (self, *self.schedule):
            if rates.text_loss_weight + rates.audio_loss_weight <= 0:
                raise ValueError(
                    "text_loss_weight and audio_loss_weight are both 0: nothing to learn"
                )
        steps = [change.step for change in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"schedule: its steps must increase, found {steps}")
        return self
