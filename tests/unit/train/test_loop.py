"""The training loop: intervals, divergence, resume, evaluation."""

import time

import numpy as np
import pytest
import torch

from higgs_tune import metrics
from higgs_tune.data.collate import collate, count_targets
from higgs_tune.data.held_out import validation_sets
from higgs_tune.data.shards import CodecFacts
from higgs_tune.data.tokens import encode_conversation
from higgs_tune.errors import DataError, ModelError
from higgs_tune.model.packed_forward import packed_nll
from higgs_tune.train.checkpoint import _INTERVAL, load_state, save_adapter
from higgs_tune.train.loop import PackLoop
from higgs_tune.train.optim import learning_rate_factor
from higgs_tune.train.residents import PackLimits
from tests.models import DATA, NUM_CODEBOOKS, NUM_CODES, make_dataset, tiny_base, trial


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def loop_of(dataset, *trials, num_slots=2):
    return PackLoop(tiny_base(), dataset, DATA, PackLimits.of(list(trials), num_slots))


def report_of(loop, trial_id):
    """The trial's next report; skips those of other trials."""
    while trial_id not in (results := loop.advance()):
        assert results
    return results[trial_id]


A, B = trial(seed=1), trial(seed=2, targets=("attention",), num_steps=12)


def test_intervals_end_at_the_budget_and_report_true_steps(dataset):
    loop = loop_of(dataset, A, B)
    loop.join("b", B)
    results = [loop.advance()["b"] for _ in range(3)]
    assert [r[metrics.STEP] for r in results] == [5, 10, 12]
    rates = [B.learning_rate * learning_rate_factor(step, 12, 0.1, 0.1) for step in (4, 9, 11)]
    assert [r[metrics.LEARNING_RATE] for r in results] == pytest.approx(rates)
    assert [r["status"] for r in results] == ["running", "running", "completed"]
    assert results[0][metrics.grad_share("attention")] == pytest.approx(1.0)
    assert results[0][metrics.PEAK_MEMORY_MIB] > 10
    assert loop.advance() == {}


def test_preparing_examples_does_not_count_as_training_time(dataset, monkeypatch):
    loop = loop_of(dataset, A)
    loop.join("a", A)
    encode = loop._examples.encode

    def slow(conversation):
        time.sleep(0.005)
        return encode(conversation)

    monkeypatch.setattr(loop._examples, "encode", slow)
    result = loop.advance()["a"]
    num_clips = result[metrics.STEP] * A.batch_clips
    assert loop.prepare_s >= 0.005 * num_clips
    assert loop.train_s > 0
    assert loop.train_s + loop.prepare_s == pytest.approx(loop._steps_s)


def test_trials_at_different_points_of_their_intervals_train_as_if_alone(dataset):
    def alone(config):
        loop = loop_of(dataset, config, num_slots=1)
        loop.join("x", config)
        return [report_of(loop, "x") for _ in range(3)]

    late = trial(seed=3, targets=("attention",), num_steps=12)
    loop = loop_of(dataset, A, late)
    loop.join("a", A)
    steps = iter(range(1, 4))
    assert loop.advance(lambda: next(steps) == 3) == {}  # left in the middle of its interval
    loop.join("late", late)
    found = {"a": [], "late": []}
    order = []
    while len(found["late"]) < 3 or len(found["a"]) < 3:
        for trial_id, result in loop.advance().items():
            found[trial_id].append(result)
            order.append((trial_id, result[metrics.STEP]))
    assert order == [("a", 5), ("late", 5), ("a", 10), ("late", 10), ("a", 15), ("late", 12)]
    for trial_id, config in (("a", A), ("late", late)):
        for ours, theirs in zip(found[trial_id], alone(config), strict=False):
            assert ours[metrics.STEP] == theirs[metrics.STEP]
            for name in (metrics.VAL_TEXT_NLL, metrics.VAL_AUDIO_NLL, metrics.TRAIN_TEXT_NLL):
                assert ours[name] == pytest.approx(theirs[name], rel=5e-3), (trial_id, name)


def test_a_snapshot_written_later_holds_the_earlier_state(dataset, tmp_path):
    loop = loop_of(dataset, A, num_slots=1)
    loop.join("a", A)
    steps = iter(range(1, 8))
    loop.advance(lambda: next(steps) == 3)
    write = loop.snapshot("a")
    loop.snapshot("a")(tmp_path)
    assert loop.advance()["a"][metrics.STEP] == 5
    loop.advance()
    later = tmp_path / "later"
    later.mkdir()
    write(later)
    files = [path for path in sorted(tmp_path.iterdir()) if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert (later / path.name).read_bytes() == path.read_bytes(), path.name


def test_at_step_zero_every_trial_has_the_losses_of_the_bare_base(dataset):
    on = trial(cross_attention="audio_self", targets=("attention", "audio_attention"))
    loop = loop_of(dataset, A, on)
    loop.join("a", A)
    loop.join("on", on)
    for result in loop._validator.validate(["on", "a"]).values():
        for name, value in loop.base_metrics.items():
            assert result[name] == pytest.approx(value, abs=2e-5), name


def test_audio_gain_is_the_text_nll_with_swapped_audio_minus_that_with_its_own(dataset):
    loop = loop_of(dataset, A)

    def nats_per_token(conversations):
        examples = [encode_conversation(c, loop.base.vocabulary) for c in conversations]
        nats = sum(float(packed_nll(loop.base.model, collate({0: [e]}), None)[0]) for e in examples)
        return nats / count_targets(examples, NUM_CODEBOOKS).text

    sets, base = validation_sets(dataset, DATA.num_val_clips), loop.base_metrics
    own, other = map(nats_per_token, (sets.transcribe, sets.transcribe_swapped))
    assert abs(other - own) > 1e-3
    assert base[metrics.VAL_TEXT_NLL] == pytest.approx(own, abs=1e-5)
    assert base[metrics.VAL_TEXT_NLL_SWAPPED] == pytest.approx(other, abs=1e-5)
    assert base[metrics.VAL_AUDIO_GAIN] == pytest.approx(other - own, abs=1e-5)
    codebooks = [base[metrics.val_codebook_nll(c)] for c in range(NUM_CODEBOOKS)]
    assert base[metrics.VAL_AUDIO_NLL] == pytest.approx(np.mean(codebooks))


def test_nan_ends_a_trial_as_diverged_and_spares_the_other(dataset):
    loop = loop_of(dataset, A, B)
    loop.join("a", A)
    loop.join("b", B)
    slot = loop.engine.residents["a"].slot
    loop.engine.bank.lora.master[slot, :64] = torch.nan
    results = loop.advance()
    assert results["a"]["status"] == "diverged"
    assert "not finite" in results["a"]["reason"]
    assert metrics.VAL_TEXT_NLL not in results["a"]
    assert results["b"]["status"] == "running"
    assert np.isfinite(results["b"][metrics.VAL_TEXT_NLL])


def test_resumed_trial_repeats_the_same_batches_and_losses(dataset, tmp_path):
    whole = loop_of(dataset, A, num_slots=1)
    whole.join("a", A)
    expected = [whole.advance()["a"] for _ in range(4)]
    first = loop_of(dataset, A, num_slots=1)
    first.join("a", A)
    first.advance()
    first.advance()
    first.snapshot("a")(tmp_path)
    second = loop_of(dataset, A, num_slots=1)
    assert second.join("a", A, tmp_path)["step"] == 10
    for result in expected[2:]:
        again = second.advance()["a"]
        for name in (metrics.VAL_TEXT_NLL, metrics.VAL_AUDIO_NLL, metrics.TRAIN_TEXT_NLL):
            assert again[name] == pytest.approx(result[name], rel=1e-6), name


def test_trial_that_joins_with_its_budget_used_up_is_validated_once(dataset, tmp_path):
    first = loop_of(dataset, A, num_slots=1)
    first.join("a", A)
    expected = [first.advance()["a"] for _ in range(4)][-1]
    first.snapshot("a")(tmp_path)
    assert not load_state(tmp_path).exp_avg  # training cannot go on from it
    again = loop_of(dataset, A, B)
    again.join("a", A, tmp_path)
    again.join("b", B)
    results = again.advance()
    assert results.keys() == {"a"}
    assert (results["a"]["status"], results["a"][metrics.STEP]) == ("completed", 20)
    assert results["a"][metrics.VAL_TEXT_NLL] == pytest.approx(expected[metrics.VAL_TEXT_NLL])
    assert metrics.TRAIN_TEXT_NLL not in results["a"]
    assert again.advance()["b"][metrics.STEP] == 5
    assert again.advance().keys() == {"b"}


def test_a_state_without_moments_cannot_train_on(dataset, tmp_path):
    first = loop_of(dataset, A, num_slots=1)
    first.join("a", A)
    first.advance()
    state = first.engine.state("a", moments=False)
    save_adapter(tmp_path, state, A, "tiny")
    with pytest.raises(ValueError, match="a: state does not fit its targets at"):
        loop_of(dataset, A, num_slots=1).join("a", A, tmp_path)


def test_account_names_every_module_and_counts_parameters(dataset):
    on = trial(rank=4, cross_attention="text_to_audio", targets=("text_mlp", "audio_attention"))
    account = loop_of(dataset, on).join("on", on)
    mlp = account["modules"]["text_mlp"]
    assert mlp["num_modules"] == 2 * 3
    assert mlp["num_parameters"] == 2 * 3 * 4 * (32 + 48)
    assert set(mlp["modules"]) == {
        f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")
    }
    new = account["modules"]["audio_attention"]
    assert new["num_parameters"] == 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert account["parameters"] == mlp["num_parameters"] + new["num_parameters"]


def test_data_of_another_codec_is_refused(tmp_path):
    other = CodecFacts("other", 24000, 25.0, NUM_CODEBOOKS, NUM_CODES + 10)
    with pytest.raises(
        DataError, match=r"encoded with 4 codebooks of 40, the base tiny needs 4 of 30"
    ):
        loop_of(make_dataset(tmp_path / "other", other), A)


@pytest.mark.parametrize("asked, told", [(4, False), (8, False), (48, True)])
def test_fewer_validation_clips_than_asked_for_cause_a_warning(dataset, caplog, asked, told):
    data = DATA.model_copy(update={"num_val_clips": asked})
    loop = PackLoop(tiny_base(), dataset, data, PackLimits.of([trial()], num_slots=1))
    assert len(loop.transcribe) == min(asked, 8)
    said = "8 validation clips can be used, data.num_val_clips is 48"
    assert (said in caplog.text) == told


def test_a_row_that_the_base_cannot_hold_is_left_out(dataset, caplog):
    base = tiny_base()
    base.model.config.max_position_embeddings = 37  # a clip may need up to 31 to 40, cloning more
    loop = PackLoop(base, dataset, DATA, PackLimits.of([A], 1))
    account = loop.join("a", A)
    assert 0 < account["num_skipped"] < 24
    loop.leave("a")
    assert loop.join("a", A)["num_skipped"] == account["num_skipped"]
    warnings = [text for text in caplog.messages if "rows of the train split are left out" in text]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{account['num_skipped']} of ")
    results = [loop.advance()["a"] for _ in range(4)]
    assert results[-1]["status"] == "completed"


def test_conversations_longer_than_max_rows_are_left_out(dataset):
    data = DATA.model_copy(update={"max_rows": 37})
    loop = PackLoop(tiny_base(), dataset, data, PackLimits.of([A], 1))
    assert 0 < loop.join("a", A)["num_skipped"] < 24
    every = PackLoop(tiny_base(), dataset, DATA, PackLimits.of([A], 1))
    assert every.join("a", A)["num_skipped"] == 0


def test_a_state_of_another_shape_is_refused(dataset):
    loop = loop_of(dataset, A)
    loop.join("a", A)
    state = loop.engine.state("a")
    name = next(name for name in state.exp_avg if name.endswith("lora_B.weight"))
    state.exp_avg[name] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"state does not fit at .*lora_B"):
        loop.engine.add("again", A, state)


def test_a_trial_that_cannot_join_leaves_its_slot_free(dataset, tmp_path, monkeypatch):
    loop = loop_of(dataset, A, num_slots=1)

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop.engine.bank, "refresh_compute", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            loop.join("a", A)
    loop.join("a", A)
    loop.snapshot("a")(tmp_path)
    loop.leave("a")
    (tmp_path / _INTERVAL).write_text("{")
    with pytest.raises(ModelError, match="not readable"):
        loop.join("a", A, tmp_path)
    loop.join("b", A)
    assert report_of(loop, "b")["status"] == "running"
