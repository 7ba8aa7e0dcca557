"""Small random bases and examples for tests; the classes are the real ones."""

from pathlib import Path

import numpy as np
import torch
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_tune.config import DataSettings, TrialConfig
from higgs_tune.config_data import TaskMix
from higgs_tune.data.conversation import AudioPart, Conversation, TextPart, Turn
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.shards import CodecFacts, Row, write_dataset
from higgs_tune.data.tokens import Encoded, Vocabulary, encode_conversation
from higgs_tune.model.load import Base

NUM_CODEBOOKS, NUM_CODES = 4, 30
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
_CONTROL = (
    "begin_of_text", "start_header", "end_header", "end_of_turn", "audio_bos", "audio_eos", "audio",
    "audio_delay",
)  # fmt: skip


def vocabulary() -> Vocabulary:
    """Control tokens 1-8, roles and the newline, then one id per letter."""
    ids = {name: 1 + n for n, name in enumerate(_CONTROL)}
    words = {"system": 9, "user": 10, "assistant": 11, "\n\n": 12}

    def encode_text(text: str) -> list[int]:
        return [words[text]] if text in words else [13 + LETTERS.index(c) for c in text]

    return Vocabulary(
        **ids,
        stream_bos=NUM_CODES,
        stream_eos=NUM_CODES + 1,
        num_codebooks=NUM_CODEBOOKS,
        encode_text=encode_text,
    )


class Letters:
    """A stub of the tiny vocabulary's tokenizer."""

    chat_template = None

    def decode(self, ids: list[int]) -> str:
        """Letters as they are, anything else as its id in angle brackets."""
        return "".join(LETTERS[i - 13] if i >= 13 else f"<{i}>" for i in ids)


def tiny_base(seed: int = 0, num_layers: int = 2, dtype: torch.dtype = torch.float32) -> Base:
    """A random two-layer Higgs Audio V2 with grouped-query attention and its text head."""
    voc = vocabulary()
    torch.manual_seed(seed)
    config = HiggsAudioV2Config(
        vocab_size=13 + len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_codebooks=NUM_CODEBOOKS,
        codebook_size=NUM_CODES + 2,
        audio_stream_bos_id=NUM_CODES,
        audio_stream_eos_id=NUM_CODES + 1,
        audio_token_id=voc.audio,
        audio_bos_token_id=voc.audio_bos,
        audio_delay_token_id=voc.audio_delay,
        pad_token_id=0,
        bos_token_id=voc.begin_of_text,
        eos_token_id=voc.end_of_turn,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).to(dtype)
    with torch.no_grad():  # gains of 1 would hide a swapped norm
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.requires_grad_(False).eval()
    return Base(model, tokenizer=Letters(), vocabulary=voc, source="tiny")  # type: ignore[arg-type]


def random_codes(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """Random codes (T, C)."""
    return rng.integers(0, NUM_CODES, (num_frames, NUM_CODEBOOKS)).astype(np.uint16)


def random_text(rng: np.random.Generator, length: int) -> str:
    """Random letters that the tiny vocabulary knows."""
    return "".join(rng.choice(list(LETTERS[:26]), length))


def conversation(task: str, seed: int, num_frames: int = 7, num_letters: int = 6) -> Conversation:
    """A random example of a task."""
    rng = np.random.default_rng(seed)
    text = TextPart(random_text(rng, num_letters))
    audio = AudioPart(random_codes(rng, num_frames))
    if task == "transcribe":
        turns = (Turn("user", (audio,)), Turn("assistant", (text,), target=True))
    elif task == "speak":
        turns = (Turn("user", (text,)), Turn("assistant", (audio,), target=True))
    else:
        reference = Turn("user", (TextPart(random_text(rng, 4)),))
        spoken = Turn("assistant", (AudioPart(random_codes(rng, 5)),))
        turns = (reference, spoken, Turn("user", (text,)), Turn("assistant", (audio,), target=True))
    return Conversation(f"{task}-{seed}-{num_frames}-{num_letters}", task, turns)  # type: ignore[arg-type]


def example(task: str, seed: int, num_frames: int = 7, num_letters: int = 6) -> Encoded:
    """A random tokenised example of a task."""
    return encode_conversation(conversation(task, seed, num_frames, num_letters), vocabulary())


def trial(**changes) -> TrialConfig:
    """A small trial's settings."""
    defaults = {
        "rank": 4,
        "alpha": 8.0,
        "targets": ("attention", "text_mlp", "audio_mlp"),
        "learning_rate": 1e-2,
        "num_steps": 20,
        "report_every_steps": 5,
        "batch_clips": 3,
    }
    return TrialConfig(**(defaults | changes))


DATA = DataSettings(tasks=TaskMix(transcribe=1, speak=1, clone=0.5), num_val_clips=4)
CODEC = CodecFacts("tiny", 24000, 25.0, NUM_CODEBOOKS, NUM_CODES)


def make_dataset(
    directory: Path, codec: CodecFacts = CODEC, seed: int = 0, num_frames: int = 4
) -> Dataset:
    """24 training and 8 validation clips of three speakers, of ragged lengths from `num_frames`."""
    rng = np.random.default_rng(seed)
    rows = [
        Row(
            id=f"r{n}",
            split="train" if n < 24 else "validation",
            kind="clip",
            speaker=f"s{n % 3}",
            text=random_text(rng, 3 + n % 5),
            codes=(random_codes(rng, num_frames + n % 7),),
        )
        for n in range(32)
    ]
    write_dataset(directory, rows, codec)
    return Dataset.open(str(directory))
