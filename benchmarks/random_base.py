"""Bases of the real configuration with random weights, examples for them, and the FLOP of a step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2RotaryEmbedding

from higgs_tune.data.conversation import AudioPart, Conversation, Task, TextPart, Turn
from higgs_tune.data.tokens import IGNORE, Encoded, Vocabulary, encode_conversation
from higgs_tune.model.load import Base

PRESETS = {
    "full": HiggsAudioV2Config(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        num_codebooks=8,
        codebook_size=1026,  # 1024 codes, BOS and EOS
    ),
    "small": HiggsAudioV2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_codebooks=8,
        codebook_size=66,
        audio_stream_bos_id=64,
        audio_stream_eos_id=65,
        audio_token_id=500,
        audio_bos_token_id=501,
        audio_delay_token_id=502,
        pad_token_id=503,
        bos_token_id=504,
        eos_token_id=505,
    ),
}


def random_base(config: HiggsAudioV2Config, device: torch.device, dtype: torch.dtype) -> Base:
    """A frozen base with its text head, filled directly on the device, not through the host."""
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
        model.to(dtype)  # type: ignore[arg-type]
    model.to_empty(device=device)
    # the constructor made these buffers on the meta device, so their values are lost
    model.model.rotary_emb = HiggsAudioV2RotaryEmbedding(config).to(device)
    offsets = torch.arange(config.num_codebooks) * config.codebook_size
    model.model.embed_audio_tokens.audio_tokens_offsets.copy_(offsets)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.ones_(parameter)
            else:
                parameter.normal_(0, config.initializer_range, generator=generator)
    model.requires_grad_(False).eval()
    return Base(model, None, vocabulary_of(config), "random")  # type: ignore[arg-type]


def vocabulary_of(config: HiggsAudioV2Config) -> Vocabulary:
    """A vocabulary for a base without a tokenizer; its texts are ids separated by spaces."""
    last = config.vocab_size - 1
    words = {"user": [0], "assistant": [1], "\n\n": [2]}
    return Vocabulary(
        begin_of_text=last,
        start_header=last - 1,
        end_header=last - 2,
        end_of_turn=last - 3,
        audio_bos=config.audio_bos_token_id,
        audio_eos=last - 4,
        audio=config.audio_token_id,
        audio_delay=config.audio_delay_token_id,
        stream_bos=config.audio_stream_bos_id,
        stream_eos=config.audio_stream_eos_id,
        num_codebooks=config.num_codebooks,
        encode_text=lambda text: words.get(text) or [int(word) for word in text.split()],
    )


def random_clip(
    base: Base, task: Task, num_rows: int, text_share: float, rng: np.random.Generator
) -> Encoded:
    """One example of exactly `num_rows` rows, a share of `text_share` being its text."""
    config = base.model.config
    num_text = max(1, round(text_share * num_rows))
    num_clips = 2 if task == "chat" else 1
    # begin of text and five control rows per turn; per clip two around it, its BOS and C of delay
    num_frames = num_rows - num_text - 11 - num_clips * (3 + config.num_codebooks)
    if num_frames < num_clips:
        raise SystemExit(f"--tokens {num_rows} leaves no room for audio besides {num_text} of text")
    ids = rng.integers(3, config.vocab_size // 2, num_text)
    text = TextPart(" ".join(map(str, ids)))
    codes = rng.integers(0, config.audio_stream_bos_id, (num_frames, config.num_codebooks))
    clips = [AudioPart(part) for part in np.array_split(codes, num_clips)]
    heard, said = {
        "transcribe": ((clips[0],), (text,)),
        "speak": ((text,), (clips[0],)),
        "chat": ((clips[0],), (text, clips[-1])),
    }[task]
    turns = (Turn("user", heard), Turn("assistant", said, target=True))
    example = encode_conversation(Conversation("clip", task, turns), base.vocabulary)
    assert example.num_rows == num_rows
    return example


def random_clips(
    base: Base, count: int, num_rows: int, text_share: float, seed: Sequence[int]
) -> list[Encoded]:
    """Examples that transcribe and speak in turn; a single one does both, so both losses have targets."""
    rng = np.random.default_rng(seed)
    tasks: list[Task] = ["chat"] if count == 1 else ["transcribe", "speak"]
    return [
        random_clip(base, tasks[n % len(tasks)], num_rows, text_share, rng) for n in range(count)
    ]


def linear_flops(
    config: HiggsAudioV2Config, rank: int, num_rows: int, num_labelled: int | None = None
) -> int:
    """FLOP of forward and backward through the decoder's linears, each with LoRA, for `num_rows` rows.

    A frozen linear of P weights costs 2 P per row forward and 2 P for its input's gradient. A LoRA pair of
    r (I + O) weights costs 2 per weight for each of these, and 2 for its own gradient. The first layer's q, k
    and v need no gradient for their input, the embeddings. After the last attention only labelled rows count;
    by default all are labelled.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    assert head is not None
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    qkv = [(hidden, q), (hidden, kv), (hidden, kv)]
    layer = [*qkv, (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    frozen = sum(i * o for i, o in layer)
    adapted = sum(rank * (i + o) for i, o in layer)
    spared = 2 * sum(i * o + rank * i for i, o in qkv)
    every_row = num_rows * (config.num_hidden_layers * (4 * frozen + 6 * adapted) - spared)
    behind = sum(4 * i * o + 6 * rank * (i + o) for i, o in layer[len(qkv) :])
    return every_row - behind * (0 if num_labelled is None else num_rows - num_labelled)


def attention_flops(config: HiggsAudioV2Config, lengths: Sequence[int]) -> int:
    """FLOP of forward and backward of causal attention without recomputation: half of each square."""
    assert config.head_dim is not None
    width = config.num_attention_heads * config.head_dim
    forward = sum(2 * length**2 * width for length in lengths)
    return 3 * forward * config.num_hidden_layers


def head_flops(config: HiggsAudioV2Config, text_rows: int, audio_rows: int) -> int:
    """FLOP of forward and backward of the frozen heads at these rows."""
    audio = config.num_codebooks * config.codebook_size
    return 4 * config.hidden_size * (text_rows * config.vocab_size + audio_rows * audio)


def step_flops(config: HiggsAudioV2Config, rank: int, examples: Sequence[Encoded]) -> int:
    """FLOP that one optimizer step of one all-linear adapter must compute."""
    lengths = [e.num_rows for e in examples]
    text_rows = sum(int((e.text_labels_L != IGNORE).sum()) for e in examples)
    audio_rows = sum(int((e.audio_labels_AC != IGNORE).any(axis=1).sum()) for e in examples)
    return (
        linear_flops(config, rank, sum(lengths), text_rows + audio_rows)
        + attention_flops(config, lengths)
        + head_flops(config, text_rows, audio_rows)
    )
