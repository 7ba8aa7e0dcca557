"""The database of tune.storage: its error messages, and what its failures do to a study."""

import sqlite3
from contextlib import closing

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from ray.tune.search import Searcher
from sqlalchemy.exc import OperationalError

from higgs_tune.errors import ConfigError
from higgs_tune.sweep import storage
from higgs_tune.sweep import study as studies
from tests.sweep_fakes import finish, make_searcher, report

LOST = StorageInternalError("An exception is raised during the commit.")
WRITES = [
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_trial_state_values",
]


@pytest.fixture
def waits(monkeypatch):
    """The waits between tries, noted instead of slept."""
    noted = []
    monkeypatch.setattr(storage.time, "sleep", noted.append)
    return noted


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def opened(tmp_path, url):
    return studies.open_study("s", tmp_path, url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite:////no/such/folder/s.db", r"\(sqlite:////no/such/folder/s\.db\) cannot be opened"),
        ("sqlite:////no/such/folder/s.db", r"unable to open database file\. .* Create the folder"),
        ("studies.db", r": the value is not the URL of .* sqlite:///FILE"),
        ("posgresql://u:secret@db/studies", r"no kind of database called posgresql\. .* Correct"),
        ("mysql://u:secret@db/studies", r"package MySQLdb, .* pip install 'mysqlclient'"),
        (
            "oracle+oracledb://u:secret@db/studies",
            r"package oracledb, .* or name another driver: oracle\+",
        ),
        ("postgresql://u:secret/studies", "not the URL of a database"),  # the @ is missing
        (
            "postgresql://u:se{cret}@db/studies",
            "not the URL of a database.* %7B and %7D for braces",
        ),
    ],
)
def test_a_storage_that_cannot_be_opened_is_an_error_of_its_setting(tmp_path, url, message):
    with pytest.raises(ConfigError, match=rf"^tune\.storage.*{message}") as found:
        studies.open_study("s", tmp_path, url)
    assert "secret" not in str(found.value) and "cret" not in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(ConfigError, match=message):
        studies.refuse_taken("s", url)


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be read as one" * 9)
    with pytest.raises(ConfigError, match=r"notes\.txt\) cannot be opened: file is not a database"):
        storage.open_storage(f"sqlite:///{tmp_path}/notes.txt")


def test_a_study_of_another_optuna_version_names_the_command_to_run(tmp_path, opened, url):
    with closing(sqlite3.connect(tmp_path / "studies.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.commit()
    with pytest.raises(ConfigError, match=r"cannot be used: .*optuna storage upgrade"):
        storage.open_storage(url)


def test_connections_are_tested_before_they_are_used(url):
    assert storage.open_storage(url).engine.pool._pre_ping


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://u:secret@db:5432/studies?sslpassword=secret", "postgresql://db/studies"),
        ("postgresql://u:s@secret/x@db/studies", "postgresql"),  # an @ that should be a %40
    ],
)
def test_a_database_drivers_error_is_shown_without_the_password(url, place):
    error = StorageInternalError("commit")
    cause = Exception("no route to db: secret was refused\nand more")
    error.__cause__ = OperationalError("INSERT secret", {}, cause)
    told = str(storage.storage_error(url, error))
    assert told.startswith(f"tune.storage ({place}): the study cannot be read or written: no route")
    assert "--resume" in told and "more" not in told
    assert "secret" not in told


def test_a_failed_write_is_retried_a_few_times(waits):
    tried = []

    def write(times):
        tried.append(times)
        if len(tried) <= times:
            raise LOST

    storage.retried(write, 2)
    assert len(tried) == 3 and waits == list(storage.RETRY_DELAYS_S[:2])
    tried.clear()
    with pytest.raises(StorageInternalError):
        storage.retried(write, 99)
    assert len(tried) == len(storage.RETRY_DELAYS_S) + 1


def test_a_write_to_a_full_disk_is_not_retried(waits):
    def write():
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        storage.retried(write)
    assert waits == []


def started(folder, config):
    """A searcher with three trials, its study, and the study errors that it reports."""
    folder.mkdir()
    study, errors = studies.open_study("s", folder, f"sqlite:///{folder}/s.db"), []
    searcher, _, _ = make_searcher(study, config, on_study_error=errors.append)
    for tune_id in "abc":
        searcher.suggest(tune_id)
    return searcher, study, errors


def outline_at_the_end(searcher, study):
    """What the study holds once the three have ended, each in another way, and a fourth has begun."""
    finish(searcher, "a", 2.0)
    searcher.on_trial_complete("b", report(3.0, 25))
    searcher.on_trial_complete("c", report(9.0, 25, "diverged", reason="NaN"))
    assert searcher.suggest("d") is not None
    return [
        (t.state, t.values, t.params, t.user_attrs, t.intermediate_values, t.constraints)
        for t in study.trials
    ]


@pytest.mark.filterwarnings("ignore:The constraint value is ignored")  # the retry sets it again
@pytest.mark.parametrize("happened", [False, True], ids=["refused", "answer_lost"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_that_fails_once_does_not_change_the_resulting_study(
    make_config, tmp_path, waits, monkeypatch, name, happened
):
    calm, study, _ = started(tmp_path / "calm", make_config())
    expected = outline_at_the_end(calm, study)
    searcher, study, errors = started(tmp_path / "disturbed", make_config())
    write, calls = getattr(RDBStorage, name), []

    def fail_once(self, *args, **kwargs):
        calls.append(args)
        if len(calls) > 1:
            return write(self, *args, **kwargs)
        if happened:
            write(self, *args, **kwargs)
        raise LOST

    monkeypatch.setattr(RDBStorage, name, fail_once)
    assert outline_at_the_end(searcher, study) == expected
    assert len(calls) > 1 and waits == [storage.RETRY_DELAYS_S[0]] and errors == []


def test_a_database_that_stays_unreachable_ends_the_search_but_loses_no_trial(
    make_config, tmp_path, url, opened, waits, monkeypatch
):
    errors = []
    searcher, rosters, _ = make_searcher(opened, make_config(), on_study_error=errors.append)
    searcher.suggest("a")
    searcher.suggest("b")

    def away(*_, **__):
        raise LOST

    with monkeypatch.context() as patch:
        for name in WRITES:
            patch.setattr(RDBStorage, name, away)
        searcher.on_trial_result("a", report(5.0, 25))
        assert waits == list(storage.RETRY_DELAYS_S)
        searcher.on_trial_complete("a", report(2.0, 150, "completed"))
        searcher.cancel_live("away")
        assert searcher.suggest("c") == Searcher.FINISHED
    assert errors == [LOST] and rosters[-1].live == ()
    again = studies.open_study("s", tmp_path, url)
    studies.fail_stale(again)
    assert [trial.user_attrs["index"] for trial in studies.unfinished(again)] == [0, 1]


@pytest.mark.parametrize("name", ["set_trial_user_attr", "_set_trial_param"])
def test_a_proposal_that_fails_halfway_is_made_again_by_a_resumed_sweep(
    make_config, tmp_path, url, opened, waits, monkeypatch, name
):
    errors = []
    searcher, _, _ = make_searcher(opened, make_config(), on_study_error=errors.append)
    searcher.suggest("a")

    def away(*_, **__):
        raise LOST

    with monkeypatch.context() as patch:
        patch.setattr(RDBStorage, name, away)
        assert searcher.suggest("b") is None  # "a" is still to be cancelled
        assert errors == [LOST] and waits == []
    again = studies.open_study("s", tmp_path, url)
    studies.fail_stale(again)
    assert {trial.state for trial in again.trials} == {TrialState.FAIL}
    resumed, _, _ = make_searcher(again, make_config())
    assert [resumed.suggest(tune_id)["id"] for tune_id in "abc"] == ["t000", "t001", "t002"]
