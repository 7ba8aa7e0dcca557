"""What real signals do to a run and to a sweep."""

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
def test_only_ctrl_c_cuts_short_a_run_that_is_already_stopping(second, exit_code):
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


def test_a_run_whose_terminal_is_closed_stops_and_exits_with_0():
    terminal, of_process = pty.openpty()
    command = [sys.executable, "-c", SCRIPT]
    ends = {"stdin": subprocess.PIPE, "stdout": of_process, "stderr": of_process}
    with subprocess.Popen(command, **ends) as process:
        os.close(of_process)
        with open(terminal, "rb", buffering=0) as screen:
            assert screen.readline() == b"ready\r\n"
        # from now on, printing there is an error
        process.send_signal(signal.SIGHUP)
        process.communicate(b"\n")
    assert process.returncode == 0


def test_sighup_does_not_stop_a_run_under_nohup():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(request := StopRequest()):
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.number is None
    finally:
        signal.signal(signal.SIGHUP, former)


def test_sigterm_raises_system_exit_and_the_former_handler_returns():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is former
