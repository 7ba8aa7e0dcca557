"""Lanes in processes of their own. The tests fork from fresh processes, which they may damage."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from higgs_tune.config import ALL_LINEAR
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import is_out_of_memory
from higgs_tune.train.engine import Engine
from higgs_tune.train.lane_process import LaneLostError, LaneProcess
from higgs_tune.train.lanes import Lanes
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.residents import PackLimits
from tests.models import DATA, make_dataset, tiny_base, trial
from tests.runs import figures
from tests.threads import torch_threads

STEPS = {"num_steps": 2, "report_every_steps": 1, "learning_rate": 1e-3}
HEADS = (*ALL_LINEAR, "text_head", "audio_head")
CROSS = ("attention", "audio_attention")
TRIALS = {
    "plain": trial(seed=1, rank=8, **STEPS),
    # several forwards a step, and both heads
    "heads": trial(
        seed=2, rank=5, dropout=0.2, targets=HEADS, batch_clips=4, token_budget=64, **STEPS
    ),
    "to_audio": trial(
        seed=3, rank=4, cross_attention="text_to_audio", targets=CROSS, dropout=0.1, **STEPS
    ),
    "audio_self": trial(seed=4, rank=2, cross_attention="audio_self", targets=CROSS, **STEPS),
}


def in_new_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result(timeout=300)


def answer(what, *rest):
    """Runs in the lanes of these tests: calls the function that a test sends."""
    return what(*rest)


def on_threads(count):
    return os.getpid(), torch.get_num_threads(), count


def fail(error):
    raise error


def raise_made(make):
    raise make()


class StubbornError(MemoryError):
    """An error that cannot be unpickled."""

    def __init__(self, one, other):
        super().__init__(f"{one} {other}")


class WildError(Exception):
    """An error that cannot be pickled, because it raises a KeyError."""

    def __reduce__(self):
        raise KeyError("wild")


class OddError(Exception):
    """An error that is unpickled as a string."""

    def __reduce__(self):
        return str, ("odd",)


def talk():
    lane = LaneProcess(answer)
    pid, threads, copied = lane.call(on_threads, [1, 2])
    assert pid != os.getpid() and (threads, copied) == (1, [1, 2])
    with pytest.raises(MemoryError, match="no room") as caught:
        lane.call(fail, MemoryError("no room"))
    assert is_out_of_memory(caught.value)
    (note,) = caught.value.__notes__
    assert "in a lane's process" in note and "in fail" in note
    for error, kind in (
        (partial(StubbornError, "cannot", "travel"), MemoryError),
        (partial(WildError, "cannot travel"), RuntimeError),
        (partial(OddError, "cannot travel"), RuntimeError),
    ):
        with pytest.raises(kind, match=rf"^{error.func.__name__}: cannot travel") as caught:
            lane.call(raise_made, error)
        (note,) = caught.value.__notes__
        assert "in raise_made" in note
    os.kill(pid, signal.SIGINT)  # Ctrl-C reaches all processes; only the parent acts on it
    assert lane.call(os.getpid) == pid
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(LaneLostError, match="has ended with -9"):
            lane.call(os.getpid)


def break_off():
    """Memory runs out in the parent as it reads an answer: the next call must not get this one."""
    lane = LaneProcess(answer)
    pid, receive = lane.call(os.getpid), lane._connection.recv_bytes
    lane._connection.recv_bytes = lambda: fail(MemoryError("none here"))
    with pytest.raises(LaneLostError, match="cannot be asked: none here"):
        lane.call(int, "1")
    lane._connection.recv_bytes = receive
    with pytest.raises(LaneLostError):
        lane.call(int, "2")
    assert pid not in [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def hold_a_connection():
    ours, theirs = socket.socketpair()
    lane = LaneProcess(answer)
    theirs.close()
    ours.settimeout(10)
    assert ours.recv(1) == b""  # the other end is closed, in the lane too
    assert lane.call(os.getpid) != os.getpid()


@pytest.fixture(scope="module")
def new_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("act", [talk, break_off, hold_a_connection])
def test_a_lane_answers_until_it_is_lost_and_holds_no_sockets(new_process, act):
    new_process.submit(act).result(timeout=300)


def test_a_lane_ends_with_its_parent(tmp_path):
    lines = """
        import sys, time
        from pathlib import Path
        from tests.unit.train.test_lane_process import LaneProcess, answer, os
        lanes = [LaneProcess(answer) for _ in range(2)]
        Path(sys.argv[1]).write_text(" ".join(str(lane.call(os.getpid)) for lane in lanes))
        lanes[0].call(time.sleep, 60)
    """
    script = "\n".join(line.strip() for line in lines.splitlines())
    pids = tmp_path / "pids"
    with subprocess.Popen([sys.executable, "-c", script, str(pids)]) as parent:
        while not pids.exists() or len(pids.read_text().split()) < 2:
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
    ended = time.monotonic() + 20
    for pid in pids.read_text().split():
        while Path(f"/proc/{pid}").exists() and time.monotonic() < ended:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                break  # a zombie that its new parent has not reaped
            time.sleep(0.05)
        else:
            assert time.monotonic() < ended, "it lives on"


def test_lanes_are_threads_where_a_fork_cannot_compute(caplog, monkeypatch):
    def refuse(tensor):  # as with a GPU, after the first gradient
        raise RuntimeError("Unable to handle autograd's threading in combination with fork")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    lanes = Lanes(torch.device("cpu"))
    lanes.count = 3
    lanes.fork(answer, 3)
    assert "the 3 cores take turns in Python" in caplog.text
    assert "cannot compute: Unable to handle" in caplog.text
    assert lanes.run([lambda: lanes.process] * 3) == [None] * 3


def test_lanes_are_threads_where_nothing_can_be_forked(caplog, monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", refuse)
    lanes = Lanes(torch.device("cpu"))
    lanes.count = 2
    lanes.fork(answer, 2)
    assert "cannot be forked: [Errno 12] Cannot allocate memory" in caplog.text
    assert lanes.run([lambda: lanes.process] * 2) == [None] * 2


def train(folder, threads, *, spoil=None):
    """Results, last states, numbers of forwards in both dtypes; trials change slots in between."""
    torch.set_num_threads(threads)
    limits = PackLimits.of(list(TRIALS.values()), num_slots=3)
    rounds, weights, num_forwards = [], {}, []
    for dtype in (torch.float32, torch.bfloat16):
        loop = PackLoop(tiny_base(dtype=dtype), Dataset.open(folder), DATA, limits)
        if spoil:
            spoil(loop)
        for name in ("heads", "to_audio", "plain"):
            loop.join(name, TRIALS[name])
        rounds.append(loop.advance())
        for name in ("heads", "to_audio", "plain"):
            loop.leave(name)
        for name in ("plain", "audio_self", "heads"):  # from step 0 again, in other slots
            loop.join(name, TRIALS[name])
        rounds += [loop.advance(), loop.advance()]
        for name in ("plain", "heads", "audio_self"):
            weights[f"{name} {dtype}"] = loop.engine.state(name)
        num_forwards.append(loop.num_forwards)
    shared = [
        {
            name: {k: v for k, v in figures(r).items() if "share" not in k}
            for name, r in each.items()
        }
        for each in rounds
    ]  # gradient shares are summed here, by all threads
    return shared, weights, num_forwards


def train_in_lanes(folder, *, dies):
    """`train` on two cores; in a lane's process two forwards fail, or the process is killed."""
    pids = set()

    def note(loop):
        plain, here = loop.engine.compute, os.getpid()

        def compute(job, slots):
            process = loop.engine.lanes.process
            pids.add(here if process is None else process.call([], _pid))
            return plain(job, slots)

        loop.engine.compute = compute
        if dies:
            loop._validator.validate = None  # must not be reached
            for pid in set(loop.engine.lanes.run([partial(compute, _pid, ())] * 8)) - {here}:
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.2)

    spoil([ValueError("odd"), MemoryError("none here")])
    found = train(folder, 2, spoil=note)
    assert len(pids) == 3, pids  # this process, and a lane's for each dtype
    return found


def _pid(engine):
    time.sleep(0.01)
    return os.getpid()


def spoil(errors):
    """Make forwards fail in a lane's process, once with each error, leaving gradients behind."""
    plain, here = Engine.forward_backward, os.getpid()

    def spoilt(self, *arguments):
        result = plain(self, *arguments)
        if os.getpid() != here and errors:
            raise errors.pop()
        return result

    Engine.forward_backward = spoilt


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    make_dataset(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(dataset_folder):
    before = torch.get_num_threads()
    try:
        return train(dataset_folder, 1)
    finally:
        torch.set_num_threads(before)


def test_lanes_in_processes_train_the_same_bits_as_one_thread(dataset_folder, expected):
    results, states, num_forwards = in_new_process(
        partial(train_in_lanes, dies=False), dataset_folder
    )
    assert repr(results) == repr(expected[0])  # NaN equals NaN here
    assert states.keys() == expected[1].keys()
    for name, state in states.items():
        assert state.step == 2
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            for key, tensor in getattr(state, kind).items():
                assert torch.equal(tensor, getattr(expected[1][name], kind)[key]), (name, key)
    assert all(map(int.__ge__, num_forwards, expected[2])), num_forwards  # two were repeated


def test_new_modules_of_one_kind_do_not_cover_the_memory_of_another():
    with torch_threads(2):
        engine = Engine(tiny_base(), PackLimits.of(list(TRIALS.values()), num_slots=2))
    resident = engine.add("t", TRIALS["to_audio"])
    sizes = {
        part.kind: part.storage.master[part.where].numel() for part in engine.bank.seats[0].parts
    }
    new = {
        name: view for name, view in engine.bank.views(0, "master").items() if "lora" not in name
    }
    assert sizes["new"] == sum(view.numel() for view in new.values()) > 0
    assert engine.bank.seats[resident.slot].new.master.numel() > sizes["new"]  # room for audio_self


def test_lanes_beyond_the_slots_are_threads():
    with torch_threads(2):
        lanes = Lanes(torch.device("cpu"))
    lanes.count = 4
    lanes.fork(answer, 2)
    assert len(lanes._processes) == 1


def test_the_death_of_a_lane_ends_the_whole_pack(dataset_folder):
    with pytest.raises(LaneLostError, match="ended with -9"):
        in_new_process(partial(train_in_lanes, dies=True), dataset_folder)
