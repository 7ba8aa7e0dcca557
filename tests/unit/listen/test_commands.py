"""`generate` and `evaluate` from the command line, on the embedded base."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from higgs_tune import cli
from higgs_tune.config import DataSettings
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import ModelError
from higgs_tune.listen.losses import validation_losses
from higgs_tune.listen.page import _clip
from higgs_tune.report.build import build_report
from higgs_tune.train.checkpoint import adapted, save_adapter
from higgs_tune.train.engine import Engine
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.models import trial
from tests.unit.report.builder import realistic

WAV = Path(__file__).parents[3] / "higgs_tune" / "embedded" / "wav"


def generate(out: Path, *more: str) -> int:
    arguments = ["--device", "cpu", "--max-seconds", "1", "--out", str(out), *more]
    return cli.main(["generate", "--text", "هَلْ تُحِبُّ العَسَلَ", *arguments])


def test_equal_seeds_give_equal_wavs_and_each_take_adds_one_to_the_seed(tmp_path, adapter, capsys):
    assert generate(tmp_path / "a.wav", "--adapter", str(adapter), "--num-takes", "3") == 0
    assert generate(tmp_path / "b.wav", "--adapter", str(adapter), "--seed", "1") == 0
    takes = [(tmp_path / f"a-{n}.wav").read_bytes() for n in (1, 2, 3)]
    assert len(set(takes)) == 3
    assert (tmp_path / "b.wav").read_bytes() == takes[1]
    assert generate(tmp_path / "a.wav", "--num-takes", "2") == 2
    assert (
        f"--out: {tmp_path / 'a-1.wav'} exists, and nothing is replaced" in capsys.readouterr().err
    )
    record = json.loads((tmp_path / "b.json").read_text())
    wave, rate = soundfile.read(tmp_path / "b.wav")
    assert (record["seed"], record["adapter"], rate) == (1, str(adapter), 24_000)
    assert record["seconds"] == pytest.approx(len(wave) / rate)
    assert record["seconds"] <= record["limit_seconds"] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-1.json", "a-1.wav", "a-2.json", "a-2.wav", "a-3.json", "a-3.wav", "b.json", "b.wav",
    ]  # fmt: skip


def test_speech_cut_off_at_the_limit_is_reported_in_json_and_on_stderr(tmp_path, capsys):
    arguments = ("--temperature", "0", "--max-seconds")
    generate(tmp_path / "long.wav", *arguments, "20")
    whole = json.loads((tmp_path / "long.json").read_text())
    assert (whole["reached_eos"], whole["hit_length_limit"]) == (True, False)
    assert "warning" not in capsys.readouterr().err
    generate(tmp_path / "short.wav", *arguments, "0.2")
    cut = json.loads((tmp_path / "short.json").read_text())
    assert (cut["reached_eos"], cut["hit_length_limit"], cut["seconds"]) == (False, True, 0.2)
    assert "speech had not ended after 0.2 s and was cut off" in capsys.readouterr().err
    first, second = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("long", "short"))
    assert len(second) == 4800 < len(first)


def test_speech_too_short_for_its_text_gives_a_warning(tmp_path, capsys):
    long = "هل تحب العسل " * 5
    assert generate(tmp_path / "a.wav", "--text", long, "--max-seconds", "5") == 0
    message = (
        r"^warning: .*a\.wav: ended after \d\.\d\d s, too short for a text of 50 letters\. Try"
    )
    assert re.search(message, capsys.readouterr().err)


def test_a_merged_untrained_adapter_speaks_like_the_base(tmp_path, embedded, caplog, monkeypatch):
    config = trial(cross_attention="text_to_audio", targets=("attention", "audio_attention"))
    engine = Engine(embedded, PackLimits.of([config], num_slots=1))
    engine.add("a", config)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", engine.state("a"), config, "embedded")
    assert (
        cli.main(["export", str(tmp_path / "adapter"), "--out", str(tmp_path / "m"), "--merge"])
        == 0
    )
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.clear()
    assert generate(tmp_path / "a.wav", "--base", str(tmp_path / "m"), "--temperature", "0") == 0
    assert not caplog.records, "transformers took it for a model of another type"
    assert generate(tmp_path / "b.wav", "--temperature", "0") == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_reference_changes_the_speech(tmp_path):
    voice = ("--reference", str(WAV / "arabic-1.wav"), "--reference-text", "مَرْحَبًا")
    generate(tmp_path / "a.wav", "--temperature", "0")
    assert generate(tmp_path / "b.wav", "--temperature", "0", *voice) == 0
    assert (tmp_path / "a.wav").read_bytes() != (tmp_path / "b.wav").read_bytes()
    assert json.loads((tmp_path / "b.json").read_text())["reference_text"] == "مَرْحَبًا"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--reference", "x.wav"), "--reference and --reference-text: give both or neither"),
        (("--reference", "x.wav", "--reference-text", "a"), "--reference: x.wav does not exist"),
        (("--num-takes", "0"), "--num-takes: found 0"),
        (("--temperature", "-1"), "temperature: Input should be greater than or equal to 0"),
        (("--out", "x.mp3"), "needed a file name that ends in .wav"),
        (("--text", " "), "--text: text is empty"),
        (("--text", "a<|eot_id|>"), "holds the control token <|eot_id|>"),
        (("--text", "\udce3\udcd1"), "--text: is not UTF-8"),  # CP1256 from a shell
        (("--text", "hi 😀"), "--text: the base's tokenizer has no token for '😀'. Leave that out"),
        (
            ("--adapter", "nowhere"),
            "nowhere: no such folder. Give one that a sweep or `train` wrote",
        ),
        (("--adapter=~/nowhere",), f"{Path.home() / 'nowhere'}: no such folder"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, capsys, arguments, message):
    assert generate(tmp_path / "x.wav", *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_base_is_unchanged_after_an_adapter_is_removed(embedded, adapter):
    ids = torch.arange(20, 40)[None]
    with torch.inference_mode():
        before = embedded.model(input_ids=ids).logits
        for _ in range(2):
            with adapted(embedded.model, adapter) as model:
                assert not torch.allclose(model(input_ids=ids).logits, before, atol=1e-2)
            assert torch.equal(embedded.model(input_ids=ids).logits, before)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, adapter):
    """A small evaluation of base and adapter; read only."""
    out = tmp_path_factory.mktemp("evaluated") / "listening"
    small = ("--num-clips", "8", "--num-generated", "3", "--max-seconds", "2", "--device", "cpu")
    arguments = ["--adapter", str(adapter), "--data", "embedded:arabic", "--out", str(out)]
    assert cli.main(["evaluate", *arguments, *small]) == 0
    rows = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    return out, json.loads((out / "evaluate.json").read_text()), rows


def test_losses_equal_those_of_validation_in_training(evaluated, embedded, state, adapter_config):
    _, result, _ = evaluated
    loop = PackLoop(
        embedded,
        Dataset.open("embedded:arabic"),
        DataSettings(num_val_clips=8),
        PackLimits.of([adapter_config], num_slots=1),
    )
    base, trained = (system["losses"] for system in result["systems"])
    assert base == pytest.approx(loop.base_metrics, rel=1e-5)
    loop.engine.add("a", adapter_config, state)
    assert trained == pytest.approx(loop.validate(["a"])["a"], rel=1e-5)
    assert trained["val/text/nll"] != pytest.approx(base["val/text/nll"], rel=1e-2)


def test_an_adapter_with_nan_losses_is_an_error_that_names_it(tmp_path, embedded, adapter):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(broken / "adapter_model.safetensors")
    name = min(weights)
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    data = DataSettings(num_val_clips=2)
    with pytest.raises(
        ModelError, match=r"broken: its val/audio/nll_per_code is nan.* Leave it out, or give"
    ):
        validation_losses(embedded, Dataset.open(data.path), data, [adapter, broken])


def test_every_clip_has_a_row_and_files_for_recording_reference_and_each_system(evaluated):
    out, _, rows = evaluated
    assert len(rows) == 3 * 4
    assert {row["system"] for row in rows} == {"recording", "reference", "base", rows[-1]["system"]}
    for row in rows:
        wave, rate = soundfile.read(out / row["wav"])
        assert len(wave) / rate == pytest.approx(row["seconds"])
        assert (out / row["picture"]).read_bytes().startswith(b"\x89PNG")
        assert (row["task"], row["reference"] is None) == ("clone", False)
        assert row["reference"] != row["clip"]
    assert not list(out.rglob("*.tmp"))


def test_figures_of_a_system_are_means_over_its_clips(evaluated):
    _, result, rows = evaluated
    recorded = {row["clip"]: row["seconds"] for row in rows if row["system"] == "recording"}
    for system in result["systems"]:
        own = [row for row in rows if row["system"] == system["name"]]
        ratios = [row["seconds"] / recorded[row["clip"]] for row in own]
        assert system["speech"]["speech/length_ratio"] == {
            "mean": pytest.approx(np.mean(ratios)),
            "num_clips": 3,
        }
        assert system["speech"]["speech/eos_rate"]["mean"] == pytest.approx(
            np.mean([row["reached_eos"] for row in own])
        )
        assert "speech/cer" not in system["speech"]
    assert any("--asr" in note for note in result["notes"])


def test_the_page_plays_every_clip_and_shows_its_texts(evaluated):
    out, _, rows = evaluated
    page = (out / "evaluate.html").read_text(encoding="utf-8")
    linked = re.findall(r'src="([^"]+)"', page)
    assert sorted(linked) == sorted([r["wav"] for r in rows] + [r["picture"] for r in rows])
    assert all(row["text"] in page for row in rows)
    assert "http" not in page and "<!--" not in page


def test_right_to_left_names_are_isolated_from_each_other():
    """Otherwise two adjacent names form one run of text, and the second is shown first."""
    take = {"metrics": {}, "seconds": 1.0, "wav": "a.wav", "picture": "a.png", "system": "base"}
    row = {"clip": "تسجيل-1", "speaker": "محمد", "task": "speak", "text": "نعم", **take}
    page = _clip("تسجيل-1", [row])
    assert "<bdi>تسجيل-1</bdi> · <bdi>محمد</bdi> · speak" in page


def test_a_sweeps_best_adapter_is_evaluated_and_linked_from_its_report(tmp_path, adapter, capsys):
    folder = tmp_path / "quick"
    (folder / "listen").mkdir(parents=True)
    (folder / "listen" / "of-another-best.wav").write_bytes(b"")
    realistic(folder)
    for best in folder.glob("trials/*/adapter"):
        for file in best.iterdir():
            file.unlink()
        for file in adapter.iterdir():
            (best / file.name).write_bytes(file.read_bytes())
    build_report(folder)
    assert "evaluate.html" not in (folder / "report.html").read_text()
    small = ("--num-clips", "8", "--num-generated", "1", "--max-seconds", "1", "--device", "cpu")
    assert cli.main(["evaluate", "--results", str(folder), *small]) == 0
    report = (folder / "report.html").read_text()
    assert '<a href="listen/evaluate.html">' in report
    assert "Another configuration has become the best" not in report
    files = {path.name for path in (folder / "listen").iterdir()}
    assert files == {"evaluate.html", "evaluate.json", "clips.jsonl", "audio"}
    page = (folder / "listen" / "evaluate.html").read_text()
    assert "Losses on 8 held-out clips" in page
    said = capsys.readouterr()
    assert said.out.split() == [str(folder / "listen/evaluate.html"), str(folder / "report.html")]
    losses = json.loads((folder / "listen" / "evaluate.json").read_text())["systems"]
    base, best = (f"{system['losses']['val/text/nll']:.3f}" for system in losses)
    assert re.search(rf"^text loss, nats per token +{base} +{best}$", said.err, re.MULTILINE)
    assert "\nlosses on 8 held-out clips, speech and text on 1\n" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --adapter DIR (none for the base alone), or --results DIR"),
        (("--adapter", "none"), "--out: give a folder"),
        (("--adapter", "none", "--out", "."), "--out: . exists, and nothing is replaced"),
        (("--results", "nowhere", "--data", "x"), "--data: comes from the folder of --results"),
        (
            ("--results", "nowhere"),
            "--results nowhere: found no sweep.yaml, needed the results folder",
        ),
        (("--adapter", "none", "--out", "o", "--num-clips", "1"), "num_clips: Input should be"),
        (
            ("--adapter", "none", "--out", "o", "--asr-language", "ar"),
            "--asr-language: needs a recogniser; name one with --asr",
        ),
        (
            ("--adapter", "none", "--out", "o", "--asr-revision", "1"),
            "--asr-revision: needs a recogniser",
        ),
    ],
)
def test_bad_arguments_of_evaluate_are_one_clear_error(capsys, arguments, message):
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
