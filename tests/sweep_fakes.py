"""A searcher without Tune, and the results that Tune would pass to it."""

from higgs_tune.sweep.searcher import StudySearcher

AUDIO_LIMIT = 3.15


def make_searcher(study, config, checkpoints=None, **kwargs):
    """A StudySearcher, and lists of the rosters it publishes and the trials it resumes."""
    rosters = []
    resumed = []
    workers = kwargs.pop("workers", ["w0"])
    searcher = StudySearcher(
        study,
        config,
        audio_limit=lambda: AUDIO_LIMIT,
        on_resume=lambda tune_id, trial: resumed.append((tune_id, trial.intermediate_values)),
        on_copy=kwargs.pop("on_copy", lambda record, donor_id: None),
        checkpoint_of=lambda trial_id: (checkpoints or {}).get(trial_id),
        workers=workers,
        publish=lambda roster, beat: rosters.append(roster),
        serving=kwargs.pop("serving", lambda: list(range(len(workers)))),
        rooms=kwargs.pop("rooms", lambda: [1000] * len(workers)),
        on_study_error=kwargs.pop("on_study_error", lambda error: None),
        **kwargs,
    )
    return searcher, rosters, resumed


def report(text, step, status="running", audio=3.0, reason=None):
    """A flat Tune result."""
    return {
        "step": step,
        "val/text/nll": text,
        "val/audio/nll_per_code": audio,
        "status": status,
        "reason": reason,
    }


def finish(searcher, tune_id, text, num_steps=150, audio=3.0):
    """Let a trial report once and complete."""
    searcher.on_trial_result(tune_id, report(text + 1, 75, audio=audio))
    searcher.on_trial_complete(tune_id, report(text, num_steps, "completed", audio))
