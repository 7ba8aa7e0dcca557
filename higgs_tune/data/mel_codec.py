"""The small codec that ships with the package.

It has the interface of transformers' `HiggsAudioV2TokenizerModel`, so that code written for one works
with the other.

Shape letters: B clips, N samples, T code frames, C codebooks, M mel bands, D features of a code frame.
"""

from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer import (
    HiggsAudioV2TokenizerDecoderOutput,
    HiggsAudioV2TokenizerEncoderOutput,
)


class MelRvqCodecConfig(PreTrainedConfig):
    """Shape of a `MelRvqCodec`."""

    model_type = "mel_rvq_codec"

    sample_rate: int = 24_000
    mel_hop_length: int = 240  # samples between mel frames
    mel_frames_per_code: int = 4  # mel frames in one code frame
    num_mels: int = 80
    num_features: int = 128  # principal components kept per code frame
    fft_length: int = 1024
    min_hz: float = 40.0
    max_hz: float = 11_000.0
    magnitude_floor: float = 1e-2  # mel magnitudes below this count as silence
    num_quantizers: int = 8
    codebook_size: int = 256
    num_phase_steps: int = 60  # Griffin-Lim iterations in `decode`

    @property
    def hop_length(self) -> int:
        """Samples of one code frame."""
        return self.mel_hop_length * self.mel_frames_per_code

    @property
    def frame_rate(self) -> int:
        """Code frames per second."""
        return self.sample_rate // self.hop_length


class MelRvqCodec(PreTrainedModel):
    """Log-mel projected on its principal components and quantised by 8 residual k-means codebooks.

    Decoding inverts each step and estimates the phase with Griffin-Lim. Both directions are
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
        # Parameters, not buffers, so that from_pretrained loads each of them and reports a missing one.
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape), requires_grad=False))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: weights come from a checkpoint or from the script that fits them."""

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
        """Return the features to quantise, (B, T, D)."""
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
        """Decode codes (B, C', T), C' ≤ C, into log mel magnitudes (B, 4 T, M)."""
        parts = [
            codebook[codes]
            for codebook, codes in zip(self.codebooks, audio_codes.unbind(1), strict=False)
        ]
        features = torch.stack(parts).sum(0)
        stacked = features @ self.projection.T + self.mean
        return stacked.reshape(stacked.shape[0], -1, self.config.num_mels)

    @torch.no_grad()
    def decode(self, audio_codes: Tensor) -> HiggsAudioV2TokenizerDecoderOutput:
        """Decode codes (B, C', T), C' ≤ C, into waves; fewer codebooks give a coarser sound.

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
    """Return non-negative magnitudes whose mel magnitudes approximate `mel`.

    Multiplicative updates for non-negative least squares (Lee and Seung, 2001), started from the
    filters' transpose.
    """
    gram = filters @ filters.T
    target = mel @ filters.T
    magnitudes = target / filters.sum(1).clamp_min(1e-6) / filters.sum(0).mean()
    for _ in range(num_steps):
        magnitudes = magnitudes * target / (magnitudes @ gram).clamp_min(1e-8)
    return magnitudes
