"""Run `higgs-tune evaluate`: from settings to evaluate.json, clips.jsonl, evaluate.html and audio/."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from higgs_tune.config import BaseSettings, DataSettings
from higgs_tune.data.codec import load_codec
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import ConfigError
from higgs_tune.files import write_json, write_json_lines, write_text, writing
from higgs_tune.listen.clips import choose_clips
from higgs_tune.listen.evaluate import Bench, Judges, means, recording_rows, system_rows
from higgs_tune.listen.losses import validation_losses
from higgs_tune.listen.options import WRITE_ADVICE, EvaluateOptions, SpeechOptions
from higgs_tune.listen.page import render_page
from higgs_tune.listen.systems import RECORDING, check_codec, check_data_codec, name_systems
from higgs_tune.listen.table import figures_table
from higgs_tune.listen.voices import Recogniser, VoiceJudge
from higgs_tune.model.load import Base, load_base
from higgs_tune.report.listening import DATA, PAGE

CLIPS = "clips.jsonl"


@dataclass(frozen=True)
class Asr:
    """The speech recogniser that the user chose."""

    path: str
    revision: str | None = None
    language: str | None = None


def run_evaluation(
    base_settings: BaseSettings,
    data: DataSettings,
    adapters: Sequence[Path],
    out: Path,
    *,
    speech: SpeechOptions,
    options: EvaluateOptions,
    asr: Asr | None,
    codec: str | None,
    codec_revision: str | None,
    notes: Sequence[str],
    progress: Callable[[str], None],
) -> None:
    """Evaluate the untouched base and each adapter, and write the results into `out`.

    Args:
        out: an empty folder.
        notes: for the top of the page, before the notes that the evaluation adds.
        progress: gets a line before each stage, and the table of figures at the end.

    Raises:
        ConfigError, DataError, ModelError: an input cannot be read, or inputs do not fit together.
    """
    dataset = Dataset.open(data.path)
    codec_name = codec or _codec_of(dataset, data.path)
    base = load_base(base_settings)
    judges, missing = _judges(base, dataset, codec_name, codec_revision, asr)
    systems = name_systems(adapters)
    progress("measuring losses on held-out clips")
    losses, num_clips = validation_losses(base, dataset, data, adapters)
    positions = base.model.config.max_position_embeddings
    clips = choose_clips(
        dataset, data, options, positions, lambda text: len(base.vocabulary.encode_text(text))
    )
    progress(f"judging {len(clips)} recordings")
    bench = Bench.of(clips, judges, out)
    rows = recording_rows(bench)
    recorded = means([row for row in rows if row["system"] == RECORDING])
    results = []
    for system, loss in zip(systems, losses, strict=True):
        progress(f"speaking and transcribing {len(clips)} clips with {system.name}")
        own = system_rows(base, system, bench, speech, options.batch_clips)
        rows += own
        results.append(
            {
                "name": system.name,
                "adapter": system.adapter and str(system.adapter),
                "adapter_sha256": system.fingerprint(),
                "losses": loss,
                "speech": means(own),
            }
        )
    settings = {
        "speech": speech.model_dump(mode="json"),
        "evaluate": options.model_dump(mode="json") | {"num_clips": data.num_val_clips},
        "codec": codec_name,
        "asr": asr and vars(asr),
    }
    result = {
        "base": base_settings.model_dump(mode="json"),
        "data": {
            "path": data.path,
            "content_hash": dataset.info.content_hash,
            "num_clips": num_clips,
        },
        "settings": settings,
        "notes": [*notes, *missing, *(_task_notes(rows) if options.task == "clone" else ())],
        "recording": recorded,
        "systems": results,
    }
    write_result(out, result, rows)
    progress(figures_table(result))


def write_result(out: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures, a line for each clip, and the page.

    Raises:
        DataError: a file cannot be written; the others are complete.
    """
    with writing(out, WRITE_ADVICE):
        write_json_lines(out / CLIPS, rows)
        write_json(out / DATA, result)
        write_text(out / PAGE, render_page(result, rows))


def _codec_of(dataset: Dataset, path: str) -> str:
    if dataset.info.codec.id == "embedded":
        return "embedded"
    raise ConfigError(
        f"{path}: its audio was encoded with {dataset.info.codec.id}. Give that codec with --codec, as a "
        "folder or a Hub id."
    )


def _judges(
    base: Base, dataset: Dataset, codec_name: str, codec_revision: str | None, asr: Asr | None
) -> tuple[Judges, list[str]]:
    """The judges that are available, and a note on each that is missing."""
    device: torch.device = base.model.device
    codec = load_codec(codec_name, device, codec_revision)
    check_codec(codec, codec_name, base)
    check_data_codec(codec, codec_name, dataset)
    notes: list[str] = []
    voice = recogniser = None
    try:
        voice = VoiceJudge(device)
    except ConfigError as error:
        notes.append(f"Left out: {error}")
    if asr is None:
        notes.append("Left out: character errors of speech, which need a recogniser (--asr).")
    else:
        recogniser = Recogniser(asr.path, device, asr.revision, asr.language)
    return Judges(codec, voice, recogniser), notes


def _task_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    tasks = [row["task"] for row in rows if row["system"] == RECORDING]
    num_alone = tasks.count("speak")
    if not num_alone:
        return []
    return [
        f"{num_alone} of {len(tasks)} clips were spoken without a reference: their speakers have no other "
        "held-out recording with another text that leaves room for the speech. Their speaker "
        "similarity is left out."
    ]
