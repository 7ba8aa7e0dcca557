"""Make the embedded speech and codec: `python -m higgs_tune.embedded.make.speech --packages DIR`.

DIR holds the unpacked Debian packages (`dpkg-deb -x X.deb DIR/X`), see embedded/README.md.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

from higgs_tune.data.codec import EMBEDDED_CODEC, encode_clip, load_codec
from higgs_tune.data.encode import codec_facts
from higgs_tune.data.mel_codec import MelRvqCodec
from higgs_tune.data.shards import DatasetInfo, Row, write_dataset
from higgs_tune.embedded.make import codec as codec_maker
from higgs_tune.embedded.make import corpora, human, samples
from higgs_tune.embedded.make.corpora import Clip
from higgs_tune.embedded.make.espeak import SAMPLE_RATE_HZ, Espeak

CODEC_FRAMES = 140_000  # code frames that the codec is fitted on
CODEC_CLIPS = {"arabic": 700, "pretrain": 1500}  # synthetic ones; human training clips are all used


def write_corpus(
    directory: Path, clips: Sequence[Clip], codec: MelRvqCodec, split_rule: str
) -> DatasetInfo:
    """Encode clips and write them as a dataset folder."""
    rows = [
        Row(
            id=clip.id,
            split="train" if clip.split == "train" else "validation",
            kind="clip",
            speaker=clip.speaker,
            language=clip.language,
            text=clip.text,
            codes=(encode_clip(codec, clip.wave, SAMPLE_RATE_HZ),),
        )
        for clip in track(clips, f"encode {directory.name}")
    ]
    info = write_dataset(directory, rows, codec_facts(codec, "embedded"), split_rule=split_rule)
    print(f"{directory}: {info.splits}, {info.hours:.2f} h", flush=True)
    return info


def make(packages: Path, out: Path, refit_codec: bool) -> None:
    """Synthesise or read every corpus, fit the codec if asked, then encode and write the corpora."""
    espeak = Espeak()
    humans = {
        name: corpora.human_clips(packages, language)
        for language, (name, _) in human.LANGUAGES.items()
    }
    arabic = corpora.arabic_clips(espeak)
    taken = {clip.text for clips in humans.values() for clip in clips}
    pretrain = corpora.pretraining_clips(espeak, taken)
    if refit_codec:
        rng = random.Random(0)
        chosen = [clip for clips in humans.values() for clip in clips if clip.split == "train"]
        for name, clips in (("arabic", arabic), ("pretrain", pretrain)):
            train = [clip for clip in clips if clip.split == "train"]
            chosen += rng.sample(train, CODEC_CLIPS[name])
        waves = (clip.wave for clip in track(chosen, "codec features"))
        codec_maker.fit_codec(waves, CODEC_FRAMES, seed=0).save_pretrained(EMBEDDED_CODEC)
    codec = load_codec("embedded")
    assert isinstance(codec, MelRvqCodec)
    write_corpus(out / "pretrain", pretrain, codec, corpora.SPLIT_RULES["pretrain"])
    write_corpus(out / "arabic", arabic, codec, corpora.SPLIT_RULES["arabic"])
    for name, clips in humans.items():
        write_corpus(out / name, clips, codec, corpora.SPLIT_RULES["human"])
    heard = {"arabic": arabic, **humans}
    samples.write_samples(out.parent / "wav", heard, codec)
    samples.print_round_trip({**heard, "pretrain": pretrain}, codec)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--out", type=Path, help="default: embedded/speech of this package")
    parser.add_argument("--refit-codec", action="store_true", help="fit the codec again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out or EMBEDDED_CODEC.parent / "speech"
    make(args.packages, out, args.refit_codec)


if __name__ == "__main__":
    main()
