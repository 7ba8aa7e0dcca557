"""Text that is heard: greedy, the same as whole forwards give, and nothing is left behind."""

import pytest
import torch

from higgs_tune.data.collate import collate
from higgs_tune.train.checkpoint import load_adapter, save_adapter
from higgs_tune.train.engine import Engine, PackLimits
from higgs_tune.train.samples import greedy_text, sample_predictions
from tests.models import conversation, example, stock_inputs, tiny_base, trial

MODES = [
    trial(),
    trial(cross_attention="text_to_audio", targets=("attention", "text_mlp", "audio_attention")),
]


def saved_adapter(base, config, directory):
    """An adapter with random weights everywhere, on disk."""
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


def reference(model, clip, num_tokens, end):
    """Greedy text by whole forwards of the sequence, without a cache."""
    inputs = stock_inputs([clip])
    length = int((clip.text_labels_L != -100).nonzero()[0][0]) + 1
    ids, text = inputs["input_ids"][:, :length], []
    while len(text) < num_tokens and (not text or text[-1] != end):
        hidden = model.model(
            input_ids=ids,
            audio_input_ids=inputs["audio_input_ids"],
            audio_input_ids_mask=inputs["audio_input_ids_mask"],
            use_cache=False,
        ).last_hidden_state
        logits = model.text_lm_head(hidden)[0, -1]
        order = logits.argsort(descending=True).tolist()
        placeholders = (model.config.audio_token_id, model.config.audio_delay_token_id)
        text.append(next(token for token in order if token not in placeholders))
        ids = torch.cat([ids, torch.tensor([text[-1:]])], dim=1)
    return text


@pytest.mark.parametrize("config", MODES, ids=lambda config: config.cross_attention)
@torch.no_grad()
def test_text_is_what_whole_forwards_of_the_adapted_model_say(tmp_path, config):
    base = tiny_base()
    end = base.vocabulary.end_of_turn
    model = load_adapter(base.model, saved_adapter(base, config, tmp_path / "a")).get_base_model()
    texts = []
    for seed in range(6):
        clip = example("transcribe", seed, num_frames=4 + seed)
        texts.append(greedy_text(model, clip, 9, end))
        assert texts[-1] == reference(model, clip, 9, end)
    assert len({tuple(text) for text in texts}) > 1  # it depends on the audio


def test_text_ends_with_its_end_or_at_the_longest_length(tmp_path):
    base = tiny_base()
    clips = [conversation("transcribe", seed) for seed in range(3)]
    folder = saved_adapter(base, trial(), tmp_path / "a")
    cut = sample_predictions(base, folder, clips, 2)
    assert not any(sample.ended for sample in cut)
    assert [sample.target for sample in cut] == [clip.turns[-1].parts[0].text for clip in clips]
    model = load_adapter(tiny_base().model, folder).get_base_model()
    text = greedy_text(model, example("transcribe", 0), 8, -1)
    assert len(text) == 8
    end = text[3]
    assert greedy_text(model, example("transcribe", 0), 8, end) == text[: text.index(end) + 1]


@pytest.mark.parametrize("config", MODES, ids=lambda config: config.cross_attention)
def test_the_base_is_left_as_it_was(tmp_path, config, recwarn):
    base = tiny_base()
    engine = Engine(base, PackLimits.of([config], 1))
    engine.add("a", config)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    batch = collate({0: [example("transcribe", 3), example("speak", 4)]}, engine.modes())
    then = engine.evaluate(batch)
    folder = saved_adapter(tiny_base(), config, tmp_path / "a")
    for _ in range(2):
        sample_predictions(base, folder, [conversation("transcribe", 1)], 3)
    assert [str(w.message) for w in recwarn if "peft" in str(w.filename)] == []
    torch.testing.assert_close(dict(base.model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(engine.evaluate(batch), then, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert type(base.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
