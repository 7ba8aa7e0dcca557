"""What a signal does to a run and to a sweep: real signals to a process of its own."""

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import signal
from higgs_tune.train.signals import StopRequest, stop_signals
request = StopRequest()
with stop_signals(request):
    print("ready", flush=True)
    while request.number is None:
        signal.pause()
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
