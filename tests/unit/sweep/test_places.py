"""Relative paths refer to the folder of the command, wherever a worker was started."""

import pytest

from higgs_tune.sweep.places import absolute_paths


@pytest.mark.parametrize(
    ("path", "there", "expected"),
    [
        ("mine", True, "{here}/mine"),
        ("mine", False, "mine"),
        ("bases/mine", True, "{here}/bases/mine"),
        ("/data/mine", False, "/data/mine"),
        ("~/mine", False, "~/mine"),
    ],
)
def test_a_relative_path_that_exists_where_the_command_runs_becomes_absolute(
    tmp_path, monkeypatch, make_config, path, there, expected
):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / path).mkdir(parents=True)
    found = absolute_paths(make_config(base={"path": path}, data={"path": path}))
    assert {found.base.path, found.data.path} == {expected.format(here=tmp_path)}


def test_names_of_the_hub_and_embedded_assets_are_kept(make_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    assert absolute_paths(make_config(data={"path": "embedded"})).data.path == str(
        tmp_path / "embedded"
    )
    hub = {"path": "bosonai/higgs-audio-v2-generation-3B-base", "revision": "0" * 40}
    config = make_config(base=hub, data={"path": "embedded:arabic"})
    assert absolute_paths(config) == config
    assert absolute_paths(make_config()) == make_config()
