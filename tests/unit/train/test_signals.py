import signal

import pytest

from higgs_tune.train.signals import exit_on_sigterm


def test_sigterm_ends_the_process_as_an_exit_does():
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is former
