"""The commands `higgs-tune generate` and `higgs-tune evaluate`; import no torch until they run."""

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from higgs_tune.config import BaseSettings, DataSettings, SweepConfig
from higgs_tune.config_file import ModelT, read_yaml, validate
from higgs_tune.data.plain_text import plain_text
from higgs_tune.errors import ConfigError
from higgs_tune.listen.bases import base_for, system_text_for
from higgs_tune.listen.options import EvaluateOptions, SpeechOptions
from higgs_tune.local_path import local_path, refuse_existing

_SPEECH = {
    "seed": "seed of the first take; each further take uses the next one",
    "temperature": "sampling temperature; 0 takes the likeliest code each time",
    "top_k": "sample from this many likeliest codes; 0: all",
    "top_p": "sample from the fewest codes that have this probability together; 1: all",
    "max_seconds": "cut speech off after this many seconds",
}
_EVALUATE = {
    "num_clips": "validation clips to measure losses on",
    "num_generated": "how many of these clips each system speaks and transcribes",
    "batch_clips": "clips to speak in one batch",
    "task": "clone: with a reference of the speaker's voice; speak: without one",
}
_NONE = Path("none")
_MAX_LETTERS_PER_S = 30  # fast speech has up to 8 syllables of two or three letters


def _add_options(
    parser: argparse.ArgumentParser, model: type[SpeechOptions | EvaluateOptions], texts: dict
) -> None:
    for name, text in texts.items():
        default = model.model_fields[name].default
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{text} (default: {default})")


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", help="embedded, a folder or a Hub id (default: the adapter's base, else embedded)"
    )
    parser.add_argument("--revision", help="commit of a Hub id (default: the adapter's)")
    parser.add_argument(
        "--text-head",
        help="for a base without a text head: checkpoint refuses the base, from_embedding starts the head "
        "from the token embedding (default: from_embedding with an adapter, else checkpoint)",
    )
    parser.add_argument(
        "--system-text", help='text of the system turn, "" for none (default: the adapter\'s)'
    )
    parser.add_argument("--dtype", help="float32 or bfloat16 (default: float32)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--codec", help="embedded, a folder or a Hub id (default: embedded)")
    parser.add_argument("--codec-revision", help="commit of a Hub id")


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `higgs-tune generate`."""
    parser.add_argument("--text", required=True, help="text to speak")
    parser.add_argument(
        "--out", type=local_path, required=True, help="WAV to write, with a JSON file beside it"
    )
    parser.add_argument(
        "--adapter",
        type=local_path,
        default=_NONE,
        help="adapter folder, or none for the untouched base (default)",
    )
    parser.add_argument("--reference", type=local_path, help="recording of the voice to imitate")
    parser.add_argument("--reference-text", help="transcript of that recording")
    parser.add_argument("--num-takes", type=int, default=1, help="takes: out-1.wav, … (default: 1)")
    _add_models(parser)
    _add_options(parser, SpeechOptions, _SPEECH)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `higgs-tune evaluate`."""
    parser.add_argument(
        "--adapter",
        type=local_path,
        action="append",
        default=[],
        help="adapter folder to compare with the untouched base; can be given several times; none: only "
        "the base",
    )
    parser.add_argument(
        "--data",
        help="dataset folder or embedded:NAME (default: embedded:arabic, or the sweep's with --results)",
    )
    parser.add_argument("--out", type=local_path, help="new folder for the page, figures and WAVs")
    parser.add_argument(
        "--results",
        type=local_path,
        help="results folder of a sweep: evaluate its best adapter on its base and data, and link the page "
        "from its report",
    )
    parser.add_argument("--asr", help="transformers speech recogniser, a folder or a Hub id")
    parser.add_argument("--asr-revision", help="commit of a Hub id")
    parser.add_argument(
        "--asr-language", help="language for a multilingual recogniser such as Whisper"
    )
    _add_models(parser)
    _add_options(parser, EvaluateOptions, _EVALUATE)
    drawn = "seed for sampling; the same seed and options give the same speech"
    _add_options(parser, SpeechOptions, _SPEECH | {"seed": drawn})


def given_settings(args: argparse.Namespace, names: Mapping[str, str]) -> dict[str, Any]:
    """The settings whose argument was given; `names` maps each setting to its argument."""
    return {k: v for k, name in names.items() if (v := getattr(args, name)) is not None}


def _options(args: argparse.Namespace, model: type[ModelT], names: Iterable[str]) -> ModelT:
    return validate(model, given_settings(args, {name: name for name in names}), "options")


BASE = {
    "path": "base",
    "revision": "revision",
    "dtype": "dtype",
    "device": "device",
    "text_head": "text_head",
}


def run_generate(args: argparse.Namespace) -> int:
    """Speak a text, once or several times."""
    options = _options(args, SpeechOptions, _SPEECH)
    adapter = None if args.adapter == _NONE else args.adapter
    if (args.reference is None) != (args.reference_text is None):
        raise ConfigError("--reference and --reference-text: give both or neither.")
    if args.num_takes < 1:
        raise ConfigError(f"--num-takes: found {args.num_takes}, needed at least 1.")
    from higgs_tune.data.codec import load_codec  # torch: seconds to import
    from higgs_tune.listen.systems import check_codec
    from higgs_tune.listen.takes import Reference, make_take, take_paths, take_prompt
    from higgs_tune.model.load import load_checkpoint
    from higgs_tune.train.checkpoint import adapted

    paths = take_paths(args.out, args.num_takes)
    adapters = [] if adapter is None else [adapter]
    base_settings = base_for(adapters, given_settings(args, BASE), "generate")
    base = load_checkpoint(base_settings)
    codec_name = args.codec or "embedded"
    codec = load_codec(codec_name, base.model.device, args.codec_revision)
    check_codec(codec, codec_name, base)
    reference = None
    if args.reference is not None:
        reference = Reference(args.reference, args.reference_text)
    system_text = system_text_for(adapters, args.system_text, base_settings)
    prompt = take_prompt(args.text, reference, codec, base.vocabulary, system_text)
    facts = {
        "text": args.text,
        "reference": reference and str(reference.path),
        "reference_text": reference and reference.text,
        "system_text": system_text,
        "base": base.source,
        "adapter": adapter and str(adapter),
        "codec": codec_name,
    }
    with adapted(base.model, adapter) as model:
        for number, path in enumerate(paths):
            take = make_take(
                model, base.vocabulary, prompt, codec, options, path,
                seed=options.seed + number, facts=facts,
            )  # fmt: skip
            print(f"{path}: {take['seconds']:.2f} s, seed {take['seed']}")
            _warn(path, take)
    return 0


def _warn(path: Path, take: dict[str, Any]) -> None:
    letters = len(plain_text(take["text"]).replace(" ", ""))
    if take["hit_length_limit"]:
        print(
            f"warning: {path}: speech had not ended after {take['limit_seconds']:.1f} s and was cut off. "
            "Raise --max-seconds, or try another --seed or --temperature.",
            file=sys.stderr,
        )
    elif take["seconds"] * _MAX_LETTERS_PER_S <= letters:
        print(
            f"warning: {path}: ended after {take['seconds']:.2f} s, too short for a text of {letters} "
            "letters. Try another --seed; if all takes are too short, the model has not learnt to speak "
            "such texts: train longer, or give another --adapter.",
            file=sys.stderr,
        )


def run_evaluate(args: argparse.Namespace) -> int:
    """Measure the base and adapters on held-out clips, and write figures and a page."""
    speech = _options(args, SpeechOptions, _SPEECH)
    options = _options(args, EvaluateOptions, _EVALUATE)
    for name in ("asr_revision", "asr_language"):
        if getattr(args, name) and not args.asr:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: needs a recogniser; name one with --asr.")
    base, data, adapters, out = _evaluation_inputs(args, options)
    notes = []
    if args.results is not None and options.task == "clone" and data.tasks.clone == 0:
        notes.append(
            "The sweep did not train cloning (data.tasks.clone is 0), so speech after a reference is new "
            "to the adapter. --task speak evaluates speech without a reference."
        )
    from higgs_tune.files import replace_folder
    from higgs_tune.listen.run import Asr, run_evaluation
    from higgs_tune.report.listening import PAGE

    asr = args.asr and Asr(args.asr, args.asr_revision, args.asr_language)
    replace_folder(
        out,
        lambda fresh: run_evaluation(
            base, data, adapters, fresh,
            speech=speech, options=options, asr=asr or None,
            codec=args.codec, codec_revision=args.codec_revision, notes=notes,
            progress=lambda text: print(text, file=sys.stderr, flush=True),
        ),
    )  # fmt: skip
    print(out / PAGE)
    if args.results is not None:
        from higgs_tune.report.build import build_report

        print(build_report(args.results).report_path)
    return 0


def _evaluation_inputs(
    args: argparse.Namespace, options: EvaluateOptions
) -> tuple[BaseSettings, DataSettings, list[Path], Path]:
    """Base, data, adapters and output folder, from the arguments."""
    adapters = [path for path in args.adapter if path != _NONE]
    data: dict[str, Any] = {}
    stored_base: dict[str, Any] = {}
    out = args.out
    if args.results is not None:
        clashing = [n for n in ("data", "base", "revision", "adapter") if getattr(args, n)]
        if clashing:
            raise ConfigError(f"--{clashing[0]}: comes from the folder of --results; leave it out.")
        stored = args.results / "sweep.yaml"
        if not stored.is_file():
            raise ConfigError(
                f"--results {args.results}: found no sweep.yaml, needed the results folder of a sweep. "
                "Give a folder such as results/quick."
            )
        sweep = validate(SweepConfig, read_yaml(stored), str(stored))
        best = args.results / "best_adapter"
        if not best.is_dir():
            raise ConfigError(
                f"{best} is missing: the sweep has no best configuration. Give --adapter DIR and "
                "--data instead of --results."
            )
        stored_base, data = sweep.base.model_dump(), sweep.data.model_dump()
        adapters, out = [best], out or args.results / "listen"
    elif not args.adapter:
        raise ConfigError("give --adapter DIR (none for the base alone), or --results DIR.")
    if out is None:
        raise ConfigError("--out: give a folder for the page, the figures and the WAVs.")
    if args.out is not None:  # a sweep's own listen/ is replaced
        refuse_existing(args.out)
    if args.data is not None:
        data["path"] = args.data
    if args.results is None or args.num_clips is not None:  # else as many as the sweep validated on
        data["num_val_clips"] = options.num_clips
    base = base_for(adapters, stored_base | given_settings(args, BASE), "evaluate")
    if args.results is None or args.system_text is not None:
        data["system_text"] = system_text_for(adapters, args.system_text, base)
    data_settings = validate(DataSettings, data, "evaluate")
    return base, data_settings, adapters, out
