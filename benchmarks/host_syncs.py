"""Count where a step makes the host wait for the device."""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_READS = {
    aten._local_scalar_dense,  # item, float(), bool()
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.bincount,
}
_INDEXING = {
    aten.index,
    aten._unsafe_index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
    aten._unsafe_index_put,
}


class HostReads(TorchDispatchMode):
    """Counts operations whose result or shape depends on values: on a GPU the host waits for each.

    Also counts indexing by tensors on another device. Works on any device, in forward and backward. Does not
    see `tolist()` and `numpy()` of a CPU tensor, which read memory without an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Count the operation if it waits, and run it."""
        packet = func.overloadpacket
        if packet in _READS:
            self.found[str(func)] += 1
        elif packet in _INDEXING:
            indices = [i for i in args[1] if isinstance(i, torch.Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                self.found[f"{func} by a mask"] += 1
            if any(i.device != args[0].device for i in indices):
                self.found[f"{func} from the host"] += 1
        return func(*args, **(kwargs or {}))


def count_host_syncs(step: Callable[[], Any], device: torch.device) -> int:
    """Host syncs of one step: those that CUDA reports, or those that `HostReads` sees elsewhere."""
    if device.type != "cuda":
        with HostReads() as reads:
            step()
        return reads.found.total()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
