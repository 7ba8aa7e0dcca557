"""The steps at which schedulers judge trials, and the checkpoints that this takes."""

from higgs_tune.config import SweepConfig


def grace_steps(config: SweepConfig) -> int:
    """The first step at which a trial is judged: a report's step, after warm-up."""
    num_steps, interval = config.train.num_steps, config.train.report_every_steps
    wanted = round(config.tune.scheduler.grace_fraction * num_steps / interval) * interval
    return min(max(wanted, config.past_warmup), num_steps)


def perturb_steps(config: SweepConfig) -> int:
    """The number of steps between two comparisons of a population."""
    return config.tune.scheduler.perturb_every_steps or grace_steps(config)


def num_checkpoints(config: SweepConfig) -> int:
    """How many checkpoints must be kept of each trial.

    Before a copy has read its donor's checkpoint, the donor reaches the next comparison at most. One is
    to spare.
    """
    if config.tune.scheduler.name != "pbt":
        return 1
    every = perturb_steps(config)
    return -(-every // config.train.report_every_steps) + 2
