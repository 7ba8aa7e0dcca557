"""A process that computes for a lane, on a core and with a Python of its own.

The threads of one process hand Python's lock over at every operation. A lane's process is forked, so that it
has the base without a copy and the import of torch behind it; the adapters' parameters and gradients lie in
memory that both write (`Storage`), so only clips go there and only sums come back. Each adapter computes on
one thread, here as there: which lane it is does not show in its bits.
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
    """The process of a lane has ended: what it had begun lies half done in the shared memory."""


class LaneProcess:
    """The parent's end of one."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        """Fork it.

        Args:
            answer: what it does with the arguments of each `call`.

        Raises:
            LaneLostError: it cannot compute. Where there is a GPU, autograd refuses to in a fork of a
                process that has computed a gradient.
        """
        context = get_context("fork")
        with warnings.catch_warnings():
            # of threads whose locks nobody would release; the child only computes, which takes none
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                self._connection, there = context.Pipe()
                self._process = context.Process(
                    target=_serve, args=(answer, there), name="higgs-tune lane", daemon=True
                )
                self._process.start()
            except (OSError, AssertionError) as error:  # no process, memory or file left; a daemon
                raise LaneLostError(f"a lane's process cannot be forked: {error}") from error
        there.close()
        if not self._connection.poll(_START_S):
            raise self._lost(f"has not answered for {_START_S} s")
        try:
            error = self._connection.recv()
        except EOFError:
            error = "it ended at its start"
        if error:
            raise self._lost(f"cannot compute: {error}")

    def call(self, *arguments: Any) -> Any:
        """Its answer to these arguments, which are copied, as the answer is.

        Raises:
            Exception: what was raised there, with its traceback as a note.
            LaneLostError: the process has ended.
        """
        request = pickle.dumps(arguments)
        try:
            self._connection.send_bytes(request)
            reply = self._connection.recv_bytes()
        except (EOFError, OSError, MemoryError) as error:
            self._process.join(1)  # if it lives, nobody knows whose answer would come next
            code = self._process.exitcode
            raise self._lost(
                f"has ended with {code}; -9 is what the system does when memory runs out"
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
        self._connection.close()  # with what may still be in it
        return LaneLostError(f"a lane's process {why}")


def _serve(answer: Callable[..., Any], connection: Connection) -> None:
    Path("/proc/self/comm").write_text("higgs-tune lane")  # for `top`; at most 15 letters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_sockets_go(connection.fileno())
    torch.set_num_threads(1)
    gc.freeze()  # the parent's objects: to look at them would copy them
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
    except Exception as error:  # raised again where it was asked for
        portable = _portable(error)
        release_frames(error)
    gc.collect()  # what the failed attempt held; memory may be what it lacked
    return pickle.dumps(portable)


def _end_with_parent() -> None:
    """Also in the midst of a job, or if that hangs."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """As one that can be pickled, with its traceback as a note."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs the error's own code: then its text and traceback have to do
        copy = None
    if not isinstance(copy, Exception):
        kind = MemoryError if is_out_of_memory(error) else RuntimeError
        copy = kind(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a lane's process:\n{''.join(traceback.format_exception(error))}")
    return copy


def _let_sockets_go(mine: int) -> None:
    """Close the parent's connections here, so that those at their other ends see when it dies.

    Their numbers stay taken: objects that are still about would close what comes to stand there.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        try:
            is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        except OSError:  # the listing's own
            continue
        if is_socket and number not in (0, 1, 2, mine):
            os.dup2(nothing, number)
    os.close(nothing)
