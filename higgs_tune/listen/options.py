"""Settings of `higgs-tune generate` and `higgs-tune evaluate`; imports no torch."""

from typing import Any, Literal

from pydantic import Field

from higgs_tune.config import Settings

# What to do after a file could not be written; those before it are whole.
AGAIN = "Free space, or give another --out, and run the command again."


class SpeechOptions(Settings):
    """How speech is drawn from a model.

    Temperature, top_k and top_p are those of Boson's own generation example. What a checkpoint's
    generation_config.json says beyond them, such as `ras_win_len`, holds.
    """

    seed: int = Field(default=0, ge=0)  # the first take's; each further take has the next one
    temperature: float = Field(default=1.0, ge=0)  # 0 takes the likeliest code
    top_k: int = Field(default=50, ge=0)  # codes to draw from; 0: all
    top_p: float = Field(default=0.95, gt=0, le=1)  # the fewest codes with this probability; 1: all
    max_seconds: float = Field(default=30.0, gt=0)  # speech is cut off here

    def sampling(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


class EvaluateOptions(Settings):
    """How much is measured on the held-out clips."""

    num_clips: int = Field(default=48, ge=2)  # validation clips of the losses
    num_generated: int = Field(default=8, ge=1)  # of those, spoken and transcribed by each system
    batch_clips: int = Field(default=8, ge=1)  # spoken together
    task: Literal["clone", "speak"] = "clone"  # with a reference of the same voice, or without
