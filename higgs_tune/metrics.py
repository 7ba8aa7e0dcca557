"""Names of the reported metrics: `split/modality/what`, in nats unless said otherwise."""

import math
from collections.abc import Mapping
from typing import Any

VAL_TEXT_NLL = "val/text/nll"  # per text token of the target, held-out clips, after their own audio
VAL_TEXT_NLL_SWAPPED = "val/text/nll_swapped"  # the same texts after another clip's audio
VAL_AUDIO_GAIN = "val/text/audio_gain"  # nll_swapped - nll: above 0, text uses audio
VAL_AUDIO_NLL = "val/audio/nll_per_code"  # mean over codebooks of nats per code
TRAIN_TEXT_NLL = "train/text/nll"  # mean over the interval's target tokens
TRAIN_AUDIO_NLL = "train/audio/nll_per_code"
STEP = "step"  # optimizer steps done
EPOCH = "epoch"  # passes over the training rows so far, with a fraction
TOKENS_PER_S = "tokens_per_s"  # rows this adapter trained per second of the pack's time
TRAIN_TIME_S = "train_time_s"  # seconds of the pack's steps, reading and tokenising included
LEARNING_RATE = "train/learning_rate"  # of the interval's last step, warm-up and cosine included
GRAD_NORM = "train/grad_norm"  # median over the interval, before clipping
# `higgs-tune evaluate`: means over the generated clips
EOS_RATE = "speech/eos_rate"  # share that ended by EOS instead of at the length limit
LENGTH_RATIO = "speech/length_ratio"  # generated seconds / recorded seconds
MEL_DISTANCE = "speech/mel_distance_db"  # mel cepstral distortion to the recording, aligned
SPEAKER_SIMILARITY = "speech/speaker_similarity"  # cosine with the reference's voice
SPEECH_CER = "speech/cer"  # character error rate of a recogniser's transcription
TRANSCRIPTION_CER = "text/transcription_cer"  # of the model's own transcription of the recording
PEAK_MEMORY_MIB = "peak_memory_mib"  # of the worker's process so far; GPU memory if it has a GPU


def grad_share(path: str) -> str:
    """Name of a target path's share of the squared norm of Adam's averaged gradient."""
    return f"train/grad_share/{path}"


def val_codebook_nll(codebook: int) -> str:
    """Name of the validation nats per code of one codebook (0-based)."""
    return f"val/audio/nll_codebook_{codebook}"


STATUSES = ("completed", "pruned", "diverged", "out_of_memory", "failed", "cancelled")
BROKEN = ("diverged", "out_of_memory", "failed")  # statuses that a trial's own configuration causes
HEALTHY = ("running", "completed")  # the results that are compared and whose checkpoints are kept
# Another kind of GPU rounds differently in bfloat16; another base or other clips differ by far more.
_BASE_TOLERANCE = 0.01  # relative, and in nats


def not_finite(figures: Mapping[str, float]) -> str | None:
    """The first metric that is not finite, in words; None if all are finite."""
    odd = (f"{name} is {value}" for name, value in figures.items() if not math.isfinite(value))
    return next(odd, None)


def base_difference(expected: Mapping[str, Any], found: Mapping[str, float]) -> str | None:
    """How an untouched base's validation metrics differ from the expected ones; None if they do not."""
    for metric, value in expected.items():
        if not metric.startswith("val/") or value is None:  # null in a file: not finite
            continue
        now = found.get(metric, math.nan)
        if not math.isclose(now, value, rel_tol=_BASE_TOLERANCE, abs_tol=_BASE_TOLERANCE):
            return f"its base has {metric} {now:.4f}, needed {value:.4f}"
    return None
