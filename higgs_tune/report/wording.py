"""The report's wording: number formats, names of settings, and the answer to one question."""

from dataclasses import dataclass
from typing import Literal

from higgs_tune import metrics as m
from higgs_tune.config import TrialConfig

Tone = Literal["good", "fair", "poor", "plain"]

SETTING_NAMES = {
    "learning_rate": "learning rate",
    "target_set": "target set",
    "alpha_rule": "alpha rule",
    "new_module_lr_factor": "new-module rate factor",
    "warmup_fraction": "warm-up fraction",
    "text_loss_weight": "text loss weight",
    "audio_loss_weight": "audio loss weight",
    "batch_clips": "clips per step",
}


@dataclass(frozen=True)
class Answer:
    """A reader's question, answered by a figure and a sentence or two."""

    key: str
    question: str
    figure: str
    sentence: str
    tone: Tone


def describe(config: TrialConfig) -> str:
    """A configuration in one line."""
    rates = f"{config.learning_rate:.1e}" + "".join(
        f", {change.learning_rate:.1e} from step {change.step}" for change in config.schedule
    )
    alpha = (
        ""
        if config.alpha_rule == "fixed"
        else f"alpha {config.lora_alpha:g} ({config.alpha_rule}), "
    )
    return (
        f"rank {config.rank}, {alpha}learning rate {rates}, "
        f"cross_attention {config.cross_attention}, targets {' + '.join(config.targets)}"
    )


def nats(value: float, digits: int = 2) -> str:
    """A loss, rounded to `digits`; with a true minus, and none before a zero."""
    return f"{value:z.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign, + for zero; with a true minus."""
    return f"{value:+z.{digits}f}".replace("-", "−")


def digits_apart(one: float, other: float, digits: int) -> int:
    """Decimals needed to show that two numbers differ: at least `digits`, at most 6."""
    return next((d for d in range(digits, 6) if f"{one:.{d}f}" != f"{other:.{d}f}"), 6)


def plural(count: int, thing: str) -> str:
    """The count and its noun, such as "2 seeds"."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def setting_name(setting: str) -> str:
    """A setting's name as sentences and figures show it."""
    return SETTING_NAMES.get(setting, setting)


def rise_percent(base: dict[str, float], audio: float) -> float:
    """Change of the audio loss, in percent of the base's."""
    return 100 * (audio / base[m.VAL_AUDIO_NLL] - 1)


def measured(num_clips: int | None) -> str | None:
    """What the losses are measured on; None if the sweep did not record it."""
    if num_clips is None:
        return None
    return (
        f"Losses are measured on {num_clips} held-out clips, the same for every trial; audio gain pairs "
        f"each with another clip's audio ({num_clips} pairs)."
    )
