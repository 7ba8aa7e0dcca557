"""Settings of `higgs-tune data prepare`."""

from pydantic import Field

from higgs_tune.config import Settings


class PrepareOptions(Settings):
    """Which rows of a manifest are used and how they are split."""

    max_rejected: float = Field(default=0.05, ge=0)  # below 1 a share of all rows, else a count
    val_fraction: float = Field(default=0.1, ge=0, le=0.5)  # of the clips, if no split column
    min_seconds: float = Field(default=0.1, gt=0)  # shortest recording
    max_seconds: float = Field(default=30.0, gt=0)  # longest recording
    max_text_chars: int = Field(default=2000, ge=1)  # longest text of one part
    clips_from_chat: bool = False  # chats that only wrap a recording and its text become clips
    seed: int = Field(default=0, ge=0)  # of the split
    rows_per_shard: int = Field(default=256, ge=1)  # an interrupted run keeps whole shards only

    def allowed(self, num_total: int) -> int:
        """How many of `num_total` rows may be rejected."""
        share = self.max_rejected < 1
        return int(self.max_rejected * num_total) if share else int(self.max_rejected)
