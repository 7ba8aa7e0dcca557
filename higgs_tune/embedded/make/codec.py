"""Fit the embedded codec on speech: principal components, then residual k-means."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from higgs_tune.data.codec import encode_clip
from higgs_tune.data.mel_codec import MelRvqCodec, MelRvqCodecConfig

NUM_KMEANS_STEPS = 25


def fit_codec(waves: Iterable[np.ndarray], max_frames: int, seed: int) -> MelRvqCodec:
    """Fit a codec on 24 kHz waves, using at most `max_frames` of their code frames."""
    config = MelRvqCodecConfig()
    codec = MelRvqCodec(config).eval()
    codec.set_filters()
    dim = codec.mean.shape[0]
    frames = torch.cat(
        [codec.log_mel(torch.from_numpy(wave)[None]).reshape(-1, dim) for wave in waves]
    )
    generator = torch.Generator().manual_seed(seed)
    if len(frames) > max_frames:
        frames = frames[torch.randperm(len(frames), generator=generator)[:max_frames]]
    print(f"codec: {len(frames)} code frames", flush=True)
    codec.mean.copy_(frames.mean(0))
    centred = frames - codec.mean
    eigenvalues, eigenvectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    projection = eigenvectors[:, -config.num_features :].flip(1)
    codec.projection.copy_(projection)
    residual = centred @ projection
    kept = eigenvalues[-config.num_features :].sum() / eigenvalues.sum()
    print(f"codec: {config.num_features} components keep {kept:.1%} of the variance", flush=True)
    total = residual.square().sum(1).mean()
    for index in range(config.num_quantizers):
        centroids = _kmeans(residual, config.codebook_size, generator)
        codec.codebooks[index].copy_(centroids)
        residual = residual - centroids[_nearest(residual, centroids)]
        left = residual.square().sum(1).mean() / total
        print(f"codec: codebook {index}: {left:.1%} of the variance left", flush=True)
    return codec


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    bias = centroids.square().sum(1) / 2
    return torch.cat([(part @ centroids.T - bias).argmax(1) for part in points.split(8192)])


def _kmeans(points: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm; a centroid that has lost its points moves to a random point."""
    centroids = points[torch.randperm(len(points), generator=generator)[:num]].clone()
    for _ in range(NUM_KMEANS_STEPS):
        assigned = _nearest(points, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        counts = torch.bincount(assigned, minlength=num)
        empty = counts == 0
        centroids = sums / counts.clamp_min(1)[:, None]
        if empty.any():
            chosen = torch.randint(len(points), (int(empty.sum()),), generator=generator)
            centroids[empty] = points[chosen]
    return centroids


def round_trip_error_db(codec: MelRvqCodec, wave: np.ndarray, num_codebooks: int) -> float:
    """Mean absolute log-mel difference in dB between a clip and its codes, without decoding to a wave."""
    tensor = torch.from_numpy(wave)[None]
    codes_TC = torch.from_numpy(encode_clip(codec, wave, codec.config.sample_rate).astype(np.int64))
    kept_BCT = codes_TC.T[None, :num_codebooks]
    difference = (codec.decode_log_mel(kept_BCT) - codec.log_mel(tensor)).abs().mean()
    return float(difference) * 20 / np.log(10)


def log_mel_distance_db(codec: MelRvqCodec, wave: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute log-mel difference in dB of two waves, over the length of the shorter."""
    mels = [codec.log_mel(torch.from_numpy(w)[None]) for w in (wave, other)]
    length = min(mel.shape[1] for mel in mels)
    difference = (mels[0][:, :length] - mels[1][:, :length]).abs().mean()
    return float(difference) * 20 / np.log(10)
