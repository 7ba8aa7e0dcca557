"""How the report says things: figures with their digits, names of settings, one answer to a question."""

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
    "text_loss_weight": "text loss weight",
    "audio_loss_weight": "audio loss weight",
    "batch_clips": "clips per step",
}


@dataclass(frozen=True)
class Answer:
    """One question that a reader brings, its figure and a sentence or two."""

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


def nats(value: float) -> str:
    """A loss with the digits that mean something."""
    return f"{value:.2f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign; a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def setting_name(setting: str) -> str:
    """A setting's name in a sentence."""
    return SETTING_NAMES.get(setting, setting)


def rise_percent(base: dict[str, float], audio: float) -> float:
    """Change of the audio loss in percent of its start."""
    return 100 * (audio / base[m.VAL_AUDIO_NLL] - 1)
