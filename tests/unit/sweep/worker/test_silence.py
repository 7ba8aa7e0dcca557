"""For how long a worker waits for a trial that says nothing."""

from higgs_tune.sweep.worker.silence import SLOWEST_BYTES_A_BEAT, Silence


def beats_until_lost(silence: Silence, trial_id: str) -> int:
    for number in range(1, 1000):
        silence.beat([trial_id], 1)
        if trial_id in silence.lost():
            return number
    raise AssertionError("never lost")


def test_a_trial_that_stores_a_large_checkpoint_may_be_silent_for_longer():
    silence = Silence(5, together=False)
    assert beats_until_lost(silence, "t0") == 5
    silence.heard("t0", num_bytes=20 * SLOWEST_BYTES_A_BEAT)
    assert beats_until_lost(silence, "t0") == 25
    silence.heard("t0")
    assert beats_until_lost(silence, "t0") == 5


def test_hearing_from_another_trial_does_not_shorten_that_silence():
    silence = Silence(5, together=True)
    silence.heard("t0", num_bytes=20 * SLOWEST_BYTES_A_BEAT)
    silence.heard("t1")
    assert beats_until_lost(silence, "t0") == 25
