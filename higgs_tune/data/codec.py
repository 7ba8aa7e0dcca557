"""Audio codecs: wave ↔ codes at 25 frames a second, 8 codebooks.

`MelRvqCodec` is the small one that ships with the package; it has the interface of transformers'
`HiggsAudioV2TokenizerModel`, so that code written for one runs with the other.

Shape letters: B clips, N samples, T code frames, C codebooks, M mel bands, D features of a code frame.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn
from transformers import HiggsAudioV2TokenizerModel, PreTrainedConfig, PreTrainedModel
from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import (
    HiggsAudioV2TokenizerDecoderOutput,
    HiggsAudioV2TokenizerEncoderOutput,
)

from higgs_tune.errors import DataError, ModelError


class MelRvqCodecConfig(PreTrainedConfig):
    """Shape of a `MelRvqCodec`."""

    model_type = "mel_rvq_codec"

    sample_rate: int = 24_000
    mel_hop_length: int = 240  # samples between mel frames
    mel_frames_per_code: int = 4  # mel frames that one code frame describes
    num_mels: int = 80
    num_features: int = 128  # principal components kept of a code frame's mels
    fft_length: int = 1024
    min_hz: float = 40.0
    max_hz: float = 11_000.0
    magnitude_floor: float = 1e-2  # mel magnitudes below it are silence
    num_quantizers: int = 8
    codebook_size: int = 256
    num_phase_steps: int = 60  # Griffin-Lim iterations of a decode

    @property
    def hop_length(self) -> int:
        """Samples of one code frame."""
        return self.mel_hop_length * self.mel_frames_per_code

    @property
    def frame_rate(self) -> int:
        """Code frames a second."""
        return self.sample_rate // self.hop_length


class MelRvqCodec(PreTrainedModel):
    """Log-mel, projected on its principal components, in 8 residual k-means codebooks.

    Decoding inverts each step and finds the phase by Griffin-Lim. Both directions are
    deterministic; a clip of N samples has ceil(N / hop_length) code frames.
    """

    config: MelRvqCodecConfig
    window: nn.Parameter
    mel_filters: nn.Parameter
    mean: nn.Parameter
    projection: nn.Parameter
    codebooks: nn.Parameter

    config_class = MelRvqCodecConfig
    base_model_prefix = ""
    main_input_name = "input_values"

    def __init__(self, config: MelRvqCodecConfig) -> None:
        super().__init__(config)
        num_bins = config.fft_length // 2 + 1
        dim = config.num_mels * config.mel_frames_per_code
        shapes = {
            "window": (config.fft_length,),
            "mel_filters": (num_bins, config.num_mels),
            "mean": (dim,),
            "projection": (dim, config.num_features),  # orthonormal columns
            "codebooks": (config.num_quantizers, config.codebook_size, config.num_features),
        }
        # Parameters, not buffers: from_pretrained then loads each of them and names a missing one.
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a checkpoint or from the script that fits them."""

    def set_filters(self) -> None:
        """Fill in the window and the mel filters that the configuration defines."""
        config = self.config
        self.window.copy_(torch.hann_window(config.fft_length))
        self.mel_filters.copy_(
            torchaudio.functional.melscale_fbanks(
                config.fft_length // 2 + 1,
                config.min_hz,
                config.max_hz,
                config.num_mels,
                config.sample_rate,
            )
        )

    @torch.no_grad()
    def log_mel(self, wave_BN: Tensor) -> Tensor:
        """Log mel magnitudes (B, 4 T, M) of clips padded with silence to whole code frames."""
        config = self.config
        padding = -wave_BN.shape[-1] % config.hop_length
        wave_BN = nn.functional.pad(wave_BN.float(), (0, padding))
        spectrum = torch.stft(
            wave_BN,
            config.fft_length,
            config.mel_hop_length,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )[..., :-1]
        mel = spectrum.abs().transpose(1, 2) @ self.mel_filters
        return mel.clamp_min(config.magnitude_floor).log()

    def features(self, wave_BN: Tensor) -> Tensor:
        """What is quantised, (B, T, D)."""
        log_mel = self.log_mel(wave_BN)
        stacked = log_mel.reshape(log_mel.shape[0], -1, self.mean.shape[0])
        return (stacked - self.mean) @ self.projection

    @torch.no_grad()
    def encode(self, input_values: Tensor) -> HiggsAudioV2TokenizerEncoderOutput:
        """Codes of mono clips.

        Args:
            input_values: waves at `config.sample_rate`, shape (B, 1, N), N ≥ 1.

        Returns:
            An object whose `audio_codes` has shape (B, C, T), int64.
        """
        if input_values.ndim != 3 or input_values.shape[1] != 1 or input_values.shape[2] == 0:
            raise ValueError(f"needed waves of shape (B, 1, N), found {tuple(input_values.shape)}")
        residual_BTD = self.features(input_values[:, 0])
        codes = []
        for codebook in self.codebooks:
            # argmax of x·c - |c|²/2 is the nearest centroid.
            scores = residual_BTD @ codebook.T - codebook.square().sum(-1) / 2
            codes.append(scores.argmax(-1))
            residual_BTD = residual_BTD - codebook[codes[-1]]
        codes_BCT: Any = torch.stack(codes, dim=1)
        return HiggsAudioV2TokenizerEncoderOutput(audio_codes=codes_BCT)

    @torch.no_grad()
    def decode_log_mel(self, audio_codes: Tensor) -> Tensor:
        """Log mel magnitudes (B, 4 T, M) that codes (B, C', T) stand for, C' ≤ C."""
        parts = [
            codebook[codes]
            for codebook, codes in zip(self.codebooks, audio_codes.unbind(1), strict=False)
        ]
        features = torch.stack(parts).sum(0)
        stacked = features @ self.projection.T + self.mean
        return stacked.reshape(stacked.shape[0], -1, self.config.num_mels)

    @torch.no_grad()
    def decode(self, audio_codes: Tensor) -> HiggsAudioV2TokenizerDecoderOutput:
        """Waves of codes (B, C', T), C' ≤ C: fewer codebooks give a coarser sound.

        Returns:
            An object whose `audio_values` has shape (B, 1, T · hop_length).
        """
        if audio_codes.ndim != 3 or audio_codes.shape[2] == 0:
            raise ValueError(f"needed codes of shape (B, C, T), found {tuple(audio_codes.shape)}")
        config = self.config
        log_floor = float(np.log(config.magnitude_floor))
        log_mel = self.decode_log_mel(audio_codes)
        mel = log_mel.exp() * (log_mel > log_floor + 0.1)  # the floor stands for silence
        magnitudes = _invert_filters(mel, self.mel_filters)
        magnitudes = torch.cat([magnitudes, magnitudes[:, -1:]], dim=1).transpose(1, 2)
        devices = [mel.device] if mel.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)  # Griffin-Lim starts from random phases
            wave = torchaudio.functional.griffinlim(
                magnitudes,
                self.window,
                n_fft=config.fft_length,
                hop_length=config.mel_hop_length,
                win_length=config.fft_length,
                power=1.0,
                n_iter=config.num_phase_steps,
                momentum=0.99,
                length=audio_codes.shape[2] * config.hop_length,
                rand_init=True,
            )
        return HiggsAudioV2TokenizerDecoderOutput(audio_values=wave[:, None])


def _invert_filters(mel: Tensor, filters: Tensor, num_steps: int = 20) -> Tensor:
    """Non-negative magnitudes whose mel magnitudes come close to `mel`.

    Multiplicative updates for non-negative least squares (Lee and Seung, 2001), started from the
    filters' transpose.
    """
    gram = filters @ filters.T
    target = mel @ filters.T
    magnitudes = target / filters.sum(1).clamp_min(1e-6) / filters.sum(0).mean()
    for _ in range(num_steps):
        magnitudes = magnitudes * target / (magnitudes @ gram).clamp_min(1e-8)
    return magnitudes


Codec = MelRvqCodec | HiggsAudioV2TokenizerModel


def embedded_codec_path() -> Path:
    """Folder of the codec that ships with the package."""
    return Path(str(resources.files("higgs_tune").joinpath("embedded", "codec")))


def load_codec(path: str, device: str | torch.device = "cpu", revision: str | None = None) -> Codec:
    """A codec in eval mode.

    Args:
        path: "embedded", a folder that `save_pretrained` wrote, or a Hub id.
        revision: Hub commit; needed for a Hub id.

    Raises:
        ModelError: nothing to load there, or not a codec that this version knows.
    """
    folder = embedded_codec_path() if path == "embedded" else Path(path)
    codec_class: type[Codec] = HiggsAudioV2TokenizerModel
    if folder.is_dir():
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise ModelError(f"codec {path}: {config_path} is missing. Give a folder with a codec.")
        model_type = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
        known = {
            "mel_rvq_codec": MelRvqCodec,
            "higgs_audio_v2_tokenizer": HiggsAudioV2TokenizerModel,
        }
        if model_type not in known:
            raise ModelError(
                f"codec {path}: model_type is {model_type!r}, needed one of {sorted(known)}."
            )
        codec_class = known[model_type]
    elif path == "embedded" or path.startswith((".", "/", "~")):
        raise ModelError(f"codec {path}: no such folder ({folder}).")
    elif revision is None:
        raise ModelError(
            f"codec {path}: a Hub id needs a revision (a commit), because checkpoints there are "
            "rewritten in place; no folder of this name exists either."
        )
    source = str(folder) if folder.is_dir() else path
    try:
        codec: Any = codec_class.from_pretrained(
            source, revision=revision or "main", dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"codec {path}: cannot be loaded: {error}") from error
    return codec.to(device).eval()


def encode_clip(codec: Codec, wave: np.ndarray, rate_hz: int) -> np.ndarray:
    """Codes (T, C), uint16, of one mono clip of any rate.

    One clip at a time and without padding: padding changes the codes of a neural codec.

    Raises:
        DataError: the clip is empty, not one-dimensional or not finite.
    """
    if wave.ndim != 1 or wave.size == 0:
        raise DataError(f"clip has shape {wave.shape}, needed one channel with samples.")
    if not np.isfinite(wave).all():
        raise DataError("clip has samples that are not finite numbers.")
    wave_N = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).to(codec.device)
    wave_N = torchaudio.functional.resample(wave_N, rate_hz, codec.config.sample_rate)
    with torch.inference_mode():
        output: Any = codec.encode(wave_N[None, None])
    return output.audio_codes[0].T.cpu().numpy().astype(np.uint16)


def decode_clip(codec: Codec, codes_TC: np.ndarray) -> np.ndarray:
    """The float32 wave, at the codec's rate, of one clip's codes (T, C)."""
    codes = torch.from_numpy(codes_TC.astype(np.int64)).T[None].to(codec.device)
    with torch.inference_mode():
        output: Any = codec.decode(codes)
    return output.audio_values[0, 0].float().cpu().numpy()
