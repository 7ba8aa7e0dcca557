"""A process that computes for a lane, with its own core and its own Python interpreter.

Threads of one process pass Python's lock around at every operation. A lane's process is forked, so it has
the base without a copy, and torch already imported. The adapters' parameters and gradients lie in shared
memory (`Storage`), so only clips are sent and only sums come back. An adapter computes on one thread in any
lane, so its results are the same to the bit.
"""

import gc
import os
import pickle
import signal
import stat
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from higgs_tune.errors import is_out_of_memory, release_frames

_START_S = 60  # a forked process answers within milliseconds, or never


class LaneLostError(RuntimeError):
    """A lane's process cannot start, or is lost and may have left half-done work in the shared memory."""


class LaneProcess:
    """The parent's handle of a lane's process."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        """Fork the process.

        Args:
            answer: runs in the process on the arguments of each `call`.

        Raises:
            LaneLostError: the process cannot start or compute. With a GPU, autograd refuses to run in a
                fork of a process that has already computed a gradient.
        """
        context = get_context("fork")
        with warnings.catch_warnings():
            # it warns of locks that other threads may hold; the child only computes, which needs none
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._connection, there = context.Pipe()
                self._process = context.Process(
                    target=_serve, args=(answer, there), name="higgs-tune lane", daemon=True
                )
                self._process.start()
            except (OSError, AssertionError) as error:  # out of resources; this process is a daemon
                raise LaneLostError(f"a lane's process cannot be forked: {error}") from error
        there.close()
        if not self._connection.poll(_START_S):
            raise self._lost(f"has not answered for {_START_S} s")
        try:
            error = self._connection.recv()
        except EOFError:
            error = "it ended during startup"
        if error:
            raise self._lost(f"cannot compute: {error}")

    def call(self, *arguments: Any) -> Any:
        """Send these arguments and return the answer; both are pickled.

        Raises:
            Exception: what was raised in the process, with its traceback as a note.
            LaneLostError: the process has ended, or cannot be asked any more.
        """
        request = pickle.dumps(arguments)
        try:
            self._connection.send_bytes(request)
            reply = self._connection.recv_bytes()
        except (EOFError, OSError, MemoryError) as error:
            # if it lives, it is given up too: its next answer could belong to this call
            self._process.join(1)
            code = self._process.exitcode
            raise self._lost(
                f"has ended with {code}; -9 is how the system kills a process when memory runs out"
                if code is not None
                else f"cannot be asked: {error}"
            ) from error
        answer = pickle.loads(reply)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _lost(self, why: str) -> LaneLostError:
        self._process.kill()
        self._process.join()
        self._connection.close()  # drops unread answers
        return LaneLostError(f"a lane's process {why}")


def _serve(answer: Callable[..., Any], connection: Connection) -> None:
    Path("/proc/self/comm").write_text("higgs-tune lane")  # for `top`; at most 15 letters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _close_parent_sockets(connection.fileno())
    torch.set_num_threads(1)
    gc.freeze()  # exempts the parent's objects: scanning them would copy their pages
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            torch.zeros((), requires_grad=True).sum().backward()
    except RuntimeError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with suppress(EOFError, OSError):  # the parent has ended
        while True:
            connection.send_bytes(_reply(answer, connection.recv_bytes()))


def _reply(answer: Callable[..., Any], request: bytes) -> bytes:
    try:
        return pickle.dumps(answer(*pickle.loads(request)))
    except Exception as error:  # raised again in the parent
        portable = _portable(error)
        release_frames(error)
    gc.collect()  # frees what the failed attempt held, which may have run out of memory
    return pickle.dumps(portable)


def _end_with_parent() -> None:
    """Exit when the parent does, even in the middle of a job that hangs."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error in a form that can be pickled, with its traceback as a note."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code: fall back to its text and traceback
        copy = None
    if not isinstance(copy, Exception):
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        copy = kind(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a lane's process:\n{''.join(traceback.format_exception(error))}")
    return copy


def _close_parent_sockets(mine: int) -> None:
    """Close the parent's sockets in this process, so that their peers notice when the parent dies.

    Each number then refers to /dev/null: if it were free, objects that still hold it would later close
    whatever had reused it.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:  # the listing's own descriptor
            continue
        if is_socket and number not in (0, 1, 2, mine):
            os.dup2(nothing, number)
    os.close(nothing)
