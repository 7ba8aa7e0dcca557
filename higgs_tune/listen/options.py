"""Settings of `higgs-tune generate` and `higgs-tune evaluate`; imports no torch."""

from typing import Any, Literal

from pydantic import Field

from higgs_tune.config import Settings

# Advice if a file cannot be written; files written before it are complete.
WRITE_ADVICE = "Free space, or give another --out, and run the command again."


class SpeechOptions(Settings):
    """How speech is sampled from a model.

    The default temperature, top_k and top_p are those of Boson's own generation example. Other settings in
    a checkpoint's generation_config.json, such as `ras_win_len`, apply too.
    """

    seed: int = Field(default=0, ge=0)  # of the first take; each further take uses the next one
    temperature: float = Field(default=1.0, ge=0)  # 0 takes the likeliest code
    top_k: int = Field(default=50, ge=0)  # sample from this many likeliest codes; 0: all
    top_p: float = Field(default=0.95, gt=0, le=1)  # fewest codes with this probability; 1: all
    max_seconds: float = Field(default=30.0, gt=0)  # longer speech is cut off

    def sampling(self) -> dict[str, Any]:
        """Arguments for transformers' `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }


class EvaluateOptions(Settings):
    """What is measured on the held-out clips."""

    num_clips: int = Field(default=48, ge=2)  # validation clips to measure losses on
    num_generated: int = Field(default=8, ge=1)  # clips each system speaks and transcribes
    batch_clips: int = Field(default=8, ge=1)  # spoken in one batch
    task: Literal["clone", "speak"] = "clone"  # with a reference of the speaker's voice, or without
