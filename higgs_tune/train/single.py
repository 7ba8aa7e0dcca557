"""Train one configuration: a pack of one, with checkpoints, on one or several processes.

A step's clips, and with dropout the masks of each process's forwards, depend only on the settings, the seed
and the step. So a run resumes exactly from a checkpoint of weights, moments, step and the interval's sums; on
a GPU up to rounding, in which any two runs differ. A checkpoint does not hold how short the forwards became
after memory ran out.
"""

import signal
from contextlib import ExitStack
from pathlib import Path

from higgs_tune import metrics
from higgs_tune.config import BaseSettings, DataSettings, RunSettings, TrialConfig
from higgs_tune.data.dataset import Dataset
from higgs_tune.errors import ConfigError, DataError
from higgs_tune.files import write_json
from higgs_tune.model.load import load_base
from higgs_tune.train import run_folder as folder
from higgs_tune.train.checkpoint import read_step
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.parallel import ALONE, World
from higgs_tune.train.recorder import Recorder, Watcher, early_stop_reason, is_finished, last_line
from higgs_tune.train.residents import PackLimits
from higgs_tune.train.run_folder import Line
from higgs_tune.train.signals import StopRequest, stop_signals
from higgs_tune.train.start_from import check_start, start_state, warn_if_trained_differently

_ID = "run"


def train_single(
    base: BaseSettings,
    data: DataSettings,
    trial: TrialConfig,
    out: Path,
    *,
    dataset: Dataset,
    resume: bool,
    watcher: Watcher,
    run: RunSettings,
    world: World = ALONE,
    device: str | None = None,
) -> Line:
    """Train a configuration to its full budget, to an early stop, or until a signal asks to stop.

    Args:
        out: new or empty folder, or with `resume` one that an earlier run left; `run_folder` says
            what is in it. Every process must be able to read it; the main one writes.
        dataset: the opened dataset that `data.path` names.
        world: the processes that train together; each makes this call.
        device: this process's device, if it is not `base.device`.

    Returns:
        The last validation's metrics, with "status" completed, diverged or out_of_memory; or
        "cancelled" with the number of the "signal" that asked for it.

    Raises:
        ConfigError: `out` is not empty, or a run is training there; `resume` finds no run there, or one
            with other settings, data or base weights; not every process finds its checkpoint; or
            `run.start_from` has another rank or scale.
        ModelError: `run.start_from` is not an adapter, or not one that the trial can start from.
        DataError: the disk is full or `out` cannot be written; or the processes have different data.
    """
    if run.start_from is not None:  # absolute, to be comparable from any working directory
        begun = str(Path(run.start_from).expanduser().resolve())
        run = run.model_copy(update={"start_from": begun})
    started = folder.Started(
        base,
        data,
        trial,
        content_hash=dataset.info.content_hash,
        clips_per_step=world.size * run.gradient_accumulation_steps * trial.batch_clips,
        num_processes=world.size,
        start_from=run.start_from,
    )

    def open_folder() -> list[Line]:
        if resume:
            if out.is_dir():
                hold.enter_context(folder.locked(out))
            lines = folder.rewind(out, started)
            folder.repair_best(out, lines, run)
            return lines
        folder.check_new(out)
        return []

    request = StopRequest()
    with stop_signals(request), ExitStack() as hold:
        if not world.agree(dataset.info.content_hash):
            raise DataError(
                f"{data.path}: not the same data in every process (content hash "
                f"{dataset.info.content_hash[:12]} here). Copy one prepared dataset to all machines."
            )
        lines = world.on_main(open_folder)
        if world.on_main(lambda: is_finished(out, lines, trial, run)):
            world.on_main(lambda: folder.keep_again(out, lines, run))
            last = last_line(lines, run)
            if world.is_main:
                watcher.report(last)
            return last
        newest, start_from = out / folder.ADAPTER, None
        if not world.agree(read_step(newest) if newest.exists() else None):
            raise ConfigError(
                f"{newest}: not the same checkpoint in every process. Give an --out that all machines "
                "can read, and an empty one for a new run."
            )
        if run.start_from and not newest.exists():
            start_from = Path(run.start_from)
            check_start(start_from, trial)
        here = base.model_copy(update={"device": device or base.device})
        limits = PackLimits.of([trial], num_slots=1)
        loop = PackLoop(load_base(here), dataset, data, limits, world)
        folder.check_base(out, lines, loop.base_metrics)
        if start_from and world.is_main:
            warn_if_trained_differently(start_from, loop.base, data.system_text)
        account = loop.join(
            _ID,
            trial,
            newest if newest.exists() else None,
            start=start_state(start_from, trial, loop.engine) if start_from else None,
            batches_per_step=run.gradient_accumulation_steps,
        )
        # a resume may leave out run.start_from
        begun_from = next(
            (line["start_from"] for line in lines if "start_from" in line), run.start_from
        )
        settings = started.record() | {
            "run": run.model_dump(mode="json") | {"start_from": begun_from},
            "account": account,
            "preflight": loop.preflight,
        }

        def write_settings() -> None:
            with folder.writing(out):
                if not resume:
                    out.mkdir(parents=True, exist_ok=True)
                    hold.enter_context(folder.locked(out))
                    folder.check_new(out)  # another run may have begun here since
                write_json(out / folder.SETTINGS, settings)

        world.on_main(write_settings)
        recorder = Recorder(loop, _ID, out, run, world, watcher, lines)
        try:
            return _train(loop, recorder, trial, run, world, watcher, request)
        finally:
            recorder.close()


def _train(
    loop: PackLoop,
    recorder: Recorder,
    trial: TrialConfig,
    run: RunSettings,
    world: World,
    watcher: Watcher,
    request: StopRequest,
) -> Line:
    """Train until the run is finished, or a signal asks to stop."""

    def after_step() -> bool:
        step, _ = loop.position(_ID)
        if world.is_main:
            watcher.step(step)
        if world.any(request.number is not None):
            return True
        if run.save_every_steps and step % run.save_every_steps == 0 and not loop.due(_ID):
            recorder.save()
        return False

    recorder.start()
    step = recorder.lines[-1][metrics.STEP]
    if step >= trial.num_steps or early_stop_reason(recorder.lines, run):
        return last_line(recorder.lines, run)
    while not world.any(request.number is not None):
        results = loop.advance(after_step)
        if results:
            line = recorder.record(results[_ID])
            if line["status"] != "running":
                return line
    recorder.save()
    number = int(world.highest(float(request.number or 0)))
    return {
        metrics.STEP: loop.position(_ID)[0],
        "status": "cancelled",
        "reason": f"ended by {signal.Signals(number).name}",
        "signal": number,
    }
