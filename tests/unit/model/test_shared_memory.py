"""A bank's buffers that forked processes share."""

import errno
import mmap

import pytest
import torch

from higgs_tune.model.adapter_layout import Storage


def test_a_failure_to_share_memory_is_a_memory_error(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="cannot share 4 MiB"):
        Storage((1 << 20,), torch.float32, torch.device("cpu"), shared=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_buffers_are_zeroed_when_given_back(dtype):
    storage = Storage((3, 1000), dtype, torch.device("cpu"), shared=True)
    for buffer in storage.buffers():
        buffer.fill_(7)
    storage.release_memory()
    assert not any(buffer.count_nonzero() for buffer in storage.buffers())
    storage.master[1] = 2  # still usable
    assert storage.master.sum() == 2000


def test_shared_buffers_are_zeroed_without_support_for_giving_back(monkeypatch):
    storage = Storage((3, 1000), torch.float32, torch.device("cpu"), shared=True)
    storage.exp_avg.fill_(7)
    storage._maps[0] = Unable()
    storage.release_memory()
    assert not any(buffer.count_nonzero() for buffer in storage.buffers())


class Unable:
    """A mapping on a kernel without madvise."""

    def madvise(self, _):
        raise OSError(errno.ENOSYS, "Function not implemented")
