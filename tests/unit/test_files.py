"""A file or folder appears whole or not at all, whatever stops the writer."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from higgs_tune import files


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_former_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    files.write_text(path, "former")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "later")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_get_the_permissions_of_their_config(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_config.json").chmod(0o640)
    files.share_weights(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o640


def test_nan_is_not_written_to_json(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_a_folder_that_cannot_be_filled_leaves_the_former_one(tmp_path, error):
    folder = tmp_path / "adapter"
    files.replace_folder(folder, lambda draft: (draft / "a").write_text("former"))

    def half(draft):
        (draft / "a").write_text("later")
        raise error

    with pytest.raises(type(error)):
        files.replace_folder(folder, half)
    assert (folder / "a").read_text() == "former"
    assert list(tmp_path.iterdir()) == [folder]


def test_the_former_folder_is_kept_aside_until_the_new_one_is_there(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    files.replace_folder(folder, lambda draft: (draft / "a").write_text("former"))
    rename = files.Path.rename

    def failing(path, target):
        if path.suffix == ".new":
            raise OSError("the machine stopped")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "rename", failing)
        with pytest.raises(OSError, match="the machine stopped"):
            files.replace_folder(folder, lambda draft: (draft / "a").write_text("later"))
    assert not folder.exists()
    assert (files.former(folder) / "a").read_text() == "former"
    files.replace_folder(folder, lambda draft: (draft / "a").write_text("later"))
    assert (folder / "a").read_text() == "later"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_is_on_the_disk_before_the_former_one_is_removed(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    files.replace_folder(folder, lambda draft: (draft / "a").write_text("former"))
    events = []
    fsync, rename, rmtree = files.os.fsync, files.Path.rename, files.shutil.rmtree

    def note_sync(handle):
        events.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def note_rename(path, target):
        events.append(("rename", path.name))
        return rename(path, target)

    def note_rmtree(path, **options):
        events.append(("rmtree", path.name))
        rmtree(path, **options)

    def write(draft):
        (draft / "inner").mkdir()
        (draft / "inner" / "b").write_text("later")
        os.link(tmp_path / "elsewhere", draft / "a")  # as a trial's files are links to Tune's

    (tmp_path / "elsewhere").write_text("later")
    monkeypatch.setattr(files.os, "fsync", note_sync)
    monkeypatch.setattr(files.Path, "rename", note_rename)
    monkeypatch.setattr(files.shutil, "rmtree", note_rmtree)
    files.replace_folder(folder, write)
    places = [events.index(("rename", name)) for name in ("adapter", ".adapter.new")]
    gone = len(events) - 1 - events[::-1].index(("rmtree", ".adapter.old"))
    assert places[0] < places[1] < gone
    for name in ("a", "inner/b", "inner", "."):
        assert events.index(("sync", (folder / name).stat().st_ino)) < places[0], name
    assert places[1] < events.index(("sync", tmp_path.stat().st_ino)) < gone


def test_a_folder_that_cannot_be_synced_leaves_the_former_one(tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    files.replace_folder(folder, lambda draft: (draft / "a").write_text("former"))
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace_folder(folder, lambda draft: (draft / "a").write_text("later"))
    assert (folder / "a").read_text() == "former"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_system_that_cannot_sync_folders_can_be_written(tmp_path, monkeypatch):
    fsync = files.os.fsync

    def as_cifs(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", as_cifs)
    files.replace_folder(tmp_path / "adapter", lambda draft: (draft / "a").write_text("later"))
    assert (tmp_path / "adapter" / "a").read_text() == "later"
