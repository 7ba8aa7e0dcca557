"""Transcribed samples at a validation; making them leaves the base unchanged."""

import pytest
import torch

from higgs_tune.data.tokens import encode_conversation
from higgs_tune.model.writing import prompt_before_text, write_text
from higgs_tune.train.checkpoint import load_adapter, save_adapter
from higgs_tune.train.engine import Engine
from higgs_tune.train.residents import PackLimits
from higgs_tune.train.samples import sample_predictions
from tests.models import conversation, example, tiny_base, trial

MODES = [
    trial(),
    trial(cross_attention="text_to_audio", targets=("attention", "text_mlp", "audio_attention")),
]


def saved_adapter(base, config, directory):
    """An adapter on disk, with random weights except in its norms."""
    engine = Engine(base, PackLimits.of([config], 1))
    engine.add("a", config)
    state = engine.state("a")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.weights.items():
        if "norm" not in name:
            tensor.normal_(0, 0.3, generator=generator)
    directory.mkdir()
    save_adapter(directory, state, config, base.source)
    return directory


def test_samples_hold_what_the_adapted_model_writes(tmp_path):
    base = tiny_base()
    clips = [conversation("transcribe", seed, num_frames=4 + seed) for seed in range(4)]
    folder = saved_adapter(base, trial(), tmp_path / "a")
    samples = sample_predictions(base, folder, clips, 9)
    assert [sample.target for sample in samples] == [c.turns[-1].parts[0].text for c in clips]
    assert len({sample.predicted for sample in samples}) > 1  # it depends on the audio
    model = load_adapter(tiny_base().model, folder).get_base_model()
    for clip, sample in zip(clips, samples, strict=True):
        prompt = prompt_before_text(encode_conversation(clip, base.vocabulary))
        written = write_text(model, base.vocabulary, prompt, 9)
        assert sample.predicted == base.tokenizer.decode(list(written.ids))
        assert sample.ended == written.reached_end


@pytest.mark.parametrize("config", MODES, ids=lambda config: config.cross_attention)
def test_the_base_is_left_as_it_was(tmp_path, config, recwarn):
    base = tiny_base()
    engine = Engine(base, PackLimits.of([config], 1))
    engine.add("a", config)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    batch = engine.batch({0: [example("transcribe", 3), example("speak", 4)]})
    then = engine.evaluate(batch)
    folder = saved_adapter(tiny_base(), config, tmp_path / "a")
    for _ in range(2):
        sample_predictions(base, folder, [conversation("transcribe", 1)], 3)
    assert [str(w.message) for w in recwarn if "peft" in str(w.filename)] == []
    torch.testing.assert_close(dict(base.model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(engine.evaluate(batch), then, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert type(base.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
