"""Settings: bounds, overrides, and errors that name the setting and the next step."""

import pickle
from pathlib import Path

import pytest

from higgs_tune import errors
from higgs_tune.config import SweepConfig, TrialConfig
from higgs_tune.config_file import apply_overrides, load_sweep, read_yaml, to_yaml, validate
from higgs_tune.errors import ConfigError
from higgs_tune.local_path import local_path
from tests.models import trial

AT_LEAST = "Input should be greater than or equal to"
SWEEPS = Path(__file__).parents[2] / "sweeps"


def loaded(tmp_path, text, overrides=()):
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path, overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tune: {num_trails: 3}",
            r"tune\.num_trails: unknown setting, did you mean 'num_trials'\?",
        ),
        ("rank: 8", r"rank: unknown setting, did you mean space\.rank or baseline\.rank\?"),
        ("spaec: {}", r"spaec: unknown setting, did you mean 'space'\?"),
        ("space: {rank: [0]}", r"space\.rank\.0: .*greater than or equal to 1 \(found 0\)"),
        ("space: {learning_rate: {low: -1}}", r"space\.learning_rate\.low: .*greater than 0"),
        (
            "space: {learning_rate: {low: 1, high: 0.1}}",
            r"low \(1\.0\) must be below high \(0\.1\)",
        ),
        ("space: {target_set: [all_linaer]}", r"'all_linaer', did you mean 'all_linear'\?"),
        ("space: {cross_attention: [sometimes]}", r"space\.cross_attention\.0"),
        ("target_sets: {all_linear: [attention], x: []}", r"target_sets\.x: empty"),
        ("target_sets: {all_linear: [audio_attention]}", "trained whenever cross_attention is on"),
        ("data: {tasks: {transcribe: 0, speak: 0}}", "at least one task needs a weight above 0"),
        ("train: {num_steps: 5, report_every_steps: 6}", "must not exceed train.num_steps"),
        ("tune: {num_trials: true}", r"tune\.num_trials: .*number, not a switch \(found True\)"),
        ("tune: {num_trials: yes}", r"tune\.num_trials: .*number, not a switch \(found True\)"),
        ("tune: {slots_per_worker: on}", r"tune\.slots_per_worker: .*number, not a switch"),
        ("tune: {time_limit_s: true}", r"tune\.time_limit_s: .*number, not a switch"),
        ("train: {clip_norm: true}", r"train\.clip_norm: .*number, not a switch"),
        ("space: {learning_rate: {low: true}}", r"learning_rate\.low: .*number, not a switch"),
        ("space: {new_module_lr_factor: true}", r"new_module_lr_factor: .*number, not a switch"),
        ("space: {rank: [4, true]}", r"space\.rank: .*numbers, not switches \(found \[4, True\]\)"),
        ("space: {alpha: [true]}", r"space\.alpha: .*numbers, not switches"),
        ("space: {text_loss_weight: {low: -1, high: 1}}", r"text_loss_weight\.low: .*equal to 0"),
        ("space: {audio_loss_weight: {low: -1, high: 1}}", r"audio_loss_weight\.low: .*equal to 0"),
        ("space: {new_module_lr_factor: {low: 0, high: 1}}", r"factor\.low: .*greater than 0"),
        ("name: ../up", "name: String should match pattern"),
        ("train: {clip_norm: .nan}", "train.clip_norm"),
        (
            "results_dir: s3://bucket/x",
            r"results_dir: .*s3://bucket/x is an address, needed a path",
        ),
        (
            "data: {path: gs://bucket/x}",
            r"data\.path: .*gs://bucket/x is an address, needed a path",
        ),
        (
            "data: {path: ~no_such_user/x}",
            r"data\.path: .*~no_such_user/x is in the home of a user that this machine does not",
        ),
        ("tune: {gpus_per_worker: 8}", r"tune\.gpus_per_worker: .*less than or equal to 1"),
        ("base: {device: cuda}", r"base\.device is cuda and tune\.gpus_per_worker 0"),
        (
            "{base: {device: 'cuda:1'}, tune: {gpus_per_worker: 1}}",
            r"base\.device is cuda:1, .* CUDA_VISIBLE_DEVICES=1",
        ),
        ("[1, 2]", "found a list, needed a mapping"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_each_mistake_is_one_error_that_names_its_setting(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "space.rank=[0]",
            "space.rank.0: Input should be greater than or equal to 1 (found 0)",
        ),
        ("space.rank=0", "space.rank: Input should be greater than or equal to 1 (found 0)"),
        ("space.rank={low: 4}", "space.rank: Input should be a list"),
        (
            "space.cross_attention=no_such",
            "space.cross_attention: Input should be 'off', "
            "'audio_self' or 'text_to_audio' (found 'no_such')",
        ),
        (
            "target_sets.all_linear=attention",
            "target_sets.all_linear: Input should be a list: [attention] (found 'attention')",
        ),
        (
            "space.rank=[]",
            "space.rank: Tuple should have at least 1 item after validation, not 0 (found [])",
        ),
        (
            "space.learning_rate=-1",
            "space.learning_rate: Input should be greater than 0 (found -1)",
        ),
        ("target_sets=[a]", "target_sets: Input should be a section (found ['a'])"),
        (
            "space.target_set=[wide]",
            "space.target_set: unknown target set 'wide'; "
            "target_sets defines ['all_linear', 'attention']",
        ),
        (
            "target_sets.mine=[attention]",
            "space.target_set: unknown target set 'all_linear'; target_sets defines ['mine']. A "
            "target_sets section replaces the shipped sets: list all_linear in it, too, or name "
            "another set",
        ),
        (
            "base.revision=1234567",
            "base.revision: Input should be a valid string: put it in quotes, with --set "
            "'base.revision=\"…\"' (found 1234567)",
        ),
        ("tune.slots_per_worker=0", f"tune.slots_per_worker: {AT_LEAST} 1 (found 0)"),
        ("tune.slots_per_worker=x", "tune.slots_per_worker: Input should be 'auto' (found 'x')"),
        ("space.text_loss_weight=-1", f"space.text_loss_weight: {AT_LEAST} 0 (found -1)"),
        (
            "space.text_loss_weight={low: -1, high: 1}",
            f"space.text_loss_weight.low: {AT_LEAST} 0 (found -1)",
        ),
        (
            "space.text_loss_weight=[1, -2]",
            f"space.text_loss_weight.1: {AT_LEAST} 0 (found -2)",
        ),
        (
            "space.new_module_lr_factor={low: 1, high: 0.5}",
            "space.new_module_lr_factor: low (1.0) must be below high (0.5)",
        ),
        (
            "space.new_module_lr_factor={low: 0.1, high: 1, logs: true}",
            "space.new_module_lr_factor.logs: unknown setting, did you mean 'log'?",
        ),
        ("space.dropout=[0, 1]", "space.dropout.1: Input should be less than 1 (found 1)"),
        ("space.dropout=1", "space.dropout: Input should be less than 1 (found 1)"),
    ],
)
def test_a_mistake_in_an_override_is_reported_once_in_a_users_terms(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "{}", [override])
    assert str(caught.value) == f"{tmp_path / 'sweep.yaml'} with --set:\n  {message}"


def test_numbers_and_switches_may_be_written_in_several_ways(tmp_path):
    text = (
        "space: {learning_rate: {low: 1e-4, high: '3e-3', log: yes}, rank: [8], alpha: [16],"
        " cross_attention: [off, on], dropout: [0, 1e-1]}\n"
        "train: {num_steps: 100.0, clip_norm: 1}\nbase: {compile: on}\n"
    )
    config = loaded(tmp_path, text)
    assert (config.space.learning_rate.low, config.space.learning_rate.high) == (1e-4, 3e-3)
    assert config.space.learning_rate.log is config.base.compile is True
    assert config.space.cross_attention == ("off", "audio_self")
    assert (config.space.dropout, config.space.alpha) == ((0.0, 0.1), (16.0,))
    assert (config.train.num_steps, config.train.clip_norm) == (100, 1.0)


def test_all_problems_are_listed_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)space\.rank\.0.*tune\.seed"):
        loaded(tmp_path, "{space: {rank: [0]}, tune: {seed: -1}}")


def test_a_missing_file_and_a_wrong_encoding_are_clear_errors(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "key", "line", "first"),
    [
        ("train: {clip_norm: 0.5}\ntune: {num_trials: 4}\ntrain: {num_steps: 50}\n", "train", 3, 1),
        ("tune:\n  seed: 1\n  num_trials: 4\n  'seed': 2\n", "seed", 4, 2),
    ],
)
def test_a_duplicate_key_is_an_error_with_its_line(tmp_path, text, key, line, first):
    message = rf"sweep\.yaml, line {line}: '{key}' appears twice, first in line {first}"
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text)
    with pytest.raises(
        ConfigError, match=r"--set space={seed: 1, seed: 2}, line 1: 'seed' appears"
    ):
        loaded(tmp_path, "{}", ["space={seed: 1, seed: 2}"])


def test_merge_keys_may_be_overridden(tmp_path):
    text = (
        "target_sets: {a: &a [attention], all_linear: *a}\n"
        "tune: &tune {seed: 1, scheduler: &asha {name: asha, grace_fraction: 0.5}}\n"
        "tune_copy: {<<: *tune, seed: 2, scheduler: {<<: *asha, name: median}}\n"
        "again: {<<: [*tune, *asha], seed: 3}\n"
    )
    path = tmp_path / "merged.yaml"
    path.write_text(text)
    raw = read_yaml(path)
    assert raw["tune_copy"] == {"seed": 2, "scheduler": {"name": "median", "grace_fraction": 0.5}}
    assert raw["again"] == raw["tune"] | {"name": "asha", "grace_fraction": 0.5, "seed": 3}


@pytest.mark.parametrize("digits", ["1234567", "12e4567", "1e5"])
def test_a_revision_that_looks_like_a_number_must_be_quoted(tmp_path, digits):
    (tmp_path / "a.yaml").write_text("{}")
    config = load_sweep(tmp_path / "a.yaml", [f'base.revision="{digits}"'])
    assert config.base.revision == digits
    with pytest.raises(ConfigError, match=r"base\.revision: .*put it in quotes"):
        load_sweep(tmp_path / "a.yaml", [f"base.revision={digits}"])


@pytest.mark.parametrize("text", ["2026-11-30", "2026-13-45"])
def test_a_name_that_looks_like_a_date_is_a_name(tmp_path, text):
    assert loaded(tmp_path, f"name: {text}").name == text
    config = loaded(tmp_path, "{}", [f"name={text}"])
    assert config.name == text
    assert loaded(tmp_path, to_yaml(config)) == config


def test_a_best_config_given_as_a_sweep_is_recognised(tmp_path):
    path = tmp_path / "best_config.yaml"
    path.write_text("base: {path: embedded}\ntrial: {rank: 8}\nresults: {}\n")
    with pytest.raises(ConfigError, match=rf"needed a sweep's YAML. .* train --config {path}, or"):
        load_sweep(path)
    path.write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"trial: unknown setting, did you mean 'train'"):
        load_sweep(path, ["trial.rank=8"])


def test_overrides_use_the_names_and_the_syntax_of_the_yaml(tmp_path):
    config = loaded(
        tmp_path,
        "tune: {num_trials: 4}",
        ["tune.num_trials=32", "space.rank=[8]", "space.learning_rate.low=1e-5", "base.path=x/y"],
    )
    assert config.tune.num_trials == 32
    assert config.space.rank == (8,)
    assert config.space.learning_rate.low == 1e-5
    assert config.base.path == "x/y"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.num_trials", "found no '='"),
        ("name.x=1", "name is a value, not a section"),
        ("tune.seed=[", "the value is not YAML"),
    ],
)
def test_a_malformed_override_is_an_error(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({"name": "n"}, [override])


def test_written_settings_read_back_equal(tmp_path):
    config = loaded(tmp_path, "{name: a, space: {cross_attention: [off, on, text_to_audio]}}")
    assert config.space.cross_attention == ("off", "audio_self", "text_to_audio")
    assert loaded(tmp_path, to_yaml(config)) == config
    one = trial()
    assert validate(TrialConfig, one.model_dump(mode="json"), "x") == one


def test_quick_and_human_sweeps_are_valid():
    for name in ("quick", "human"):
        assert load_sweep(SWEEPS / f"{name}.yaml").name == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("attention", "audio_attention")}, "does not exist with cross_attention off"),
        ({"cross_attention": "audio_self"}, "without audio_attention among the targets"),
        ({"text_loss_weight": 0, "audio_loss_weight": 0}, "nothing to learn"),
    ],
)
def test_a_trial_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(TrialConfig, trial().model_dump() | changes, "trial")


def test_defaults_are_valid_and_immutable():
    config = SweepConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", ["ConfigError", "DataError", "ModelError", "LeakError", "SweepError"]
)
def test_errors_survive_pickling(name):
    error = getattr(errors, name)("where: found, needed. Next.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)


def test_a_trial_needs_a_lora_target():
    with pytest.raises(ValueError, match="audio_attention alone has no LoRA"):
        trial(targets=("audio_attention",), cross_attention="audio_self")


def test_a_tilde_stands_for_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = SweepConfig.model_validate({"results_dir": "~/runs"})
    assert config.results_root == Path("/home/someone/runs")
    assert local_path("~/voice.wav") == Path("/home/someone/voice.wav")


def change(step, **rates):
    common = {"new_module_lr_factor": 0.1, "text_loss_weight": 1.0, "audio_loss_weight": 1.0}
    return {"step": step, "learning_rate": 1e-3, "copied_from": "t002", **common, **rates}


def test_scheduled_rates_apply_from_their_step_on():
    schedule = [change(5, learning_rate=2e-2), change(10, learning_rate=3e-2)]
    config = validate(TrialConfig, trial().model_dump() | {"schedule": schedule}, "trial")
    rates = [config.rates_at(step)["learning_rate"] for step in (0, 4, 5, 9, 10, 19)]
    assert rates == [1e-2, 1e-2, 2e-2, 2e-2, 3e-2, 3e-2]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([change(5), change(5)], "its steps must increase"),
        ([change(10), change(5)], "its steps must increase"),
        ([change(5, text_loss_weight=0, audio_loss_weight=0)], "nothing to learn"),
    ],
)
def test_a_schedule_that_cannot_be_trained_is_refused(schedule, message):
    with pytest.raises(ConfigError, match=message):
        validate(TrialConfig, trial().model_dump() | {"schedule": schedule}, "trial")
