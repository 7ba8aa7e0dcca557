"""What a signal does to a run and to a sweep: real signals to a process of its own."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from higgs_tune.train.signals import StopRequest, exit_on_sigterm, stop_signals

SCRIPT = """
import time
from higgs_tune.train.signals import StopRequest, stop_signals
request = StopRequest()
with stop_signals(request):
    print("ready", flush=True)
    while request.number is None:
        time.sleep(0.01)
    print("stops", flush=True)
    input()
    print("saved", flush=True)
"""


@pytest.mark.parametrize(
    ("second", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_only_a_ctrl_c_ends_at_once_what_is_already_ending(second, exit_code):
    command = [sys.executable, "-c", SCRIPT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "stops\n"
        process.send_signal(second)
        rest, _ = process.communicate("\n")
    assert (process.returncode, rest) == (exit_code, "saved\n" if exit_code == 0 else "")


def test_a_run_whose_terminal_is_closed_ends_as_well_and_prints_no_more():
    terminal, of_process = pty.openpty()
    command = [sys.executable, "-c", SCRIPT]
    ends = {"stdin": subprocess.PIPE, "stdout": of_process, "stderr": of_process}
    with subprocess.Popen(command, **ends) as process:
        os.close(of_process)
        with open(terminal, "rb", buffering=0) as screen:
            assert screen.readline() == b"ready\r\n"
        # to print there is an error from now on
        process.send_signal(signal.SIGHUP)
        process.communicate(b"\n")
    assert process.returncode == 0


def test_nohup_keeps_a_closed_terminal_from_ending_a_run():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(request := StopRequest()):
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.number is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_sigterm_ends_the_process_as_an_exit_does():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is former
