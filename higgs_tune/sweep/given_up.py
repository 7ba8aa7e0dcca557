"""Why Ray Tune gave a trial up: its process or worker failed more than tune.max_failures times."""

from pathlib import Path

from ray import cloudpickle
from ray.exceptions import RayTaskError
from ray.tune.experiment import Trial


def cause_of(trial: Trial) -> BaseException | None:
    """The error that ended the trial's last attempt, if Tune has stored it.

    `Trial.get_error` looks for it in the storage folder, where Tune puts the file only later.
    """
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return None
    error = cloudpickle.loads(Path(path).read_bytes())
    return error.cause if isinstance(error, RayTaskError) else error


def reason_of(trial: Trial | None) -> str:
    """Why Tune gave the trial up, in one line, and what to do."""
    cause = None if trial is None else cause_of(trial)
    line = "" if cause is None else f": {type(cause).__name__}: {cause}".partition("\n")[0]
    return f"Ray Tune gave it up because its process or worker failed; --resume continues it{line}"
