"""The choice of the best configuration and the claims made about it."""

from pathlib import Path

import pytest

from higgs_tune.config import TrialConfig
from higgs_tune.metrics import VAL_TEXT_NLL
from higgs_tune.report.choose import Choice, Stat, choose
from higgs_tune.report.notes import notes_on
from higgs_tune.report.results import read_results
from tests.unit.report.builder import Builder, curve, realistic, sweep_config, trial_config

NO_CONFIRM = {"confirm": {"num_configs": 0}}


def run(builder: Builder, trial_id: str, text: float, audio: float = 3.9, **kwargs) -> None:
    """Add a full-budget trial with these final losses."""
    seed = kwargs.pop("seed", 0)
    config: TrialConfig = trial_config(seed=seed)
    builder.trial(trial_id, config, curve(config, text, 0.4, audio, 150), **kwargs)


def chosen(directory: Path) -> Choice:
    """The choice, which must exist."""
    choice = choose(read_results(directory))
    assert choice is not None
    return choice


def test_lowest_feasible_text_loss_wins_without_confirm(tmp_path: Path) -> None:
    builder = Builder(tmp_path, sweep_config(**NO_CONFIRM)).start()
    run(builder, "t000", 3.0, origin="baseline")
    run(builder, "t001", 2.0)
    run(builder, "t002", 1.0, audio=4.5)  # audio beyond the limit
    choice = chosen(tmp_path)
    assert choice.trial.id == "t001"
    assert choice.confirm == "skipped"
    assert choice.difference == Stat(pytest.approx(-1.0), None, 1)


def test_trial_stopped_early_is_never_chosen(tmp_path: Path) -> None:
    builder = Builder(tmp_path, sweep_config(**NO_CONFIRM)).start()
    config = trial_config()
    builder.trial("t000", config, curve(config, 0.1, 0.4, 3.9, 100), status="pruned")
    builder.trial("t001", config, curve(config, 0.1, 0.4, 3.9, 100), status="completed")
    run(builder, "t002", 3.0)
    assert chosen(tmp_path).trial.id == "t002"


def test_no_feasible_trial_gives_no_choice(tmp_path: Path) -> None:
    builder = Builder(tmp_path).start()
    run(builder, "t000", 2.0, audio=5.0, origin="baseline")
    assert choose(read_results(tmp_path)) is None


def test_unknown_base_gives_no_choice(tmp_path: Path) -> None:
    builder = Builder(tmp_path, base=None).start()
    run(builder, "t000", 2.0)
    assert choose(read_results(tmp_path)) is None


def confirmed(tmp_path: Path, losses: dict[str, tuple[float, float]], **last) -> Builder:
    """Trials 0, 1, 2 (3.0, 2.0, 2.1 in the search) with these confirm runs; `last` changes c005."""
    builder = Builder(tmp_path).start()
    for trial_id, text in (("t000", 3.0), ("t001", 2.0), ("t002", 2.1)):
        run(builder, trial_id, text, origin="baseline" if trial_id == "t000" else "search")
    for group, (trial_id, texts) in enumerate(losses.items()):
        for seed, text in enumerate(texts):
            run_id, options = (
                f"c{2 * group + seed:03d}",
                {"origin": "confirm", "confirms": trial_id},
            )
            if last and run_id == "c005":
                options |= last
            run(builder, run_id, text, seed=100 + seed, **options)
    return builder


def test_confirm_mean_overrides_the_search_result(tmp_path: Path) -> None:
    confirmed(tmp_path, {"t000": (3.0, 3.2), "t001": (2.6, 2.5), "t002": (2.1, 2.2)})
    choice = chosen(tmp_path)
    assert choice.trial.id == "t002"
    assert [r.id for r in choice.runs] == ["c004", "c005"]
    assert choice.adapter_run.id == "c004"
    assert choice.difference is not None
    assert choice.difference.mean == pytest.approx(-0.95)
    assert choice.difference.sd == pytest.approx(0.0707, abs=1e-3)


def test_configuration_that_diverges_in_confirm_is_not_chosen(tmp_path: Path) -> None:
    losses = {"t000": (3.0, 3.2), "t001": (2.6, 2.5), "t002": (2.1, 2.2)}
    confirmed(tmp_path, losses, status="diverged")
    assert chosen(tmp_path).trial.id == "t001"


def test_baseline_can_stay_the_best(tmp_path: Path) -> None:
    confirmed(tmp_path, {"t000": (1.9, 1.9), "t001": (2.6, 2.5), "t002": (2.1, 2.2)})
    choice = chosen(tmp_path)
    assert choice.trial.id == "t000"
    assert choice.difference is None


@pytest.mark.parametrize("status", ["cancelled", None])
def test_interrupted_confirm_falls_back_to_the_search(tmp_path: Path, status: str | None) -> None:
    losses = {"t000": (3.0, 3.2), "t002": (2.1, 2.2), "t001": (2.6, 2.5)}
    confirmed(tmp_path, losses, status=status)
    choice = chosen(tmp_path)
    assert (choice.trial.id, choice.confirm) == ("t001", "unfinished")


@pytest.mark.parametrize("status", ["cancelled", None])
def test_unfinished_confirm_group_neither_competes_nor_blocks(
    tmp_path: Path, status: str | None
) -> None:
    losses = {"t000": (3.0, 3.2), "t001": (2.6, 2.5), "t002": (2.1, 2.2)}
    confirmed(tmp_path, losses, status=status)  # the second run of t002
    choice = chosen(tmp_path)
    assert (choice.trial.id, choice.confirm, len(choice.runs)) == ("t001", "done", 2)


def test_confirm_group_with_fewer_seeds_does_not_compete(tmp_path: Path) -> None:
    confirmed(tmp_path, {"t000": (3.0, 3.2), "t001": (2.6, 2.5), "t002": (2.1,)})
    assert chosen(tmp_path).trial.id == "t001"


def test_means_use_only_the_seeds_that_every_group_has(tmp_path: Path) -> None:
    # num_seeds is 2; the third seed of trials 0 and 1 is from before it was lowered
    builder = confirmed(tmp_path, {"t000": (3.0, 3.2), "t001": (2.0, 2.0), "t002": (2.1, 2.2)})
    for run_id, confirms in (("c010", "t000"), ("c011", "t001")):
        run(builder, run_id, 9.0, seed=102, origin="confirm", confirms=confirms)
    choice = chosen(tmp_path)
    assert choice.trial.id == "t001"
    assert choice.difference is not None and choice.difference.n == 2
    baseline, best = choice.baseline_stat(VAL_TEXT_NLL), choice.stat(VAL_TEXT_NLL)
    assert baseline is not None and best is not None
    assert choice.difference.mean == pytest.approx(best.mean - baseline.mean)


def test_added_seeds_do_not_hide_the_ones_before(tmp_path: Path) -> None:
    """The stage of two seeds chose trial 2; of two more, only trial 0 has run one, and trial 2 runs one."""
    losses = {"t000": (3.0, 3.2), "t001": (2.6, 2.5), "t002": (2.1, 2.2)}
    builder = confirmed(tmp_path, losses)
    builder.sweep = sweep_config(confirm={"num_seeds": 4})
    builder.start()
    run(builder, "c010", 2.9, seed=102, origin="confirm", confirms="t000")
    run(builder, "c011", 9.9, seed=102, origin="confirm", confirms="t002", status=None)
    choice = chosen(tmp_path)
    assert (choice.trial.id, choice.confirm, len(choice.runs)) == ("t002", "done", 2)
    assert choice.difference is not None and choice.difference.mean == pytest.approx(-0.95)
    told = " ".join(notes_on(read_results(tmp_path), choice))
    assert "The confirm stage has run 2 of 4 seeds for trial 0 and the best of the search" in told


def test_confirm_runs_with_different_seeds_do_not_finish_the_stage(tmp_path: Path) -> None:
    builder = Builder(tmp_path, sweep_config(confirm={"num_seeds": 1})).start()
    for number, text in enumerate((3.0, 2.0)):
        trial_id = f"t{number:03d}"
        run(builder, trial_id, text, origin="baseline" if number == 0 else "search")
        options = {"origin": "confirm", "confirms": trial_id, "seed": 100 + number}
        run(builder, f"c{number:03d}", text, **options)
    assert chosen(tmp_path).confirm == "unfinished"


def test_confirm_without_trial_0_is_unfinished(tmp_path: Path) -> None:
    confirmed(tmp_path, {"t001": (2.6, 2.5)})
    assert chosen(tmp_path).confirm == "unfinished"


def test_confirm_without_the_best_of_the_search_is_unfinished(tmp_path: Path) -> None:
    confirmed(tmp_path, {"t000": (3.0, 3.2)})
    assert chosen(tmp_path).confirm == "unfinished"


@pytest.mark.parametrize("seeds, state", [((2.6,), "unfinished"), ((2.6, 2.5), "done")])
def test_trial_0_leading_the_search_needs_a_confirmed_rival(
    tmp_path: Path, seeds: tuple[float, ...], state: str
) -> None:
    builder = Builder(tmp_path).start()
    run(builder, "t000", 2.0, origin="baseline")
    run(builder, "t001", 2.1)
    for number, text in enumerate((2.3, 2.4)):
        options = {"origin": "confirm", "confirms": "t000", "seed": 100 + number}
        run(builder, f"c00{number}", text, **options)
    for number, text in enumerate(seeds):
        options = {"origin": "confirm", "confirms": "t001", "seed": 100 + number}
        run(builder, f"c00{2 + number}", text, **options)
    choice = chosen(tmp_path)
    assert (choice.trial.id, choice.confirm) == ("t000", state)


def test_finished_sweep_is_decided_by_its_confirm_runs(tmp_path: Path) -> None:
    realistic(tmp_path)
    choice = chosen(tmp_path)
    assert choice.confirm == "done"
    assert len(choice.runs) == len(choice.baseline_runs) == 2


def test_interval_uses_students_t(tmp_path: Path) -> None:
    # mean 2, sd 1, n 3: half-width 4.303 / sqrt(3).
    interval = Stat.of([1.0, 2.0, 3.0]).interval
    assert interval == pytest.approx((2 - 2.4844, 2 + 2.4844), abs=1e-3)
    assert Stat.of([1.0]).interval is None


@pytest.mark.parametrize(
    "num_runs, factor", [(11, 2.228), (12, 2.201), (13, 2.179), (31, 2.042), (121, 1.980)]
)
def test_interval_of_many_runs_uses_students_t(num_runs: int, factor: float) -> None:
    # factors from a table with three decimals
    stat = Stat(2.0, 1.0, num_runs)
    assert stat.interval is not None
    half = stat.interval[1] - 2.0
    assert half * num_runs**0.5 == pytest.approx(factor, abs=6e-4)


def test_exported_run_is_itself_within_the_audio_limit(tmp_path: Path) -> None:
    builder = confirmed(tmp_path, {"t000": (3.0, 3.2), "t001": (2.6, 2.5)})
    limit = 1.05 * 3.93
    for run_id, seed, text, audio in (("c004", 100, 2.0, limit + 0.1), ("c005", 101, 2.2, 3.8)):
        options = {"origin": "confirm", "confirms": "t002"}
        run(builder, run_id, text, audio=audio, seed=seed, **options)
    choice = chosen(tmp_path)
    assert (choice.trial.id, [r.id for r in choice.runs]) == ("t002", ["c004", "c005"])
    assert choice.adapter_run.id == "c005"


def test_audio_exactly_at_the_limit_is_accepted_in_confirm(tmp_path: Path) -> None:
    builder = confirmed(tmp_path, {"t000": (3.0, 3.2), "t001": (2.6, 2.5)})
    limit = read_results(tmp_path).audio_limit
    assert limit is not None
    for run_id, seed in (("c004", 100), ("c005", 101)):
        run(builder, run_id, 2.1, limit, seed=seed, origin="confirm", confirms="t002")
    assert chosen(tmp_path).trial.id == "t002"
