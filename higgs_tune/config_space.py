"""The settings of the search space and of the baselines, and types shared by all settings."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

TargetPath = Literal[
    "attention", "text_mlp", "audio_mlp", "audio_attention", "text_head", "audio_head"
]
CrossAttention = Annotated[
    Literal["off", "audio_self", "text_to_audio"],
    # YAML 1.1 reads `off` as false; the original code's flag is a boolean, too.
    BeforeValidator(
        lambda value: ("audio_self" if value else "off") if isinstance(value, bool) else value
    ),
]
# How alpha grows with rank: the power of rank / ALPHA_RANK. All rules agree at ALPHA_RANK.
ALPHA_RANK = 16
AlphaRule = Literal["fixed", "rslora", "ratio"]
ALPHA_POWERS: dict[AlphaRule, float] = {"fixed": 0.0, "rslora": 0.5, "ratio": 1.0}
ALL_LINEAR: tuple[TargetPath, ...] = ("attention", "text_mlp", "audio_mlp")


def _takes_numbers(annotation: Any) -> bool:
    """Whether a field's type is a number, or has one among its items or alternatives."""
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


class Settings(BaseModel):
    """Immutable settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans as numbers: Python's True is 1, so pydantic would accept YAML's `yes`."""
        assert info.field_name is not None
        if _takes_numbers(cls.model_fields[info.field_name].annotation):
            if isinstance(value, bool):
                raise ValueError("Input should be a number, not a switch")
            if isinstance(value, list | tuple) and any(isinstance(one, bool) for one in value):
                raise ValueError("Input should be a list of numbers, not switches")
        return value


class Range(Settings):
    """A continuous search range."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range needs low above 0, found {self.low}")
        return self


PositiveRank = Annotated[int, Field(ge=1, le=1024)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
SystemText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class LearningRateRange(Range):
    """A range of learning rates: positive, and by default on a log scale."""

    low: PositiveFloat = 1e-4
    high: PositiveFloat = 3e-3
    log: bool = True


class PositiveRange(Range):
    """A range of factors."""

    low: PositiveFloat
    high: PositiveFloat


class WeightRange(Range):
    """A range of loss weights; 0 switches a loss off."""

    low: NonNegativeFloat
    high: NonNegativeFloat


class ShareRange(Range):
    """A range of shares below 1: a dropout or a warm-up of 1 would leave nothing to train on."""

    low: Share
    high: Share


# Where a setting may be written in several ways, the value's form decides which one is meant, so that an
# error concerns that one alone. pydantic adds these tags to an error's location; no setting has such a name.
_RANGE, _LIST, _NUMBER, _WORD = TAGS = ("<range>", "<list>", "<number>", "<word>")


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | BaseModel)


_ONE_OR_LIST = BeforeValidator(
    lambda value: value if _is_section(value) or isinstance(value, list | tuple) else [value]
)
_BY_FORM = Discriminator(lambda value: _RANGE if _is_section(value) else _LIST)
T = TypeVar("T")
RangeT = TypeVar("RangeT", bound=Range)
# One value fixes a parameter; it is kept as a list of one.
Choices = Annotated[tuple[T, ...], Field(min_length=1), _ONE_OR_LIST]
ChoicesOrRange = Annotated[
    Annotated[RangeT, Tag(_RANGE)] | Annotated[tuple[T, ...], Field(min_length=1), Tag(_LIST)],
    _BY_FORM,
    _ONE_OR_LIST,
]
CountOrAuto = Annotated[
    Annotated[int, Field(ge=1), Tag(_NUMBER)] | Annotated[Literal["auto"], Tag(_WORD)],
    Discriminator(lambda value: _WORD if str(value)[:1].isalpha() else _NUMBER),
]


def highest(setting: Range | tuple[float, ...]) -> float:
    """The highest value that a range or a list of values contains."""
    return setting.high if isinstance(setting, Range) else max(setting)


class SpaceSettings(Settings):
    """The search space: values to choose from, or a range. One value fixes a parameter."""

    rank: Choices[PositiveRank] = (4, 8, 16, 32)  # a flat integer range misleads the sampler
    learning_rate: ChoicesOrRange[LearningRateRange, PositiveFloat] = LearningRateRange()
    target_set: Choices[str] = ("all_linear",)  # names from target_sets
    cross_attention: Choices[CrossAttention] = ("off",)
    alpha: Choices[PositiveFloat] = (32.0,)  # LoRA's alpha at rank 16
    # at other ranks: the same, times the root of rank / 16 (rsLoRA), or times rank / 16
    alpha_rule: Choices[AlphaRule] = ("fixed",)
    # has an effect only with cross_attention on
    new_module_lr_factor: ChoicesOrRange[PositiveRange, PositiveFloat] = (0.1,)
    # share of each lora_A's inputs that a training step drops
    dropout: ChoicesOrRange[ShareRange, Share] = (0.0,)
    # share of num_steps in linear warm-up; then cosine
    warmup_fraction: ChoicesOrRange[ShareRange, Share] = (0.1,)
    text_loss_weight: ChoicesOrRange[WeightRange, NonNegativeFloat] = (1.0,)
    audio_loss_weight: ChoicesOrRange[WeightRange, NonNegativeFloat] = (1.0,)
    batch_clips: Choices[Annotated[int, Field(ge=1)]] = (8,)  # clips per step


class BaselineSettings(Settings):
    """Trials 0 and 1: what people set by hand without a search.

    Trial 0 has cross_attention off; trial 1 is the same with `audio_self`, and trains its modules.
    """

    rank: PositiveRank = 16
    alpha: PositiveFloat = 32.0
    alpha_rule: AlphaRule = "fixed"
    # the upper end of what community trainers of this model use
    learning_rate: PositiveFloat = 1e-4
    target_set: str = "all_linear"
    # clips per optimizer step; default: the first of space.batch_clips
    batch_clips: int | None = Field(default=None, ge=1)
    # run trial 1, too; its new modules may need more memory than any other trial
    with_audio_self: bool = True
