"""Pretrain the embedded base: a small Higgs Audio V2 that has not heard the target languages.

    python -m higgs_tune.embedded.make.base --out higgs_tune/embedded/base   # 25 minutes on 2 cores

The corpus (made by `embedded.make.speech`) has other voices and other languages than the targets, so the
base has the problem that this package is for: it transcribes what it was taught and fails on Arabic.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from higgs_tune.config_data import TaskMix
from higgs_tune.data.codec import load_codec
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.data.conversation import Conversation
from higgs_tune.data.dataset import Dataset
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.order import TrainOrder
from higgs_tune.data.tokens import Encoded, Vocabulary, encode_conversation
from higgs_tune.model.load import CONTROL_TOKENS, vocabulary_of
from higgs_tune.model.losses import nll_sum
from higgs_tune.model.packed_forward import packed_logits
from higgs_tune.train.optim import learning_rate_factor

NUM_CODES, NUM_CODEBOOKS = 256, 8

TARGETS = ("embedded:arabic", "embedded:russian")
PRETRAINING = [f"embedded:{n}" for n in ("pretrain", "english", "french", "italian", "spanish")]


def joined(names: list[str], folder: Path) -> Dataset:
    """Join several datasets into one, whose shards are links to theirs."""
    parts = [Dataset.open(name) for name in names]
    splits = sum((Counter(part.info.splits) for part in parts), Counter())
    info = json.loads((parts[0].directory / "dataset.json").read_text())
    info |= {"num_rows": sum(p.info.num_rows for p in parts), "splits": dict(splits)}
    (folder / "shards").mkdir()
    shards = [shard for part in parts for shard in sorted((part.directory / "shards").iterdir())]
    for number, shard in enumerate(shards):
        (folder / "shards" / f"part-{number:05d}.parquet").symlink_to(shard.resolve())
    (folder / "dataset.json").write_text(json.dumps(info))
    return Dataset.open(str(folder))


def new_model(tokenizer) -> HiggsAudioV2ForConditionalGeneration:
    """Return a model with five million random parameters in four layers."""
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in CONTROL_TOKENS.items()}
    config = HiggsAudioV2Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_codebooks=NUM_CODEBOOKS,
        codebook_size=NUM_CODES + 2,
        audio_stream_bos_id=NUM_CODES,
        audio_stream_eos_id=NUM_CODES + 1,
        audio_token_id=ids["audio"],
        audio_bos_token_id=ids["audio_bos"],
        audio_delay_token_id=ids["audio_delay"],
        bos_token_id=ids["begin_of_text"],
        eos_token_id=ids["end_of_turn"],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)


@torch.no_grad()
def start_from_codec(model: HiggsAudioV2ForConditionalGeneration) -> None:
    """Set the code embeddings so that a frame's sum is a fixed projection of the frame's spectrum.

    With random embeddings the model would first have to learn what each code sounds like.
    """
    codec = load_codec("embedded", device="cpu")
    # residuals: a frame's features are the sum over its codes
    sums_CVD = codec.get_parameter("codebooks")
    spread_D = sums_CVD[0].std(dim=0).sqrt().clamp(min=1e-3)
    features_CVD = sums_CVD / spread_D
    project = torch.empty(model.config.hidden_size, sums_CVD.shape[2])
    torch.nn.init.orthogonal_(project)
    projected_CVD = features_CVD @ project.T
    projected_CVD *= 0.1 / projected_CVD[0].std()
    table = model.model.embed_audio_tokens.embed_audio_tokens.weight
    table.unflatten(0, (NUM_CODEBOOKS, NUM_CODES + 2))[:, :NUM_CODES] = projected_CVD


def means(
    model: HiggsAudioV2ForConditionalGeneration, examples: list[Encoded], smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats per text token and per code; 0 where the examples have none."""
    batch = collate({0: examples})
    text_logits, audio_logits = packed_logits(model, batch, None)
    counts = count_targets(examples, NUM_CODEBOOKS)
    text = F.cross_entropy(
        text_logits[0], batch.text_labels_KM[0], label_smoothing=smoothing, reduction="sum"
    )
    audio_C = nll_sum(audio_logits, batch.audio_labels_KMC)[0]
    return (
        text / max(1, counts.text),
        (audio_C / torch.from_numpy(counts.audio_C).clamp(min=1)).mean(),
    )


def validate(
    model: HiggsAudioV2ForConditionalGeneration, dataset: Dataset, vocabulary: Vocabulary
) -> dict[str, float]:
    """Measure text nll, its rise with another clip's audio, and audio nll on held-out clips."""
    sets = validation_sets(dataset, 64)

    def encode(conversations: tuple[Conversation, ...]) -> list[Encoded]:
        return [encode_conversation(c, vocabulary) for c in conversations]

    with torch.no_grad():
        right = float(means(model, encode(sets.transcribe))[0])
        swapped = float(means(model, encode(sets.transcribe_swapped))[0])
        audio = float(means(model, encode(sets.speak))[1])
    return {"text_nll": right, "audio_gain": swapped - right, "audio_nll_per_code": audio}


@dataclass(frozen=True)
class Phase:
    """A phase of pretraining, with its own schedule and optimizer."""

    num_steps: int
    learning_rate: float
    smoothing: float  # of text labels; stops the logits of unseen letters from falling on and on
    transcribe: float  # task weight; `speak` has 1


PHASES = (
    Phase(2000, 2e-3, smoothing=0.0, transcribe=2.0),
    Phase(700, 1e-3, smoothing=0.05, transcribe=2.0),
    Phase(1400, 1.2e-3, smoothing=0.05, transcribe=3.0),
)


def train(
    model: HiggsAudioV2ForConditionalGeneration,
    dataset: Dataset,
    vocabulary: Vocabulary,
    phase: Phase,
    report: Callable[[int], None],
) -> None:
    """Train every parameter for one phase, 16 clips a step."""
    torch.manual_seed(0)
    mix = TaskMix(transcribe=phase.transcribe, speak=1.0, clone=0.0)
    order = TrainOrder(dataset, mix, 16, seed=0, max_frames=150)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    for step in range(phase.num_steps):
        examples = [encode_conversation(c, vocabulary) for c in order.batch(step)]
        text, audio = means(model, examples, phase.smoothing)
        optimizer.zero_grad()
        (text + audio).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * learning_rate_factor(
                step, phase.num_steps, 0.05, 0.02
            )
        optimizer.step()
        if step % 250 == 0 or step == phase.num_steps - 1:
            report(step)


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that holds the tokenizer")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = new_model(tokenizer).train()
    start_from_codec(model)
    vocabulary = vocabulary_of(tokenizer, model.config)
    with tempfile.TemporaryDirectory() as folder:
        dataset = joined(PRETRAINING, Path(folder))
        watched = {"pretraining": dataset} | {name: Dataset.open(name) for name in TARGETS}
        started = time.monotonic()
        for number, phase in enumerate(PHASES):

            def report(step: int, number: int = number) -> None:
                figures = {n: validate(model, d, vocabulary) for n, d in watched.items()}
                spent = round(time.monotonic() - started)
                print(
                    json.dumps({"phase": number, "step": step, "s": spent, **figures}), flush=True
                )

            train(model, dataset, vocabulary, phase, report)
            save(model, args.out)
            model.load_state_dict(load_file(args.out / "model.safetensors"))  # the rounded weights


def save(model: HiggsAudioV2ForConditionalGeneration, out: Path) -> None:
    """Save in the native format, rounded to bfloat16, which halves the size."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(out, state_dict=state)
    (out / "higgs_tune.json").write_text(json.dumps({"use_text_head": True}) + "\n")


if __name__ == "__main__":
    main()
