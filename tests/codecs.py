"""Small random codecs of the real class for tests."""

from pathlib import Path

import torch
from transformers import HiggsAudioV2TokenizerConfig, HiggsAudioV2TokenizerModel

RATIOS = [8, 5, 4, 2, 3]


def tiny_higgs_codec(**changes) -> HiggsAudioV2TokenizerModel:
    """A random Higgs tokenizer: 24 kHz, hop 960, 8 codebooks of 64 codes, 0.3 M parameters."""
    torch.manual_seed(0)
    settings = {
        "target_bandwidths": (0.3, 0.6, 0.9, 1.2),  # kbps; 6 bits per code, 25 frames per second
        "codebook_size": 64,
        "codebook_dim": 16,
        "acoustic_model_config": {
            "model_type": "dac",
            "encoder_hidden_size": 4,
            "downsampling_ratios": RATIOS,
            "decoder_hidden_size": 64,
            "upsampling_ratios": RATIOS,
            "hidden_size": 16,
        },
        "semantic_model_config": {
            "model_type": "hubert",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_dim": [16] * 7,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 2,
        },
    } | changes
    codec = HiggsAudioV2TokenizerModel(HiggsAudioV2TokenizerConfig(**settings)).eval()
    with torch.no_grad():
        for quantizer in codec.quantizer.quantizers:  # they start at zero
            quantizer.codebook.embed.normal_()
    return codec


def save_tiny_higgs_codec(folder: Path, **changes) -> Path:
    """Save such a codec; returns the folder."""
    tiny_higgs_codec(**changes).save_pretrained(folder)
    return folder
