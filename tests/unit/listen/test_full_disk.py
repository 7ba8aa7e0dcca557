"""Speech and pictures that do not fit on the disk."""

import re

import numpy as np
import pytest
import soundfile

from higgs_tune import cli
from higgs_tune.errors import DataError
from higgs_tune.listen.picture import draw_spectrogram
from higgs_tune.listen.run import write_result
from higgs_tune.listen.takes import write_wav
from tests.full_disk import largest_file

WAVE = np.sin(np.arange(24_000) / 20).astype(np.float32)


def test_a_wav_equals_the_one_that_soundfile_writes(tmp_path):
    write_wav(tmp_path / "a.wav", WAVE, 24_000)
    soundfile.write(tmp_path / "b.wav", WAVE, 24_000, subtype="PCM_16")
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    write_wav(tmp_path / "none.wav", WAVE[:0], 24_000)
    assert soundfile.info(tmp_path / "none.wav").frames == 0


def test_clips_that_do_not_fit_leave_the_former_files(tmp_path):
    write_wav(tmp_path / "a.wav", WAVE[:100], 24_000)
    former = (tmp_path / "a.wav").read_bytes()
    for name, write in {
        "a.wav": lambda path: write_wav(path, WAVE, 24_000),
        "a.png": lambda path: draw_spectrogram(path, WAVE, 24_000, 1.0),
    }.items():
        with largest_file(2000), pytest.raises(DataError) as caught:
            write(tmp_path / name)
        message = rf"{name}: cannot be written: .*File too large.* another --out"
        assert re.search(message, str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == former


def test_figures_that_do_not_fit_are_one_error_and_leave_no_file(tmp_path):
    rows = [{"clip": "a" * 3000}]
    with largest_file(2000), pytest.raises(DataError) as caught:
        write_result(tmp_path, {}, rows)
    message = rf"^{tmp_path}: cannot be written: .*File too large.* another --out.* again\.$"
    assert re.search(message, str(caught.value))
    assert not list(tmp_path.iterdir())


def test_speech_that_does_not_fit_is_one_error(tmp_path, capsys):
    arguments = ["generate", "--text", "هل", "--device", "cpu", "--max-seconds", "1"]
    with largest_file(2000):
        assert cli.main([*arguments, "--out", str(tmp_path / "a.wav")]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "a.wav: cannot be written: [Errno 27] File too large" in error
    assert "sweep" not in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
