"""Audio codecs: wave ↔ codes (25 frames per second in 8 codebooks for Higgs Audio V2).

Two classes share one interface: `HiggsAudioV2TokenizerModel`, the codec of the published checkpoint,
and `MelRvqCodec`, which ships with the package.

Shape letters: N samples, T code frames, C codebooks.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from safetensors import SafetensorError
from transformers import HiggsAudioV2TokenizerModel
from transformers.utils import logging as hf_logging

from higgs_tune.base_source import could_be_hub_id
from higgs_tune.data.mel_codec import MelRvqCodec
from higgs_tune.errors import DataError, ModelError, NoMemoryError, is_out_of_memory

EMBEDDED_CODEC = Path(__file__).parents[1] / "embedded" / "codec"
_MAX_CODES = 1 << 16  # codes are stored as uint16

Codec = MelRvqCodec | HiggsAudioV2TokenizerModel


def load_codec(path: str, device: str | torch.device = "cpu", revision: str | None = None) -> Codec:
    """Load a codec in eval mode and check it by encoding a second of noise.

    Args:
        path: "embedded", a folder that `save_pretrained` wrote, or a Hub id.
        revision: commit on the Hub; required for a Hub id.

    Raises:
        ModelError: there is nothing to load, this version does not know the codec, or its weights and
            configuration do not match.
        NoMemoryError: the device has no memory for the codec, or for encoding a second.
    """
    source, codec_class = _find_codec(path, revision)
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()  # a bar in a log file is noise
    try:
        loaded: Any = codec_class.from_pretrained(
            source, revision=revision or "main", dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        _refuse_no_memory(error, path, "cpu")
        raise ModelError(f"codec {path}: cannot be loaded: {error}") from error
    codec: Codec = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"codec {path}: lacks {len(missing)} weights, {missing[0]} among them. "
            "Download the codec again."
        )
    try:
        codec.to(device).eval()  # type: ignore[arg-type]
        _probe(codec, path)
    except (RuntimeError, MemoryError) as error:
        _refuse_no_memory(error, path, device)
        raise
    return codec


def _refuse_no_memory(error: Exception, path: str, device: str | torch.device) -> None:
    """Raise NoMemoryError if `error` says that memory ran out."""
    if is_out_of_memory(error):
        raise NoMemoryError(
            f"codec {path}: not enough memory on {device}: {error}. Free some, or choose another device."
        ) from error


def _find_codec(path: str, revision: str | None) -> tuple[str, type[Codec]]:
    """Return the source for `from_pretrained`, and the class to load it with."""
    folder = EMBEDDED_CODEC if path == "embedded" else Path(path).expanduser()
    if not folder.is_dir():
        if path == "embedded" or not could_be_hub_id(path):
            raise ModelError(
                f"codec {path}: no such folder ({folder}). Give a folder, a Hub id (owner/name) with "
                "--codec-revision, or embedded."
            )
        if revision is None:
            raise ModelError(
                f"codec {path}: a Hub id needs a revision (a commit; --codec-revision), because "
                "checkpoints there are rewritten in place; no folder of this name exists either."
            )
        return path, HiggsAudioV2TokenizerModel
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise ModelError(f"codec {path}: {config_path} is missing. Give a folder with a codec.")
    try:
        model_type = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"codec {path}: {config_path} is not a JSON object: {error}") from None
    known: dict[str, type[Codec]] = {
        "mel_rvq_codec": MelRvqCodec,
        "higgs_audio_v2_tokenizer": HiggsAudioV2TokenizerModel,
    }
    if model_type not in known:
        raise ModelError(
            f"codec {path}: model_type is {model_type!r}, needed one of {sorted(known)}."
        )
    return str(folder), known[model_type]


def _probe(codec: Codec, path: str) -> None:
    """Encode a second of noise; check that its codes vary, have the configured shape and can be stored."""
    config = codec.config
    seconds_to_frames = config.sample_rate / config.hop_length
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, config.sample_rate, generator=generator) * 0.1
    try:
        with torch.inference_mode():
            output: Any = codec.encode(noise.to(codec.device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"codec {path}: a second of audio at {config.sample_rate} Hz cannot be encoded ({error}). "
            "sample_rate, downsampling ratios and semantic_sample_rate of its config.json do not "
            "match: use the config.json that came with the weights."
        ) from None
    found = tuple(output.audio_codes.shape[1:])
    needed = (config.num_quantizers, math.ceil(seconds_to_frames))
    if found != needed:
        raise ModelError(
            f"codec {path}: a second of audio gives {found[0]} codebooks × {found[1]} frames, its "
            f"config.json says {needed[0]} × {needed[1]}. Use the config.json that came with the weights."
        )
    if config.codebook_size > _MAX_CODES:
        raise ModelError(
            f"codec {path}: codebook_size {config.codebook_size} is more than the {_MAX_CODES} codes "
            "that a dataset can hold."
        )
    if int(output.audio_codes.max()) == int(output.audio_codes.min()):
        raise ModelError(
            f"codec {path}: noise gets the same code everywhere, so its codebooks are empty. "
            "Download the codec again."
        )


def weights_digest(codec: Codec) -> str:
    """SHA-256 of the weights, whatever files they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\0".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_clip(codec: Codec, wave: np.ndarray, rate_hz: int) -> np.ndarray:
    """Encode one mono clip of any rate into codes (T, C), uint16.

    One clip at a time and without padding: padding changes the codes of a neural codec.

    Raises:
        DataError: the clip is empty, not one-dimensional, not finite, or shorter than the one frame that
            `HiggsAudioV2TokenizerModel` needs.
    """
    assert not codec.training, "dropout and layer drop would change the codes"
    if wave.ndim != 1 or wave.size == 0:
        raise DataError(f"clip has shape {wave.shape}, needed one channel with samples.")
    if not np.isfinite(wave).all():
        raise DataError("clip has samples that are not finite numbers.")
    wave_N = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).to(codec.device)
    wave_N = torchaudio.functional.resample(wave_N, rate_hz, codec.config.sample_rate)
    shortest = codec.config.hop_length if isinstance(codec, HiggsAudioV2TokenizerModel) else 1
    if len(wave_N) < shortest:
        raise DataError(
            f"clip has {len(wave_N)} samples at {codec.config.sample_rate} Hz, the codec needs "
            f"{shortest}. Leave such clips out with a higher --min-seconds."
        )
    with torch.inference_mode():
        output: Any = codec.encode(wave_N[None, None])
    return output.audio_codes[0].T.cpu().numpy().astype(np.uint16)


def decode_clip(codec: Codec, codes_TC: np.ndarray) -> np.ndarray:
    """Decode one clip's codes (T, C) into a float32 wave at the codec's rate."""
    codes = torch.from_numpy(codes_TC.astype(np.int64)).T[None].to(codec.device)
    with torch.inference_mode():
        output: Any = codec.decode(codes)
    return output.audio_values[0, 0].float().cpu().numpy()
