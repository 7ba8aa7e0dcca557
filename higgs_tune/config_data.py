"""The settings of what is trained and validated on."""

from pydantic import Field, model_validator

from higgs_tune.config_space import Settings, SystemText
from higgs_tune.local_path import LocalPath


class TaskMix(Settings):
    """How often each task is drawn when a batch is filled; relative weights."""

    # audio, then its text: the only task whose text can use audio
    transcribe: float = Field(default=1.0, ge=0)
    speak: float = Field(default=1.0, ge=0)  # text, then audio
    # reference text and audio, then target text, then target audio
    clone: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _some_task(self) -> "TaskMix":
        if self.transcribe + self.speak + self.clone <= 0:
            raise ValueError("at least one task needs a weight above 0")
        return self


class DataSettings(Settings):
    """What is trained and validated on."""

    # a folder made by `higgs-tune data prepare`, or "embedded:NAME"
    path: LocalPath = "embedded:arabic"
    tasks: TaskMix = TaskMix()
    max_frames: int = Field(default=750, ge=4)  # longest clip in codec frames (25 per second)
    max_text_tokens: int = Field(default=512, ge=1)  # longest text of one part
    # longest conversation, in rows of text and audio; default: enough to clone the longest clip
    max_rows: int | None = Field(default=None, ge=16)
    # validation clips, drawn once, the same for every trial
    num_val_clips: int = Field(default=48, ge=2)
    # a system turn before every speak or clone example; chat rows have their own
    system_text: SystemText | None = None
